"""Which code computes the passes: `cpu` (the CPU stack), `cuda_graph` (a captured step), or `eager` (transformers itself,
with `copies` for models in which candidates cannot share a prefix). Chosen once, by name."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from transformers.modeling_layers import GradientCheckpointingLayer

from pyargs.decode.args import Guided, Two
from pyargs.decode.backends import copies, cpu, cuda_graph, eager, texts
from pyargs.decode.genarm import Tokenwise
from pyargs.decode.request import positions
from pyargs.decode.steps import Steps
from pyargs.decode.unguided import Alone
from pyargs.errors import PyargsError
from pyargs.lm.bits import held
from pyargs.lm.cache import can_branch
from pyargs.lm.called import Called
from pyargs.lm.forward import border, plain_output_layer
from pyargs.lm.stack import keep
from pyargs.lm.structure import BACKENDS, as_written, asked_backend, dropping
from pyargs.models.token_reward import TokenReward


class Backend(NamedTuple):
    """name: "cpu", "cuda-graph" or "eager"; reason: why this one; shared: whether candidates share their row's prefix."""

    name: str
    reason: str
    shared: bool = True


def resolve(asked: str, *models, guide=None, by_text: bool = False) -> Backend:
    """The backend for language models (of policy and reward model). PYARGS_BACKEND overrides `asked`.

    guide: the RewardModel or TokenReward that guides, where one does. by_text: it reads texts that the host makes.

    Raises PyargsError for an unknown name, and for one that cannot compute these models, with the reason.
    """
    asked = asked_backend() or asked
    if asked not in BACKENDS:
        raise PyargsError(f"backend is {', '.join(BACKENDS)}, not {asked!r}")
    if place := next(filter(None, map(dropping, models)), None):
        raise PyargsError(f"{place} drops numbers at random, as in training: call eval() on the model first")
    if asked in ("auto", "cpu"):
        why = next(filter(None, (keep.refusal(model) for model in models)), None)
        with_logits = [model for model in models if model.get_output_embeddings() is not None]
        if why is None and not all(map(plain_output_layer, with_logits)):
            why = "a model's logits are more than its output layer's (soft cap, scale, or a hook on the model itself)"
        if why is None:
            return Backend("cpu", "the CPU stack computes these models")
        if asked == "cpu":
            raise PyargsError(f"backend='cpu' cannot compute this: {why}. Take backend='eager', or 'auto'")
    else:
        why = "PYARGS_BACKEND asks for it" if asked_backend() else "it was asked for"
    if few := next(filter(None, map(held, models)), None):
        raise PyargsError(f"dtype={few.dtype!r} is for the CPU stack alone, and backend={asked!r} cannot have it here: {why}")
    if any(map(without_cache, models)):
        raise PyargsError("gradient checkpointing drops the cache of a model in training mode: call eval() on the model first")
    if asked in ("auto", "cuda-graph"):
        refused = cuda_graph.refusal(guide, *models, by_text=by_text)
        if refused is None:
            return Backend("cuda-graph", "policy and reward model are on one GPU: a step is captured and replayed")
        if asked == "cuda-graph":
            raise PyargsError(f"backend='cuda-graph' cannot compute this: {refused}. Take backend='eager', or 'auto'")
        if any(model.device.type == "cuda" for model in models):
            why = f"{why}; not captured: {refused}"
    if not as_written(*models):
        return Backend("eager", f"{why}; hooks or replaced modules: each candidate behind a copy of the cache", False)
    if not all(map(can_branch, models)):
        warnings.warn(
            "policy or reward model has layers in which candidates can not share a prefix (sliding window, linear attention, "
            "state space, or attention without masks): decoding with k copies of the reward model's cache, which is slower",
            stacklevel=3,
        )
        return Backend("eager", f"{why}; candidates cannot share a prefix: each behind a copy of the cache", False)
    return Backend("eager", why)


def without_cache(model) -> bool:
    """Whether its layers leave the cache out: an older transformers does so for any pass in training mode."""
    later = "__call__" not in vars(GradientCheckpointingLayer)
    return not later and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def policy(backend: Backend, lm, room: int, vocabulary: int):
    """Passes of a language model by itself, for `room` rows."""
    if backend.name == "cpu":
        return cpu.Policy(lm, room, vocabulary)
    return (eager if backend.shared else copies).Policy(lm, room)


def scorer(backend: Backend, backbone, room: int):
    """Passes of a reward model's backbone."""
    if backend.name == "cpu":
        return cpu.Scorer(backbone, room)
    return (eager if backend.shared else copies).Scorer(backbone, room)


def reader(backbone, bridge, room: int) -> texts.Scorer:
    """The reward model's half where it reads texts of its own."""
    if isinstance(backbone, Called):
        return texts.Scorer(backbone.states_of, bridge)
    if place := dropping(backbone):
        raise PyargsError(f"{place} drops numbers at random, as in training: call eval() on the model first")
    most = positions(backbone)
    if as_written(backbone) and can_branch(backbone) and border(backbone) is None:
        return texts.Kept(backbone, room, bridge, most)
    warnings.warn(
        "the reward model keeps nothing of a text that its tokenizer may cut otherwise at the next token (sliding window, "
        "state space, longrope, hooks): each candidate's whole text is read at each step, which is slow",
        stacklevel=4,
    )
    return texts.Scorer(texts.one_by_one(backbone), bridge, most)


def passes_of(backend: Backend, lm, backbone, room: int, vocabulary: int, k: int):
    """Passes of a policy and a reward model, in one where they rest on the same weights and that is faster."""
    if backend.name == "cpu" and cpu.shares(lm, backbone):
        return cpu.Shared(lm, backbone, room, vocabulary)
    if backend.name != "cpu" and backend.shared and eager.shares(lm, backbone, room, k):
        return eager.Shared(lm, backbone, room)
    return Two(policy(backend, lm, room, vocabulary), scorer(backend, backbone, room))


def steps(backend: Backend, pair, room: int, eos_reward: str, adjust=None):
    """The steps of a `Pair`, for `room` rows. adjust: as of `Rows`."""
    models, sizes = pair.language_models(), dict(vocabulary=pair.vocabulary, room=room, adjust=adjust)
    if not pair.guided:
        passes = policy(backend, pair.policy, room, pair.vocabulary)
        return Steps(Alone(passes, device=pair.policy.device, soft=getattr(pair.model, "soft", None), **sizes))
    if isinstance(pair.model, TokenReward):
        halves = (policy(backend, lm, room, pair.vocabulary) for lm in models)
        rows = Tokenwise(*halves, device=pair.model.device, **sizes)
    else:
        if pair.by_text:
            passes = Two(policy(backend, pair.policy, room, pair.vocabulary), reader(pair.model.backbone, pair.bridge, room))
        else:
            passes = passes_of(backend, *models, room, pair.vocabulary, 10)
        rows = Guided(passes, pair.model, eos_reward=eos_reward, **sizes)
    return cuda_graph.Captured(rows, *models) if backend.name == "cuda-graph" else Steps(rows)
