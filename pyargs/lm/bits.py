"""Models whose weights the CPU stack holds in fewer bits: "int8", made from the model's weights, or "file", the blocks of the
GGUF file that it was read from, as they are."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError, described

BITS = ("int8", "file")

FAMILIES = ("llama", "qwen2")

BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
"""Of a GGUF file: what the stack multiplies with as it is. F32, F16 and BF16 tensors become float32."""

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Held(NamedTuple):
    """dtype: one of BITS; file: the GGUF file of "file"."""

    dtype: str
    file: Path | None


_held: WeakKeyDictionary[nn.Module, Held] = WeakKeyDictionary()


def hold(model: nn.Module, dtype: str, file: Path | None = None) -> None:
    """From now on the CPU stack holds the model's weights so, and nothing else computes it."""
    _held[_decoder(model)] = Held(dtype, file)


def held(model: nn.Module) -> Held | None:
    """How the stack holds the weights of this model or decoder, where that is not as they are."""
    return _held.get(_decoder(model))


_bases: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


def rests(twin: nn.Module, decoder: nn.Module) -> None:
    """From now on `twin`, with LoRA of its own, counts as resting on the weights of `decoder` as the stack holds them."""
    _bases[twin] = ref(decoder)


def held_base(twin: nn.Module) -> nn.Module | None:
    """The decoder that a twin rests on, where the stack holds it in fewer bits."""
    base = _bases[twin]() if twin in _bases else None
    return None if base is None or held(base) is None else base


def check_plain(model: nn.Module) -> None:
    """Raises PyargsError before a pass of transformers for a model that the stack alone computes: its modules are float32."""
    if few := held(model):
        raise PyargsError(
            f"dtype={few.dtype!r} is for the CPU stack alone, and this would be a pass of transformers (training, a soft "
            "prompt, a hook, PYARGS_BACKEND=eager): load the model in float32"
        )


def _decoder(model: nn.Module) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def find_gguf(place: Path | str) -> Path:
    """A GGUF file itself, or the one of a folder."""
    if (path := Path(place)).suffix == ".gguf":
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise PyargsError(
            f"dtype='file' keeps the blocks of a GGUF file, and {place} has {len(found) or 'none'}: "
            "give the file itself (model.gguf), 'smollm2-135m', or dtype='int8'"
        )
    return found[0]


def check_gguf(file: Path) -> None:
    """Raises PyargsError for a file that transformers would read as another model than it is."""
    reader = _reader(file)
    family = _field(reader, "general.architecture")
    if family not in list(FAMILIES):
        raise PyargsError(f"{file} is of the family '{family}': of GGUF files only {' and '.join(FAMILIES)} are read")
    scaling = _field(reader, f"{family}.rope.scaling.type") or "none"
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise PyargsError(f"{file} scales its rotary embedding, which is lost on reading: give the model as safetensors")
    layers = _field(reader, f"{family}.block_count")
    if not isinstance(layers, int) or layers > len(reader.tensors):
        raise PyargsError(f"{file}: 'block_count' is {layers}, and the file holds {len(reader.tensors)} tensors")
    if not (file.parent / "tokenizer.json").exists():
        raise PyargsError(
            f"a GGUF file only names how its tokenizer splits words: put the tokenizer.json and tokenizer_config.json of the "
            f"model beside {file}"
        )


def _reader(file: Path):
    from gguf import GGUFReader

    with described(f"cannot read the GGUF file {file}"):  # a damaged one fails anywhere within gguf
        _check_counts(file)
        return GGUFReader(file)


def _field(reader, name: str):
    with described(f"cannot read '{name}' of the GGUF file {reader.data.filename}"):
        return None if (field := reader.get_field(name)) is None else field.contents()


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a field of a GGUF file, by its type."""
STRING, ARRAY = 8, 9


def _check_counts(file: Path) -> None:
    """Raises ValueError where the head of a GGUF file counts more than the file has room for. gguf would count to the end, in
    memory, behind the end of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:

        def number(form: str) -> int:
            if len(found := stream.read(struct.calcsize(form))) < struct.calcsize(form):
                raise ValueError("it ends within its head")
            return struct.unpack(form, found)[0]

        def skip(count: int, each: int) -> None:
            if count * each > size - stream.tell():
                raise ValueError(f"it counts {count} where it has {size - stream.tell()} bytes")
            stream.seek(count * each, 1)

        def value(kind: int) -> None:
            if kind in SIZES:
                skip(1, SIZES[kind])
            elif kind == STRING:
                skip(number("<Q"), 1)
            elif kind == ARRAY and (of := number("<I")) in SIZES:
                skip(number("<Q"), SIZES[of])
            elif kind == ARRAY and of == STRING:
                for _ in range(number("<Q")):
                    skip(number("<Q"), 1)
            else:
                raise ValueError(f"it has a field of type {kind}")

        if stream.read(4) != b"GGUF" or not 2 <= number("<I") <= 3:
            raise ValueError("it is none of version 2 or 3, with the lowest byte first")
        number("<Q")
        for _ in range(number("<Q")):
            value(STRING)
            value(number("<I"))


def read_blocks(file: Path, decoder: nn.Module, head: nn.Linear | None) -> dict[nn.Linear, tuple[str, Tensor]]:
    """For each linear layer of a Llama or Qwen2 decoder, and its output layer: the type of its blocks ("Q4_1", say), and them,
    uint8 [outputs, bytes]. Layers that the file has in F32, F16 or BF16 are left out.

    Raises PyargsError for other types, and where the blocks are not the weights that the model has now.
    """
    from gguf.quants import dequantize

    reader = _reader(file)
    tensors, family = {tensor.name: tensor for tensor in reader.tensors}, _field(reader, "general.architecture")
    config = decoder.config
    if family not in FAMILIES or family != config.model_type:
        raise PyargsError(f"{file} is of the family '{family}', and the model of '{config.model_type}'")
    linears = {
        f"blk.{number}.{NAMES[name]}.weight": layer.get_submodule(name)
        for number, layer in enumerate(decoder.layers)
        for name in NAMES
    }
    if head is not None:
        linears["output.weight" if "output.weight" in tensors else "token_embd.weight"] = head
    found = {}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise PyargsError(f"{name} has an adapter, and dtype='file' keeps the weights of the file: take dtype='int8'")
        if name not in tensors:
            raise PyargsError(f"{file} has no tensor {name}: it is another model's")
        kind = tensors[name].tensor_type.name
        if kind in ("F32", "F16", "BF16"):
            continue
        if kind not in BLOCKS:
            raise PyargsError(
                f"{file} holds {name} as {kind}; as they are only {', '.join(BLOCKS)}, F32, F16 and BF16 are taken. "
                "Fix: dtype='float32' (dequantised), or 'int8'"
            )
        data = tensors[name].data
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):  # whose halves the file has in turns
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            data = data.reshape(heads, len(data) // heads // 2, 2, -1).swapaxes(1, 2).reshape(len(data), -1)
        data = np.array(data)  # dense, and writable: torch warns of others
        if not torch.equal(torch.from_numpy(dequantize(data, tensors[name].tensor_type)), linear.weight):
            raise PyargsError(
                f"the weights of {name} are no longer those of {file}: load the model again, or take dtype='int8'"
            )
        found[linear] = kind, torch.from_numpy(data)
    return found
