"""Whether a fast path may stand in for a model's modules: what they are is read again at every call.

A fast path computes a model without calling its modules (the CPU stack), calls those of another model with the same
weights (one pass for two), keeps what they did (a captured step), or shows them tokens side by side (candidates, packed
responses). That is right for modules as their library wrote them. A hook, a replaced `forward`, a subclass or a
parametrization may do anything: with one of these anywhere the model's own modules are called.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from functools import partial
from importlib.util import find_spec
from inspect import isfunction
from itertools import chain
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
import xxhash
from torch import Tensor, nn
from torch.jit._state import _try_get_jit_cached_function
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyargs.errors import PyargsError
from pyargs.ops.library import has_extension

BACKENDS = ("auto", "cpu", "cuda-graph", "eager")
LIBRARIES = ("torch.nn.", "transformers.", "peft.", "pyargs.")
FOLDERS = tuple(
    os.path.join(folder, "")
    for name in ("torch", "transformers", "peft", "pyargs")
    for folder in find_spec(name).submodule_search_locations
) + (contextlib.__file__,)  # the wrapper of a generator; what it wraps is looked at, too
HARMLESS = ("output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad")
"""Hooks of transformers and PEFT that stay on a model which was asked for hidden states, or trained with checkpointing: they
change no number."""

BUILTIN = ("gelu", "linear", "scaled_dot_product_attention")
WRITTEN = ("embedding", "layer_norm", "rms_norm", "silu", "softmax")
"""Of torch.nn.functional: what modules call."""

PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
TENSORS = (nn.Parameter, Tensor, nn.Buffer, type(None))
IDLE = ("gradient_checkpointing", "name_or_path", "tokenizer", "generation_config", "peft_config", "ids", "trained")
OTHERS = {*vars(nn.Module()), *IDLE}
"""Attributes of modules that no pass depends on."""

LABELS = {"_name_or_path", "_commit_hash", "architectures", "transformers_version", "dtype", "use_cache"}
"""The same of a config."""


def eager() -> bool:
    """Whether PYARGS_BACKEND=eager asks to call the models' own modules everywhere. Read at every call."""
    return asked_backend() == "eager"


def asked_backend() -> str | None:
    """What PYARGS_BACKEND names, None where it is not set."""
    name = os.environ.get("PYARGS_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise PyargsError(f"PYARGS_BACKEND is {', '.join(BACKENDS)}, not '{name}'")
    return name


def may_replace(*models: nn.Module) -> bool:
    """Whether fast paths may stand in for these models: `structure` takes them all, and PYARGS_BACKEND is not "eager"."""
    return not eager() and as_written(*models)


def as_written(*models: nn.Module) -> bool:
    """Whether `structure` takes all these models."""
    try:
        for model in models:
            structure(model)
    except PyargsError:
        return False
    return True


def structure(model: nn.Module, *, below: bool = True) -> dict:
    """By name of each module its class and attributes: all that a pass depends on but parameters and buffers (`contents`).

    Two that are equal compute the same from the same weights. What PEFT's LoRA adds stands under names with a "+", so that
    the others are those of the base model. below=False: of the outermost module alone.
    Raises PyargsError that names the first module that is not as its library wrote it.
    """
    _check_surroundings()
    found: dict = {}
    names: dict[int, str] = {}  # a module or a config that stands in several places is described once
    kinds: set[type] = set()
    owners: set[type] = set()
    left = [("", model)]
    while left:
        name, module = left.pop()
        if id(module) in names:
            found[name] = names[id(module)]
            continue
        names[id(module)] = name
        own, kind = vars(module), type(module)
        if kind not in kinds:
            _check_class(kind, name, owners)
            kinds.add(kind)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            _check_hooks(module, name)
        compiled = own.get("_compiled_call_impl")  # by module.compile()
        if (compiled and not _known(compiled)) or not _functions(kind).isdisjoint(own) and not _ours(own.get("forward")):
            raise PyargsError(f"{_place(name)} has a function of its own in the place of one of its class")
        described: list = [kind]
        drops = False
        for key in sorted(own.keys() - OTHERS):
            value = own[key]
            if key[0] == "_" or key == "forward" and _ours(value):
                continue
            if isinstance(value, PreTrainedConfig):
                if id(value) not in names:
                    names[id(value)] = name
                    described.append(_config(value, name))
                    drops |= any("drop" in setting and bool(number) for setting, number in vars(value).items())
                value = names[id(value)]
            elif type(value) not in PLAIN:
                value = _described(value, name, key)
            elif _drops(module, key, value):
                drops = True
            described.append((key, value))
        if drops and module.training:
            described.append(DROPPING)
        for tensors in (own["_parameters"], own["_buffers"]):
            for key, tensor in tensors.items():
                if type(tensor) not in TENSORS:
                    raise PyargsError(f"{_place(name)} has a {key} of class {type(tensor).__name__}")
        adapted = "base_layer" in own["_modules"]
        if adapted:
            described.append((list(module.active_adapters), module.disable_adapters))
        found[f"{name}+" if adapted else name] = described
        if below:
            for key, child in own["_modules"].items():
                if child is not None:
                    left.append((name if key == "base_layer" else f"{name}+{key}" if adapted else f"{name}.{key}", child))
    return found


def outline(model: nn.Module) -> list[tuple]:
    """By place of each module which one it is, its class, and its attributes that are numbers or words: less than `structure`,
    for any model, and in less than a millisecond."""
    first: dict[int, str] = {}
    return [
        (
            name,
            first.setdefault(id(module), name),
            type(module),
            [
                (key, value)
                for key, value in vars(module).items()
                if type(value) in PLAIN and key[0] != "_" and key not in OTHERS
            ],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def dropping(model: nn.Module) -> str | None:
    """Where a model in training mode drops numbers at random, None where it does not."""
    for name, module in model.named_modules():
        if module.training and any(_drops(module, key, value) for key, value in vars(module).items()):
            return _place(name)
    return None


def _drops(module: nn.Module, key: str, value) -> bool:
    """Whether an attribute of a module is the rate of a dropout."""
    named = "drop" in key or (key == "p" and "dropout" in type(module).__module__)
    return named and type(value) in PLAIN and bool(value)


DROPPING = "dropout in training mode"


def base(found: dict) -> dict:
    """Of a structure: what the base model has, LoRA left out."""
    return {name: described for name, described in found.items() if "+" not in name}


def logits_divisor(model: nn.Module) -> float:
    """What the model's config divides the numbers of its output layer by (Granite's `logits_scaling`); 1.0 by default."""
    return getattr(model.get_decoder().config, "logits_scaling", None) or 1.0


def contents(tensors: Iterable[Tensor]) -> list[bytes]:
    """A hash of each tensor's numbers. It reads all of them, which takes about as long as a decode step of one row."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(_hash, tensors))


def _hash(tensor: Tensor) -> bytes:
    return xxhash.xxh3_64_digest(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside a wrapper of torch.compile or of PEFT's `get_peft_model`.

    Raises PyargsError where the wrapper changes results: PEFT's virtual tokens, routers over adapters, hooks on the wrapper.
    """
    while True:
        outer, inner = [model], model._modules.get("_orig_mod")
        if type(model).__module__ == "peft.peft_model":
            from peft.tuners.tuners_utils import BaseTuner

            outer, inner = [model, model.base_model], model.get_base_model()
            if getattr(type(model.base_model), "forward", None) is not BaseTuner.forward:
                raise PyargsError(
                    f"PEFT's {model.peft_type.value} acts outside the model's layers (virtual tokens, routers), where pyargs "
                    "does not see it: take LoRA, or a UserPolicy for soft prompts"
                )
        if inner is None:
            return model
        if any(one._forward_hooks or one._forward_pre_hooks for one in outer):
            raise PyargsError(f"a hook on a {type(model).__name__} would be passed by: register it on the model within")
        model = inner


def check_whole(model: nn.Module) -> None:
    """Raises PyargsError for a model of which this process does not hold all weights: parts lie in other processes, which
    would have to step together, or on the disk or the host, from where they come and go within a pass."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    several = (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    )
    if several and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        raise PyargsError(
            "the weights lie in parts on several processes (FSDP, ZeRO-3), and rows do not step together there: gather them "
            "first, or decode with one process each"
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise PyargsError(
            "device_map has put weights on the disk or the host, from where they come and go within each pass. Fix: a "
            "device_map over GPUs that hold them all, dtype 'bfloat16', or a smaller model"
        )


# -- the parts of `structure` ------------------------------------------------------------------------------------------


def _check_surroundings() -> None:
    """Raises PyargsError for what changes all modules at once."""
    if nn_module._has_any_global_hook():
        raise PyargsError("there are hooks on all modules (torch.nn.modules.module.register_module_forward_hook)")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise PyargsError("torch.autocast is on")
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
        if other := [mode for mode in modes if type(mode) is not DeviceContext]:
            raise PyargsError(f"a {type(other[0]).__name__} acts on all operators")
    replaced = [name for name in BUILTIN if getattr(F, name) is not getattr(torch._C._nn, name)]
    if replaced or not all(_known(getattr(F, name)) for name in WRITTEN):
        raise PyargsError("functions of torch.nn.functional are replaced")


def _check_class(kind: type, name: str, owners: set[type]) -> None:
    """Raises PyargsError unless a class and the functions of its layers are those of a library's files. owners: those seen."""
    file = sys.modules.get(kind.__module__)
    wrapper = kind.__module__.startswith("peft.") and kind.__module__.endswith("model")  # PeftModel, LoraModel: `unwrapped`
    if wrapper or not f"{kind.__module__}.".startswith(LIBRARIES) or getattr(file, kind.__name__, None) is not kind:
        raise PyargsError(
            f"{_place(name)} is of class {kind.__name__}, which is none of torch.nn, transformers, PEFT or pyargs"
        )
    for owner in kind.__mro__[:-1]:
        if owner in owners:
            continue
        owners.add(owner)
        of_layers = owner is not nn.Module and owner.__module__.startswith(LAYERS)
        for key in vars(owner) if of_layers else vars(owner).keys() & CALLED:
            value = vars(owner)[key]
            value = value.fget if type(value) is property else getattr(value, "__func__", value)
            moved = key in CALLED and of_layers and getattr(value, "__qualname__", "") != f"{owner.__name__}.{key}"
            if moved or _foreign(value):
                raise PyargsError(f"{key} of {owner.__name__} is replaced ({_place(name)})")
    if kind.__module__.startswith("transformers.models."):
        for key, value in vars(file).items():
            if _foreign(value):
                raise PyargsError(f"{key} of {kind.__module__} is replaced")


CALLED = {"forward", "__call__", "_call_impl", "__getattr__", "__getattribute__"}
"""Through which every module is called and its parts are found."""

LAYERS = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "peft.",
    "pyargs.",
)
"""Where classes are written of which every function counts."""

WITHOUT_CODE = (type(once(bool)), torch.jit.ScriptFunction)
"""What takes the place of a function that it was given, and has no code of its own in Python."""


def _foreign(value) -> bool:
    """Whether what stands in a class or a file is called like a function, but is none that a library wrote there."""
    if isinstance(value, type) or not callable(value):
        return False
    others = (
        type(value).__module__ in ("typing", "pyargs.lm.fused_modules") or getattr(value, "__module__", None) == "dataclasses"
    )
    return not (others or _known(value))


def _known(function) -> bool:
    """Whether a function and all that it wraps come from a library's files."""
    while True:
        within, code = _within(function), getattr(function, "__code__", None)
        if type(function) not in WITHOUT_CODE and (code is None or not code.co_filename.startswith(FOLDERS)):
            return False
        if within is None:
            return code is not None
        function = within


def _within(function):
    """What a decorator or `torch.jit.script` was given; None of what was traced, which is right for one example's shapes."""
    if type(function) is not torch.jit.ScriptFunction:
        return getattr(function, "__wrapped__", None)
    given = getattr(function, "_torchdynamo_inline", None)
    scripted = None if given is None else _try_get_jit_cached_function(given)
    return None if scripted is None or scripted.qualified_name != function.qualified_name else given


@once
def _functions(kind: type) -> frozenset[str]:
    """Names of the functions of a class: an attribute of such a name hides one."""
    return frozenset(name for name in dir(kind) if isfunction(getattr(kind, name, None)))


def _ours(forward) -> bool:
    """Whether it is what pyargs puts there for the time of one pass in one thread: the others' passes are as ever."""
    ours = "pyargs.lm.lora", "pyargs.lm.fused_modules", "pyargs.lm.rotary_table"
    return type(forward) is partial and forward.func.__module__ in ours


def _check_hooks(module: nn.Module, name: str) -> None:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(getattr(hook, "__name__", None) not in HARMLESS or not _known(hook) for hook in hooks):
        raise PyargsError(f"{_place(name)} has a hook")


def _config(config: PreTrainedConfig, name: str) -> str:
    attention = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if not (attention is None or _known(attention) or type(attention).__module__ == "pyargs.lm.fused_modules"):
        raise PyargsError(f"{_place(name)} has an attention of another's ({config._attn_implementation})")
    values = {key: value for key, value in vars(config).items() if key not in LABELS}
    return repr(values | {"_attn_implementation_internal": attention_of(config)})


GROUPED = "pyargs_grouped"
"""How the names begin of `fused_modules`' attention, which stands in a config while a thread records a step."""


def attention_of(config: PreTrainedConfig) -> str:
    """The attention that a config names, "sdpa" where another thread has put GROUPED in its place."""
    name = config._attn_implementation
    return "sdpa" if (name or "").startswith(GROUPED) else name


def _described(value, name: str, key: str):
    """An attribute of other type than numbers and words, as something that can be compared."""
    if isinstance(value, (list, tuple, dict, set)):
        return repr(value)
    if isinstance(value, Tensor):
        return _hash(value)
    if type(value) is partial:
        return _described(value.func, name, key), repr(value.args), repr(value.keywords)
    if type(value) in WITHOUT_CODE and _known(value):
        return _described(_within(value), name, key)
    if type(value) is not BuiltinFunctionType and not type(value).__module__.startswith(LIBRARIES) and _foreign(value):
        raise PyargsError(f"{key} of {_place(name)} is a function of another's")
    if type(value) in (FunctionType, BuiltinFunctionType, MethodType):
        return value.__module__, value.__qualname__
    return type(value)


def _place(name: str) -> str:
    return f"module '{name.strip('.')}'" if name else "the model"


VERSION = attrgetter("_version")
PROBING = threading.RLock()
"""Held while a model is tried with a hook of ours on it, which is no change of the model."""


class Watch:
    """Notices, in a fraction of a millisecond, that models are no longer what they were: hooks, replaced modules or functions,
    weights that were exchanged or changed in place. What was changed through `.data` is not seen here, but by `contents`.

    but: a module in these models that may change (a head's table of users)."""

    def __init__(self, *models: nn.Module, but: nn.Module | None = None):
        left = set() if but is None else set(map(id, but.modules()))
        found = {id(module): module for model in models for module in model.modules()}
        modules = [module for key, module in found.items() if key not in left]
        still = [module for module in modules if not _writes_to_itself(module)]
        self.parts = [module._modules for module in modules]
        self.parts += [part for module in still for part in (module._parameters, module._buffers)]
        self.filled = [part for part in self.parts if part]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.dicts = self.parts + self.hooks
        self.own = [vars(module) for module in modules]
        self.adapters = [own for own in self.own if "scaling" in own and "_disable_adapters" in own]
        self.held = self._held()
        self.tensors = [one for one in self.held if isinstance(one, Tensor)]
        self.counted = [one for one in self.tensors if not one.is_inference()]
        self.before, self.glanced = self._look(), self._glance()

    def changed(self) -> bool:
        with PROBING:
            glanced = self._glance()
            if glanced is not None and glanced == self.glanced:
                return False
            try:
                # The same objects are equal without a look.
                if self._held() != self.held or self._look() != self.before:
                    return True
            except RuntimeError:  # another tensor stands there, which is compared by its numbers
                return True
            self.glanced = glanced  # a pass in another thread has its own `forward` there
            return False

    def _held(self) -> list:
        return list(chain.from_iterable(map(dict.values, self.filled)))

    def _look(self) -> tuple:
        return (
            list(map(len, self.parts)),
            list(chain.from_iterable(map(dict.values, self.hooks))),
            ["forward" in own and not _ours(own["forward"]) for own in self.own],
            [own.get("training", False) for own in self.own],
            self._scaling(),
            self._tensors(),
            nn_module._has_any_global_hook(),
        )

    def _glance(self) -> tuple | None:
        """A faster look, which may differ where a full look does not. None without the extension."""
        if not has_extension:
            return None
        from pyargs._C import glance

        objects = glance(self.dicts, self.own, ("forward", "training"))
        return objects, self._scaling(), self._tensors(), nn_module._has_any_global_hook()

    def _scaling(self) -> list:
        return [(own["scaling"].copy(), own["_disable_adapters"]) for own in self.adapters]

    def _tensors(self) -> tuple:
        return sum(map(VERSION, self.counted)), list(map(Tensor.data_ptr, self.tensors))


def _writes_to_itself(module: nn.Module) -> bool:
    """Whether a pass changes the module's own tensors: embeddings that norm themselves, rotary ones that follow the length."""
    return getattr(module, "max_norm", None) is not None or any(
        name in str(getattr(module, "rope_type", "")) for name in ("dynamic", "longrope")
    )
