"""Packs the weights of a decoder of the Llama family (`FAMILIES`) into a stack; refuses what the stack cannot compute."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.bits import BITS, held, read_blocks
from pyargs.lm.stack.run import Stack, zeros
from pyargs.lm.structure import DROPPING, attention_of, logits_divisor, structure
from pyargs.ops.library import has_extension

MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Of a layer: what one product computes, as the linear layers of transformers."""

FAMILIES = "llama", "qwen2", "qwen3", "mistral", "granite", "smollm3"
"""Whose layers are Llama's, with norms of each head's queries and keys (Qwen3), scales (Granite), or layers without positions
(SmolLM3)."""

PANEL = 32  # kPanel of csrc/stack/pass.h
FLOATS = torch.float32, torch.bfloat16
DEPTHS = {torch.bfloat16: 2, "int8": 32}
"""The inputs of a packed weight are filled up with zeros to a multiple of these."""
SILU = ACT2CLS["silu"]
ROPE = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not change with the length of a text


@torch.no_grad()
def pack(model: nn.Module, adapter: nn.Module | None = None, *, dtype: torch.dtype | str | None = None) -> Stack:
    """A Stack with the weights of a causal language model of `FAMILIES`, or of the decoder in one.

    adapter: a decoder with the same weights and LoRA of pyargs.lm.lora; its LoRA becomes the delta, which each row of a pass
    has or not. LoRA in `model` itself is added to the weights.
    dtype: of the packed weights; the model's by default, or what it was loaded for (`pyargs.lm.bits`).
      float32
      bfloat16  inputs of the weights are rounded to bfloat16, too
      "int8"    eight bits, and a float16 scale for each 32 of an output's weights, by the largest of them (the grid of Q8_0 in
                GGUF files); inputs are rounded in the same way, with float32 scales. Sums of 32 products are exact.
      "file"    the blocks of the model's GGUF file, dequantised in registers: the same bits as float32. Where the layers of
                one product are of different types, float32.
    All else is float32.

    The model is not changed, and only its embedding stays in use. Raises PyargsError that names the part of the model that the
    stack cannot compute.
    """
    if not has_extension:
        raise PyargsError("the CPU stack needs the extension: pip install . with a C++ compiler at hand")
    from pyargs._C import Stack as Native

    decoder, head = parts_of(model)
    config = decoder.config
    embedding = decoder.get_input_embeddings().weight.detach()
    few = held(decoder)
    dtype = dtype or (few.dtype if few else embedding.dtype)
    check_supported(decoder, head, dtype, structure(model))
    blocks = read_blocks(few.file, decoder, head) if dtype == "file" else {}
    family = _family(decoder)

    heads, kv_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    sizes = dict(
        dim=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
        inner=inner,
        layers=len(decoder.layers),
        vocabulary=len(embedding),
    )
    inputs = "float32" if dtype == "file" else str(dtype).removeprefix("torch.")
    products = [[layer.get_submodule(name) for name in names] for layer in decoder.layers for names in MATRICES.values()]
    formats = [_format(linears, blocks) for linears in (*products, [head])] if dtype == "file" else []
    native = Native(inputs, *sizes.values(), head is not None, config.rms_norm_eps, formats)

    def put(layer: int, matrices: dict[str, list[nn.Module]]) -> None:
        parts = []
        for matrix, linears in matrices.items():
            places, columns = _places(linears, matrix)
            bias = zeros(columns)
            for linear, place in zip(linears, places, strict=True):
                block, weight = blocks.get(linear) or ("", _weight(linear))
                parts.append((matrix, int(place[0]), matrix == "gate_up", weight, block))
                if linear.bias is not None:
                    bias[place] = linear.bias.float()
            if any(linear.bias is not None for linear in linears):
                native.bias(layer, matrix, bias)
        native.pack(layer, parts)

    embedding_scale, scale, residual_scale = _scales(family, config, sizes["head_dim"])
    for number, layer in enumerate(decoder.layers):
        put(number, {matrix: [layer.get_submodule(name) for name in names] for matrix, names in MATRICES.items()})
        native.norms(number, _float(layer.input_layernorm.weight), _float(layer.post_attention_layernorm.weight))
        attention = layer.self_attn
        if norms := _head_norms(family, attention):
            native.head_norms(number, *(_float(norm.weight) for norm in norms))
        rotary = family != "smollm3" or bool(attention.use_rope)
        native.attention(number, scale, residual_scale, rotary)
    if head is not None:
        put(0, {"head": [head]})
    native.embedding(embedding, _float(decoder.norm.weight), embedding_scale)
    divisor = None if head is None else logits_divisor(model)
    stack = Stack(native, sizes, dtype, decoder.rotary_emb, embedding, divisor)
    return stack if adapter is None else with_delta(stack, decoder, adapter)


@torch.no_grad()
def with_delta(stack: Stack, decoder: nn.Module, adapter: nn.Module) -> Stack:
    """A second stack on the packed weights of `decoder`, with the adapter's LoRA as the delta."""
    adapter = adapter.get_decoder() if hasattr(adapter, "get_decoder") else adapter
    check_supported(adapter, None, torch.float32, structure(adapter))
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
                    low.append(nn.functional.pad(down, (0, -down.shape[1] % DEPTHS.get(stack._dtype, 1))))
                    high.append(zeros(len(down), columns))
                    high[-1][:, place] = up.T
            if low:
                a, b = torch.cat(low), torch.cat(high).unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()
                twin._native.delta(number, matrix, a, b)
    return twin


def _format(linears: list[nn.Module], blocks: dict) -> str:
    """How the weights of a product are packed with dtype "file". Blocks of different types are left out of `blocks`."""
    kinds = {blocks[linear][0] if linear in blocks else "" for linear in linears}
    if kinds == {"Q8_0"}:
        return "int8"
    if kinds <= {"Q4_0", "Q4_1"}:
        return "int4"
    for linear in linears:
        blocks.pop(linear, None)
    return "float32"


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


def check_supported(decoder: nn.Module, head: nn.Module | None, dtype: torch.dtype, found: dict) -> None:
    """Raises PyargsError for all that the stack would compute differently. found: the model's `structure`, which has refused
    modules that no library wrote."""
    config, embedding = decoder.config, decoder.get_input_embeddings()

    def refuse(what: str) -> None:
        raise PyargsError(f"the CPU stack does not do {what}: decode this model through transformers")

    family, written = _family(decoder), type(decoder).__module__
    if family not in FAMILIES:
        refuse(f"the architecture '{config.model_type}' (only transformers' own {', '.join(FAMILIES)})")
    if config.hidden_act != "silu":
        refuse(f"the activation '{config.hidden_act}' (only silu)")
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        refuse(f"{other[0]} layers (only full attention)")
    if family == "mistral" and config.sliding_window is not None:
        refuse("a sliding window (only full attention)")
    rotary = decoder.rotary_emb
    if rotary.rope_type not in ROPE:
        refuse(f"the rope scaling '{rotary.rope_type}' (only {', '.join(ROPE)})")
    if (attention := attention_of(config)) not in ("sdpa", "eager"):
        refuse(f"the attention '{attention}' (only sdpa and eager)")
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
    if dtype not in (*FLOATS, *BITS):
        refuse(f"packed weights of {dtype} (only float32, bfloat16, 'int8' and 'file')")
    if len(decoder.layers) > config.num_hidden_layers:
        refuse(f"{len(decoder.layers)} layers where the config says {config.num_hidden_layers}")
    for name, module in decoder.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            _lora(name, module, refuse)
    dim, inner, width = config.hidden_size, config.intermediate_size, decoder.layers[0].self_attn.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    shapes = (queries, dim), (keys, dim), (keys, dim), (dim, queries), (inner, dim), (inner, dim), (dim, inner)
    for number, layer in enumerate(decoder.layers):
        attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm, decoder.norm)
        heads = _head_norms(family, attention)
        kinds = {type(norm) for norm in (*norms, *heads)}
        if len(kinds) > 1 or any(
            type(part).__module__ != written for part in (layer, attention, layer.mlp, decoder.norm, rotary)
        ):
            refuse(f"parts of other classes (layer {number})")
        if any(norm.weight.shape != (width,) for norm in heads):
            refuse(f"norms of queries and keys of other sizes than a head's (layer {number})")
        if type(layer.mlp.act_fn) is not SILU:
            refuse(f"the activation {type(layer.mlp.act_fn).__name__} (layer {number}; only silu)")
        if family == "granite":
            scales = decoder.embedding_multiplier, attention.scaling, layer.residual_multiplier
        else:
            scales = 1.0, attention.scaling, 1.0
        if scales != _scales(family, config, width) or any(
            norm.variance_epsilon != config.rms_norm_eps for norm in (*norms, *heads)
        ):
            refuse(f"another scale, or another epsilon, than the config says (layer {number})")
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


def _family(decoder: nn.Module) -> str | None:
    """The family whose class of transformers computes the decoder, whatever its config says."""
    found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\1", type(decoder).__module__)
    return found and found[1]


def _scales(family: str, config, head_dim: int) -> tuple[float, float, float]:
    """What embeddings, scores of attention, and what a layer adds, are multiplied by."""
    if family == "granite":
        return config.embedding_multiplier, config.attention_multiplier, config.residual_multiplier
    return 1.0, head_dim**-0.5, 1.0


def _head_norms(family: str, attention: nn.Module) -> list[nn.Module]:
    """The norms of each head's queries and keys."""
    return [attention.q_norm, attention.k_norm] if family == "qwen3" else []


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


def _float(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The decoder, and the output layer of a causal language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder, None if decoder is model else model.get_output_embeddings()
