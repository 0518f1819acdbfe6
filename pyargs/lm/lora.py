"""LoRA in a decoder, through PEFT: add, merge, disable, save, load. Base weights in memory are never changed."""

from __future__ import annotations

import copy
import re
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs.config import check_kinds
from pyargs.errors import PyargsError, described
from pyargs.files import read_json, read_tensors
from pyargs.lm import bits
from pyargs.lm.structure import as_written, base, structure

FILES = ("adapter_config.json", "adapter_model.safetensors")
SETTINGS = {"r": int, "lora_alpha": float, "use_rslora": bool, "lora_dropout": float, "target_modules": list[str]}
"""Settings that are read from an adapter's file."""
NOTES = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Settings that are ignored; all others must have PEFT's defaults."""
A = re.compile("lora_(embedding_)?A")
ARCHITECTURE = ("model_type", "rms_norm_eps", "layer_norm_eps", "rope_parameters", "num_attention_heads", "hidden_act")


def add(decoder: nn.Module, *, rank: int, alpha: float, rslora: bool, target_modules, dropout: float = 0.0) -> None:
    """Adds LoRA layers to the decoder, in place; only they are trainable. They are float32, also on a bfloat16 base.

    target_modules: names of layers, or ["all-linear"]; None: those that PEFT has for the model's family, or all linear ones
    where it has none. Raises PyargsError for a name that no layer of the decoder has.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from transformers.pytorch_utils import Conv1D

    kind = decoder.config.get_text_config(decoder=True).model_type
    linear = {name.rpartition(".")[2] for name, layer in decoder.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    if kind in ("mamba", "mamba2", "falcon_mamba"):
        linear -= {"out_proj"}  # whose weight their kernels take, LoRA or not: PEFT refuses it
    choices = f"Fix: --target-modules, of {', '.join(sorted(linear))}; or all-linear by itself"
    if target_modules == ["all-linear"]:
        target_modules = linear
    for name in target_modules or ():  # PEFT passes over one that it does not find beside others
        if not any(f".{place}".endswith(f".{name}") for place, _ in decoder.named_modules()):
            raise PyargsError(f"no LoRA for {kind} in {name}: it has no layer of that name. {choices}")
    chosen = target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, linear)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=sorted(chosen),
        base_model_name_or_path=decoder.config.name_or_path or None,
    )
    try:
        _inject(decoder, config)
    except ValueError as error:
        raise PyargsError(
            f"no LoRA for {kind} in {', '.join(sorted(chosen))}: {str(error).splitlines()[0]} {choices}"
        ) from error


def _inject(decoder: nn.Module, config, **more) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, decoder, **more)
    decoder.peft_config = {"default": config}
    for name, parameter in decoder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def twin(decoder: nn.Module) -> nn.Module:
    """A second decoder on the same weights in memory, to which LoRA can be added without changing the first."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in decoder.parameters()}
    made = copy.deepcopy(decoder, memo)
    bits.rests(made, decoder)
    return made


def weights(decoder: nn.Module) -> dict[str, Tensor]:
    """The LoRA weights under PEFT's names; empty without LoRA."""
    if not hasattr(decoder, "peft_config"):
        return {}
    from peft import get_peft_model_state_dict

    return {name: value.detach().contiguous() for name, value in get_peft_model_state_dict(decoder).items()}


def save(decoder: nn.Module, folder: Path) -> bool:
    """Writes PEFT's adapter files; False (and nothing written) without LoRA."""
    found = weights(decoder)
    if found:
        decoder.peft_config["default"].save_pretrained(folder)
        save_file(found, folder / FILES[1])
    return bool(found)


def load(decoder: nn.Module, folder: Path) -> None:
    """Puts the adapter of a folder into the decoder. Raises PyargsError when it is another adapter than `save` writes.

    Only `SETTINGS` are read from the file: other settings of PEFT can name modules to import, or methods that are not LoRA.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    file, settings = folder / FILES[0], read_json(folder / FILES[0])
    check_kinds(settings, SETTINGS, str(file))
    saved = read_tensors(folder / FILES[1])
    ranks = {value.shape[0] for name, value in saved.items() if A.search(name) and value.numel() and value.ndim}
    if ranks != {settings["r"]}:
        said = f"weights of rank {min(ranks)}" if ranks else "no weights"
        raise PyargsError(f"{file}: 'r' is {settings['r']}, but {FILES[1]} holds {said}")
    with described(f"{file} describes no LoRA adapter of this backbone"):
        place = decoder.config.name_or_path or None
        config = LoraConfig(**{name: settings[name] for name in SETTINGS}, base_model_name_or_path=place)
        ours = config.to_dict()
        for name, value in settings.items():
            if name not in SETTINGS and name not in NOTES and (value or None) != (ours.get(name) or None):  # PEFT fills in []
                raise PyargsError(f"{file}: '{name}' is {value!r}, which pyargs does not support: only plain LoRA")
        with torch.device("meta"):  # no memory before the sizes are compared
            _inject(trial := twin(decoder), copy.deepcopy(config), low_cpu_mem_usage=True)
        same_tensors(weights(trial), saved, folder / FILES[1])
        _inject(decoder, config)
    set_peft_model_state_dict(decoder, saved)


def same_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> None:
    """Raises PyargsError unless both hold tensors of the same names and shapes, the found ones of floating point."""
    if expected.keys() != found.keys():
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise PyargsError(f"{file} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, value in found.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise PyargsError(
                f"{file} does not fit: '{name}' is {value.dtype} {list(value.shape)}, not {list(expected[name].shape)}"
            )


def merge(decoder: nn.Module) -> None:
    """Adds LoRA to the float32 weights, so that a pass costs no more than the base model's; for decoding, not for training.

    The adapter is still what is saved. bfloat16 layers are not merged, since their weights are too coarse for the change, nor
    are layers with hooks on their LoRA, which would no longer be called.
    """
    for layer in layers_of(decoder):
        if layer.get_base_layer().weight.dtype == torch.float32 and as_written(layer):
            layer.merge(safe_merge=True)  # into new memory: another model may share the old


def active(decoder: nn.Module) -> bool:
    """Whether LoRA is computed in each pass: there are layers with it, and they are neither merged nor disabled."""
    return any(not (layer.merged or layer.disable_adapters) for layer in layers_of(decoder))


def linear_only(decoder: nn.Module) -> bool:
    """Whether all LoRA layers, if any, are linear layers with ordinary LoRA: no embeddings, no DoRA, no adapter that only some
    layers have."""
    from peft.tuners.lora import Linear

    return all(
        type(layer) is Linear and not layer.lora_variant and set(layer.active_adapters) <= layer.lora_A.keys()
        for layer in layers_of(decoder)
    )


def base_weights(decoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base model by the names they have without LoRA (merged LoRA is in them)."""
    every = [*decoder.named_parameters(), *decoder.named_buffers()]
    return {name.replace(".base_layer", ""): value for name, value in every if ".lora_" not in name}


def same_weights(decoder: nn.Module, other: nn.Module) -> bool:
    """Whether a decoder computes what the base model of `other` (LoRA left out) does: the same modules of libraries, and the
    same numbers in them. Shared memory is not compared."""
    try:
        if structure(decoder) != base(structure(other)):
            return False
    except PyargsError:
        return False
    ours = dict([*decoder.named_parameters(), *decoder.named_buffers()])
    theirs = base_weights(other)
    return ours.keys() == theirs.keys() and all(_equal(value, theirs[name]) for name, value in ours.items())


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.dtype != other.dtype:
        return False
    same_memory = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    return same_memory or torch.equal(one, other)


@contextmanager
def on_second(decoder: nn.Module):
    """Within it LoRA acts only on the rows 1, 3, 5, ... of a batch [B, n, D]; the others see the base model.

    For `linear_only` decoders, and without gradients. One thread at a time; passes of other threads do not change.
    """
    layers, last = layers_of(decoder), []
    with _splitting:
        for layer in layers:
            layer.forward = partial(_forward_on_second, layer, threading.get_ident(), last)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


_splitting = threading.Lock()


def _forward_on_second(layer, thread: int, last: list, x: Tensor) -> Tensor:
    if threading.get_ident() != thread:
        return type(layer).forward(layer, x)
    result = layer.base_layer(x)
    for name in layer.active_adapters:
        low = layer.lora_A[name]
        part = low(layer.lora_dropout[name](_second(x, low.weight.dtype, last)))
        result[1::2].add_(layer.lora_B[name](part), alpha=layer.scaling[name])  # in float32, then rounded as `result` is
    return result


def _second(x: Tensor, dtype: torch.dtype, last: list) -> Tensor:
    """The rows 1, 3, 5, ... of x in this dtype, copied once for layers that read the same x. last: that of the call before."""
    now = x._version, dtype  # the version counts what is written to it
    if not last or last[0] is not x or last[1] != now:
        last[:] = x, now, x[1::2].to(dtype).contiguous()
    return last[2]


@contextmanager
def disabled(decoder: nn.Module):
    """Within it the decoder is the base model, as before training."""
    layers = layers_of(decoder)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def present(model: nn.Module) -> bool:
    """Whether there is LoRA in the model, merged or disabled LoRA included."""
    return len(layers_of(model)) > 0


def layers_of(model: nn.Module) -> list:
    """The layers with LoRA, merged and switched-off ones too."""
    from peft.tuners.lora import LoraLayer

    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
