"""A decoder stack of the Llama family (Llama, Qwen2) in C++: weights packed once, one parallel region per pass.

    stack = native.pack(model)
    cache = stack.cache(rows=len(ids), capacity=ids.shape[1] + 64 + k)
    states = stack(ids, cache, mask)                    # the prompts
    logits = stack.logits(states[:, -1])
    states = stack(candidates, cache, branches=True)    # k candidates behind each prefix
    stack.commit(cache, slot)                           # one of them becomes the prefix's next token

A token's state does not depend on what else is in its pass: it is the same, bit by bit, in a prompt, as an ordinary step,
among branches, and for any number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.structure import DROPPING, contents, eager, structure
from pyargs.ops.library import has_extension
from pyargs.progress import progress_bar

MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Of a layer: what one product computes, as the linear layers of transformers."""

PANEL = 32  # kPanel of csrc/stack/pass.h

FLOATS = torch.float32, torch.bfloat16
SILU = ACT2CLS["silu"]
ROPE = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not change with the length of a text


class Cache:
    """Keys and values of `rows` sequences in float32; `Stack.cache` makes it.

    length: the tokens of each row's prefix, a list. Left padding takes no place. Rows need not belong to one batch: a policy
    and a reward model that share a stack have rows of their own.
    """

    def __init__(self, native):
        self.native = native

    @property
    def length(self) -> list[int]:
        return self.native.length

    @property
    def rows(self) -> int:
        return self.native.rows

    def cut(self, length: int) -> None:
        """Every row keeps its first `length` tokens only."""
        if length < 0:
            raise PyargsError(f"a row cannot keep {length} tokens")
        self.native.length = [min(length, kept) for kept in self.length]

    def copy(self, row: int, source: int, length: int) -> None:
        """Row `row` becomes the first `length` tokens of row `source`."""
        with _errors():
            self.native.copy(row, source, length)


class Stack:
    """A packed decoder; `pack` makes it. All tensors that go in and out are on the CPU."""

    def __init__(self, native, sizes: dict, dtype: torch.dtype, rotary: nn.Module, embedding: Tensor, has_logits: bool):
        self._native, self._sizes, self._dtype, self._rotary, self._embedding = native, sizes, dtype, rotary, embedding
        self.dim, self.vocabulary, self.has_logits, self.has_delta = sizes["dim"], sizes["vocabulary"], has_logits, False

    @torch.no_grad()
    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens, branches included."""
        # Through the model's own tables: every scaling that it has, rounded as it rounds.
        tables = self._rotary(_zeros(0), torch.arange(capacity, device="cpu").unsqueeze(0))
        half = self._sizes["head_dim"] // 2
        cosine, sine = (table[0, :, :half].contiguous() for table in tables)
        shape = (self._sizes[name] for name in ("layers", "kv_heads", "head_dim"))
        from pyargs import _C

        with _errors():
            return Cache(_C.Cache(*shape, rows, cosine, sine))

    def __call__(
        self, ids: Tensor, cache: Cache, mask: Tensor | None = None, *, branches: bool = False,
        rows: Tensor | Sequence[int] | None = None, delta: bool | Tensor | Sequence[bool] = False,
    ) -> Tensor:  # fmt: skip
        """Last-layer states, normed, float32 [B, n, dim], of tokens behind what the cache holds.

        ids: int64 [B, n]. mask: [B, n], zero where there is no token (left padding, or fewer branches than n): nothing is
        computed there, and the states are zero.
        branches: False: the tokens of a row follow each other, and become part of its prefix. True: each sees the prefix and
        itself, as its next token; `commit` then says which stays, the others are written over.
        rows: [B], the row of the cache that each row of ids continues, none twice; the first B by default.
        delta: for which rows of ids [B] the adapter of `pack` counts; one answer for all, or each its own.
        """
        ids = _dense(ids, torch.int64, "ids")
        if ids.dim() != 2:
            raise PyargsError(f"ids must be [B, n], got shape {list(ids.shape)}")
        count, width = ids.shape
        mask = None if mask is None else _dense(mask, torch.bool, "mask")
        if rows is None and count > cache.rows:
            raise PyargsError(f"{count} rows of ids, but the cache has {cache.rows}: make a larger one")
        rows = None if rows is None else _dense(rows, torch.int64, "rows")
        if isinstance(delta, bool):
            delta = torch.full((count,), True, dtype=torch.bool, device="cpu") if delta else None
        else:
            delta = _dense(delta, torch.bool, "delta")
        if delta is not None and not self.has_delta and delta.any():
            raise PyargsError("this stack has no delta: give pack an adapter")
        make = torch.empty if mask is None else torch.zeros
        states = make(count, width, self.dim, dtype=torch.float32, device="cpu")
        with _errors():
            self._native.forward(cache.native, ids, mask, rows, delta, branches, states)
        return states

    def commit(self, cache: Cache, slot: Tensor, rows: Tensor | Sequence[int] | None = None) -> None:
        """The branch in column slot [B] of the last pass becomes the next token of each row; a slot of -1 leaves its row."""
        rows = None if rows is None else _dense(rows, torch.int64, "rows")
        with _errors():
            cache.native.commit(_dense(slot, torch.int64, "slot"), rows)

    def logits(self, states: Tensor, *, top: int = 0, vocabulary: int | None = None) -> Tensor:
        """The output layer: float32 [B, dim] -> float32 [B, vocabulary], of the first `vocabulary` tokens, all by default.

        top: only the `top` largest logits of a row are asked for (0: all): the others may be estimates, smaller than these, so
        a logsumexp of them is one, too. A copy of the weights in eight bits, with a bound of its error, then says which few
        outputs need the whole weights. Of more than 64, and of more rows than that pays for, all are exact.
        """
        if not self.has_logits:
            raise PyargsError("this stack was packed from a decoder, which has no output layer: pack the causal LM")
        states = _dense(states, torch.float32, "states")
        vocabulary = self.vocabulary if vocabulary is None else vocabulary
        if top < 0 or not 0 < vocabulary <= self.vocabulary:
            raise PyargsError(f"cannot give the {top} largest logits of {vocabulary} tokens: the model has {self.vocabulary}")
        logits = torch.empty(len(states), vocabulary, dtype=torch.float32, device="cpu")
        with _errors():
            self._native.logits(states, top, logits)
        return logits


@torch.no_grad()
def pack(model: nn.Module, adapter: nn.Module | None = None, *, dtype: torch.dtype | None = None) -> Stack:
    """A Stack with the weights of a LlamaForCausalLM or Qwen2ForCausalLM, or of the decoder in one.

    adapter: a decoder with the same weights and LoRA of pyargs.lm.lora: its LoRA becomes the delta that single rows of a pass
    can ask for. LoRA in `model` itself is added to the weights.
    dtype: of the packed weights, float32 or bfloat16; the model's by default. Everything else is float32, except that bfloat16
    weights meet inputs rounded to bfloat16.

    The model is not changed, and only its embedding stays in use. Raises PyargsError that names what a model has and the
    stack has not.
    """
    if not has_extension:
        raise PyargsError("the native stack needs the extension: pip install pyargs with a compiler at hand")
    from pyargs._C import Stack as Native

    decoder, head = _parts(model)
    config = decoder.config
    embedding = decoder.get_input_embeddings().weight.detach()
    dtype = dtype or embedding.dtype
    _check(decoder, head, dtype, structure(model))

    heads, kv_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    sizes = dict(
        dim=config.hidden_size, heads=heads, kv_heads=kv_heads, head_dim=decoder.layers[0].self_attn.head_dim, inner=inner,
        layers=len(decoder.layers), vocabulary=len(embedding),
    )  # fmt: skip
    native = Native(str(dtype).removeprefix("torch."), *sizes.values(), head is not None, config.rms_norm_eps)

    def put(layer: int, matrices: dict[str, list[nn.Module]]) -> None:
        parts = []
        for matrix, linears in matrices.items():
            places, columns = _places(linears, matrix)
            bias = _zeros(columns)
            for linear, place in zip(linears, places, strict=True):
                parts.append((matrix, int(place[0]), matrix == "gate_up", _weight(linear)))
                if linear.bias is not None:
                    bias[place] = linear.bias.float()
            if any(linear.bias is not None for linear in linears):
                native.bias(layer, matrix, bias)
        native.pack(layer, parts)

    for number, layer in enumerate(decoder.layers):
        put(number, {matrix: [layer.get_submodule(name) for name in names] for matrix, names in MATRICES.items()})
        native.norms(number, _float(layer.input_layernorm.weight), _float(layer.post_attention_layernorm.weight))
    if head is not None:
        put(0, {"head": [head]})
    native.embedding(embedding, _float(decoder.norm.weight))
    stack = Stack(native, sizes, dtype, decoder.rotary_emb, embedding, head is not None)
    return stack if adapter is None else _with_delta(stack, decoder, adapter)


@torch.no_grad()
def _with_delta(stack: Stack, decoder: nn.Module, adapter: nn.Module) -> Stack:
    """A second stack on the packed weights of `decoder`, with the adapter's LoRA as the delta."""
    adapter = adapter.get_decoder() if hasattr(adapter, "get_decoder") else adapter
    _check(adapter, None, torch.float32, structure(adapter))
    if not lora.same_weights(decoder, adapter):
        raise PyargsError("the adapter rests on other weights: a delta needs the same base weights")
    twin = copy.copy(stack)
    twin._native, twin.has_delta = stack._native.twin(), True
    for number, layer in enumerate(adapter.layers):
        for matrix, names in MATRICES.items():
            linears, low, high = [layer.get_submodule(name) for name in names], [], []
            places, columns = _places(linears, matrix)
            for linear, place in zip(linears, places, strict=True):
                for down, up in _factors(linear):
                    low.append(nn.functional.pad(down, (0, down.shape[1] % 2 if stack._dtype == torch.bfloat16 else 0)))
                    high.append(_zeros(len(down), columns))
                    high[-1][:, place] = up.T
            if low:
                a, b = torch.cat(low), torch.cat(high).unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
                twin._native.delta(number, matrix, a, b)
    return twin


def _places(linears: list[nn.Module], matrix: str) -> tuple[list[Tensor], int]:
    """Which columns of the matrix are the outputs of each of its linear layers, and how many columns it has.

    They stand side by side; gate and up take turns by panels.
    """
    sizes = [linear.out_features for linear in linears]
    if matrix == "gate_up":
        place = torch.arange(sizes[0], device="cpu")
        place = place + place // PANEL * PANEL
        return [place, place + PANEL], 2 * _padded(sizes[0])
    return list(torch.arange(sum(sizes), device="cpu").split(sizes)), _padded(sum(sizes))


def _padded(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _check(decoder: nn.Module, head: nn.Module | None, dtype: torch.dtype, found: dict) -> None:
    """Raises PyargsError for everything that the stack would compute differently; found: the model's `structure`, which has
    refused what is not of libraries."""
    config, embedding = decoder.config, decoder.get_input_embeddings()

    def refuse(what: str) -> None:
        raise PyargsError(f"the native stack does not do {what}: decode this model through transformers")

    if config.model_type not in ("llama", "qwen2"):
        refuse(f"the architecture '{config.model_type}' (only llama and qwen2)")
    if config.hidden_act != "silu":
        refuse(f"the activation '{config.hidden_act}' (only silu)")
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        refuse(f"{other[0]} layers (only full attention)")
    rotary = decoder.rotary_emb
    if rotary.rope_type not in ROPE:
        refuse(f"the rope scaling '{rotary.rope_type}' (only {', '.join(ROPE)})")
    if config._attn_implementation not in ("sdpa", "eager"):
        refuse(f"the attention '{config._attn_implementation}' (only sdpa and eager)")
    if any(DROPPING in described for described in found.values()):
        refuse("dropout in training mode (call eval())")
    if 2 * len(rotary.inv_freq) != decoder.layers[0].self_attn.head_dim:
        refuse("rotary embeddings of a part of the head")
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or not embedding.weight.is_contiguous():
        refuse(f"an embedding of class {type(embedding).__name__}, with max_norm, or not contiguous")
    if head is not None and type(head) is not nn.Linear:
        refuse(f"an output layer of class {type(head).__name__}")
    if head is not None and len(head.weight) != len(embedding.weight):
        refuse(f"an output layer of {len(head.weight)} tokens beside an embedding of {len(embedding.weight)}")
    for name, tensor in decoder.named_parameters():
        if tensor.device.type != "cpu":
            refuse(f"weights on {tensor.device} ({name})")
        if "lora_" not in name and (tensor.dtype not in FLOATS or tensor.dtype != embedding.weight.dtype):
            refuse(f"weights of {tensor.dtype} ({name}; only float32 or bfloat16, the same in all modules)")
    if head is not None and head.weight.dtype != embedding.weight.dtype:
        refuse(f"an output layer of {head.weight.dtype} behind an embedding of {embedding.weight.dtype}")
    if dtype not in FLOATS:
        refuse(f"packed weights of {dtype} (only float32 and bfloat16)")
    family = type(decoder).__module__
    if not family.startswith("transformers.models.") or len(decoder.layers) > config.num_hidden_layers:
        refuse(f"decoders of class {type(decoder).__name__} with {len(decoder.layers)} layers (only transformers' own)")
    for name, module in decoder.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            _lora(name, module, refuse)
    dim, inner, width = config.hidden_size, config.intermediate_size, decoder.layers[0].self_attn.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    shapes = (queries, dim), (keys, dim), (keys, dim), (dim, queries), (inner, dim), (inner, dim), (dim, inner)
    for number, layer in enumerate(decoder.layers):
        attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm, decoder.norm)
        if any(type(part).__module__ != family for part in (layer, attention, layer.mlp, *norms, rotary)):
            refuse(f"parts of other classes (layer {number})")
        if type(layer.mlp.act_fn) is not SILU:
            refuse(f"the activation {type(layer.mlp.act_fn).__name__} (layer {number}; only silu)")
        if attention.scaling != attention.head_dim**-0.5 or any(n.variance_epsilon != config.rms_norm_eps for n in norms):
            refuse(f"another scale of attention, or another epsilon, than the config says (layer {number})")
        linears = (layer.get_submodule(name) for names in MATRICES.values() for name in names)
        if any(linear.weight.shape != shape for linear, shape in zip(linears, shapes, strict=True)):
            refuse(f"weights of other sizes than the config says (layer {number})")
        sizes = attention.head_dim, attention.num_key_value_groups, attention.layer_idx, attention.is_causal
        groups = config.num_attention_heads // config.num_key_value_heads
        if sizes != (width, groups, number, True) or attention.config is not config:
            refuse(f"attention of other sizes than the config says, or that looks ahead (layer {number})")


def _lora(name: str, module: nn.Module, refuse) -> None:
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or type(module.get_base_layer()) is not nn.Linear:
        refuse(f"layers of class {type(module).__name__} ({name})")
    if (
        len(module.active_adapters) > 1
        or not set(module.active_adapters) <= module.lora_A.keys()
        or module.lora_variant
        or any(
            type(part) is not nn.Linear or part.bias is not None for part in (*module.lora_A.values(), *module.lora_B.values())
        )
        or any(type(part) not in (nn.Identity, nn.Dropout) for part in module.lora_dropout.values())
    ):
        refuse(
            f"several adapters, one that this layer has not, variants of LoRA, its bias, or parts of other classes ({name})"
        )


def _weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer with its LoRA, dense."""
    if not hasattr(linear, "get_base_layer"):
        return linear.weight.detach().contiguous()
    weight = linear.get_base_layer().weight.detach()
    if not (linear.merged or linear.disable_adapters):
        weight = weight.float() + sum(linear.get_delta_weight(name).float() for name in linear.active_adapters)
    return weight.contiguous()


def _factors(linear: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """LoRA of a linear layer: A [r, inputs] and B [outputs, r], scaled; none without an adapter, or with one switched off."""
    if not hasattr(linear, "get_base_layer") or linear.disable_adapters:
        return []
    return [
        (linear.lora_A[name].weight.float(), linear.lora_B[name].weight.float() * linear.scaling[name])
        for name in linear.active_adapters
    ]


def _dense(values, dtype: torch.dtype, name: str) -> Tensor:
    """Values as the extension takes them: it checks shape and device, and that nothing was moved between devices."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    if dtype == torch.int64 and tensor.is_floating_point() and tensor.numel():  # an empty list is of floats
        raise PyargsError(f"{name} must be whole numbers, got {tensor.dtype}")
    return tensor.detach().to(dtype).contiguous()


def _ids(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device="cpu")


def _float(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


class _errors:
    """What the extension refuses, as a PyargsError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is RuntimeError:
            raise PyargsError(str(error)) from None


ROWS = 48
"""Tokens in a pass up to which its weights are read once (kTaskRows of csrc/stack/pass.h): what short responses share."""

PLACES = 512
"""Tokens that the cache holds for responses of one pass, each behind a copy of the prompt."""


@torch.no_grad()
def continuations(stack: Stack, groups, progress: str = "states") -> Iterator[tuple[Tensor, list[Tensor]]]:
    """States behind a prompt that is computed once: for each (prompt ids, [response ids]) the prompt's last state [1, D]
    ([0, D] of an empty prompt) and those of each response [T, D]. Short responses share a pass, and what a prompt begins with
    as the one before did is not computed again."""
    longest = max((len(prompt) + max(map(len, several), default=0) for prompt, several in groups), default=0)
    passes = [_together(several, PLACES // max(longest, 1)) for _, several in groups]
    cache = stack.cache(max((len(some) for parts in passes for some in parts), default=1), max(longest, 1))
    bar = progress_bar(groups, desc=progress, unit="prompt", hide=len(groups) < 32)
    before: Sequence[int] = []
    for (prompt, _), parts in zip(bar, passes, strict=True):
        cache.cut(known := shared(before, prompt))
        last = stack(_ids([prompt[known:]]), cache)[0, -1:] if prompt else _zeros(0, stack.dim)
        for row in range(1, max(map(len, parts), default=1)):
            cache.copy(row, 0, len(prompt))
        states, before = [], prompt
        for some in parts:
            cache.cut(len(prompt))
            lengths = [len(one) for one in some]
            ids = _ids([[*one, *[0] * (max(lengths) - len(one))] for one in some])
            mask = torch.tensor([[True] * n + [False] * (max(lengths) - n) for n in lengths], dtype=torch.bool, device="cpu")
            states += stack(ids, cache, mask)[mask].split(lengths)
        yield last, states


def shared(before: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens a prompt begins with as the one before did; never all, since its last state is wanted."""
    pairs = zip(before, prompt[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), max(len(prompt) - 1, 0)))


def _together(several: Sequence[Sequence[int]], most: int) -> list[list[Sequence[int]]]:
    """Responses, one after the other, that share a pass: `most`, of ROWS tokens in all; longer ones have one of their own."""
    parts: list[list[Sequence[int]]] = []
    for response in several:
        if parts and len(parts[-1]) < most and sum(map(len, parts[-1])) + len(response) <= ROWS:
            parts[-1].append(response)
        else:
            parts.append([response])
    return parts


def can_pack(model: nn.Module) -> bool:
    """Whether `pack` takes the model, and the machine has the memory for its weights once more."""
    if eager() or not has_extension:
        return False
    decoder, head = _parts(model)
    try:
        _check(decoder, head, decoder.get_input_embeddings().weight.dtype, structure(model))
    except PyargsError:
        return False
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    screen = 0 if head is None else head.weight.numel()
    return decoder in _stacks or 1.2 * (size + screen) < _available()


CGROUP = Path("/sys/fs/cgroup")


def _available() -> int:
    """Bytes that the machine has left, or fewer where a container may take less. The files that it has read give way."""
    left = [psutil.virtual_memory().available]
    for limit, used, stat, of in (  # control groups, version 2 and 1
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        with suppress(OSError, KeyError, ValueError):  # no such group, or its limit is "max"
            files = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            files = int(files[f"{of}active_file"]) + int(files[f"{of}inactive_file"])
            left.append(int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()) + files)
    return min(left)


_stacks: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()
"""By decoder: the state of it and its output layer, their stack, and by adapter its state and its stack on the same ones."""


def stack_of(model: nn.Module, adapter: nn.Module | None = None) -> Stack:
    """`pack(model, adapter)`, once for as long as the decoder lives and neither its modules nor any of its numbers change (all
    are read in each call); adapters share the packed weights.

    A stack with an output layer serves those who ask for none.
    """
    decoder, head = _parts(model)
    table = decoder.get_input_embeddings().weight  # it and the rotary embedding are what a stack goes on to read
    asked = (
        (structure(decoder), contents(decoder.parameters()), table.data_ptr(), id(getattr(decoder, "rotary_emb", None))),
        None if head is None else (structure(head), contents(p for p in head.parameters() if p is not table)),
    )
    kept, stack, twins = _stacks.get(decoder, (asked, None, None))
    if stack is None or any(one is not None and one != other for one, other in zip(asked, kept, strict=True)):
        _stacks.pop(decoder, None)
        stack = twins = None  # before the next one takes its memory
        stack, twins = pack(model), WeakKeyDictionary()
        _stacks[decoder] = asked, stack, twins
    if adapter is None:
        return stack
    own = [p for name, p in adapter.named_parameters() if ".lora_" in name]  # the others are the decoder's
    state = structure(adapter), contents(own)
    kept, twin = twins.get(adapter, (None, None))
    if kept != state:
        twin = _with_delta(stack, decoder, adapter)
        twins[adapter] = state, twin
    return twin


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The decoder, and the output layer of a causal language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder, None if decoder is model else model.get_output_embeddings()
