"""What is asked of a decoder, checked once: users, weights, stop tokens, vocabulary, noise. Both loops start from it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy
import torch
from torch import Tensor

from pyargs.errors import PyargsError
from pyargs.lm.forward import check_lengths
from pyargs.lm.loading import same_tokenizer
from pyargs.user_ids import user_ids


@dataclass(frozen=True)
class Request:
    """One row's wish.

    prompt: token ids. user: whose reward guides; "" where the model is the same for everyone. reward_weight: w of eq. 1, in
    raw units. num_candidates: k, or None for the whole vocabulary. temperature: 0 takes the best score, above it the choice is
    sampled from softmax(score / temperature). top_p, min_p: filters on the policy's candidates (1 and 0: none). stop: ids that
    end the answer. seed: of the sampling.
    """

    prompt: tuple[int, ...]
    user: str = ""
    reward_weight: float = 0.0
    num_candidates: int | None = 10
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()
    seed: int = 0


def noise(request: Request, steps: int) -> Tensor:
    """Uniform noise float32 [steps] of a row: of the request's own seed, so that it does not depend on other rows."""
    drawn = torch.zeros(steps, dtype=torch.float32, device="cpu")
    if request.temperature:
        rng = torch.Generator().manual_seed(request.seed)
        own = torch.rand(request.max_new_tokens, generator=rng, dtype=torch.float32, device="cpu")
        drawn[: request.max_new_tokens] = own
    return drawn


@dataclass
class BatchRequest:
    """B rows to decode. Tensors lie on the reward model's device, where the choice is made; the prompt on the policy's.

    input_ids, attention_mask int64 [B, T], padded on the left; user int64 [B]; weight float32 [B]; stop int64 [E];
    uniform float32 [max_new_tokens, B] for sampling, or None for greedy choice; num_candidates: None is all tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    user: Tensor
    weight: Tensor
    stop: Tensor
    pad_id: int
    num_candidates: int | None
    max_new_tokens: int
    vocabulary: int
    eos_reward: str
    prefix_mean: bool
    temperature: float | None
    uniform: Tensor | None
    token_callback: Callable[[Tensor], None] | None

    def step_weight(self, step: int | Tensor) -> Tensor:
        """Weight [B] of the candidates' own rewards at this step (a number, or int64 [1] on the device).

        The mean over the response so far differs between candidates only in their own share, 1 / (step + 1), so the plain
        head with the weight divided by that makes the same choice.
        """
        return self.weight / (step + 1) if self.prefix_mean else self.weight


def check(
    policy,
    reward_model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    users: Sequence[str],
    *,
    reward_weight: float | Sequence[float] | Tensor,
    num_candidates: int | None,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    do_sample: bool,
    temperature: float,
    seed: int | Sequence[int] | None,
    eos_reward: str,
    tokenizer,
    token_callback,
) -> BatchRequest:
    """The arguments of `args.generate` as a BatchRequest. Raises PyargsError naming what is wrong and how to mend it."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype != torch.long:
        raise PyargsError(f"input_ids must be an int64 tensor [B, T], got {_kind(input_ids)}")
    rows, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise PyargsError(f"attention_mask is {_kind(attention_mask)}, input_ids {_kind(input_ids)}: both must be [B, T]")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise PyargsError("attention_mask must hold 1 where a token counts and 0 where it pads, nothing else")
    attention_mask = attention_mask.long()
    if rows and not (length and (attention_mask[:, -1] == 1).all() and (attention_mask.diff(dim=1) >= 0).all()):
        raise PyargsError("prompts must be padded on the left (and not be empty): tokenizer.padding_side = 'left'")
    users = user_ids(users)
    if len(users) != rows:
        raise PyargsError(f"{rows} prompts but {len(users)} users: name one user for each row")
    weight = weights(reward_weight, rows)
    temperature = check_sampling(do_sample, temperature)
    if eos_reward not in ("before", "state"):
        raise PyargsError(f"eos_reward is 'before' or 'state', not {eos_reward!r}")
    if token_callback is not None and not callable(token_callback):
        raise PyargsError(f"token_callback must be a function of the step's tokens, not {token_callback!r}")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    seed = seeds(seed, rows)
    tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)  # `load_lm` leaves it there
    theirs = reward_model.tokenizer
    if tokenizer is None and theirs is not None and policy.name_or_path != reward_model.backbone.name_or_path:
        warnings.warn(
            "whether policy and reward model have the same tokenizer is not known: pass tokenizer= (the policy's) to check it",
            stacklevel=3,
        )
    if tokenizer is not None and theirs is not None and not same_tokenizer(tokenizer, theirs):
        raise PyargsError(
            "policy and reward model have different tokenizers, so candidates can not go from one to the other as ids: "
            "train the reward model on a backbone of the policy's family"
        )
    config = policy.config.get_text_config(decoder=True)
    vocabulary = min(config.vocab_size, len(tokenizer or theirs) if (tokenizer or theirs) is not None else config.vocab_size)
    if num_candidates is not None:
        num_candidates = whole("num_candidates", num_candidates, 1, min(64, vocabulary))
    for lm in (policy, reward_model.backbone) if rows else ():
        check_room(lm, int(attention_mask.sum(1).min()), length, max_new_tokens)
    eos, pad = stop_and_pad(policy, eos_token_id, pad_token_id)
    known = min(len(lm.get_input_embeddings().weight) for lm in (policy, reward_model.backbone))
    if vocabulary > known:
        raise PyargsError(
            f"the policy can choose among {vocabulary} tokens, but the reward model knows {known}: pass tokenizer= (the "
            "policy's) if the rest is padding, or take a reward model of the policy's family"
        )
    if not 0 <= pad < known:
        raise PyargsError(f"pad_token_id {pad} is no token of the models, which know {known}")
    if rows and not (0 <= input_ids.min() and input_ids.max() < known):
        raise PyargsError(f"input_ids hold tokens beyond the {known} that policy and reward model know")
    device = reward_model.device
    uniform = _noise(seed, rows, max_new_tokens).T.contiguous() if do_sample else None
    return BatchRequest(
        input_ids=input_ids.to(policy.device),
        attention_mask=attention_mask.to(policy.device),
        user=reward_model.users.rows(users).to(device),
        weight=weight.expand(rows).contiguous().to(device),
        stop=torch.tensor(eos, dtype=torch.long, device=device),
        pad_id=pad,
        num_candidates=num_candidates,
        max_new_tokens=max_new_tokens,
        vocabulary=vocabulary,
        eos_reward=eos_reward,
        prefix_mean=reward_model.step_reward == "prefix_mean",
        temperature=temperature,
        uniform=None if uniform is None else uniform.to(device),
        token_callback=token_callback,
    )


def whole(name: str, value, least: int, most: int | None = None) -> int:
    """value as an int: of Python, numpy or a tensor of one element, not a bool, and within the bounds."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise PyargsError(f"{name} must be a whole number, {bounds}, got {value!r}")
    return number


def number(name: str, value, least: float, most: float = math.inf, *, above: bool = False) -> float:
    """value as a float within the bounds, a bool excluded. above: it must be larger than `least`."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most and abs(value) < math.inf
    if not fits or (above and value == least):
        bounds = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        raise PyargsError(f"{name} must be a finite number, {bounds}, got {value!r}")
    return float(value)


def ids_of(prompts, known: int) -> list[list[int]]:
    """Prompts as lists of ids. Raises PyargsError for what is no token of a model that knows so many."""
    try:
        return [[whole("a token of a prompt", one, 0, known - 1) for one in prompt] for prompt in prompts]
    except TypeError:
        raise PyargsError(f"prompts are lists of token ids, one for each row, got {str(prompts)[:60]}") from None


def check_sampling(do_sample: bool, temperature) -> float | None:
    """The temperature, None for the greedy choice."""
    if not isinstance(do_sample, bool):
        raise PyargsError(f"do_sample is True or False, not {do_sample!r}")
    if not do_sample:
        return None
    if isinstance(temperature, Real) and not isinstance(temperature, bool) and 0 < temperature < math.inf:
        return float(temperature)
    raise PyargsError(
        f"temperature must be a finite number > 0, got {temperature!r}; for the greedy choice leave do_sample out"
    )


def check_length(max_new_tokens: int) -> None:
    whole("max_new_tokens", max_new_tokens, 1)


SEEDS = -(2**63), 2**64 - 1
"""What torch takes."""


def one_seed(seed) -> int | None:
    return None if seed is None else whole("seed", seed, *SEEDS)


def seeds(seed, rows: int) -> int | list[int] | None:
    """One seed of all rows, or one for each, as torch takes them."""
    if not _several(seed):
        return one_seed(seed)
    each = [whole("seed", one, *SEEDS) for one in seed]
    if len(each) != rows:
        raise PyargsError(f"{len(each)} seeds for {rows} rows: give one, or one for each row")
    return each


def numbered(seed: int, number: int) -> int:
    """The seed of the prompt of that number, whatever batch it is in; torch's largest is not exceeded."""
    return (seed * 1_000_003 + number) % 2**63


def weights(reward_weight, rows: int, name: str = "reward_weight") -> Tensor:
    """float32 [1] or [rows]. A negative weight is legal: it turns the reward round."""
    try:
        # numpy's floats are float64, torch's what the caller has set.
        given = reward_weight if isinstance(reward_weight, Tensor) else numpy.array(reward_weight)
        given = torch.as_tensor(given, device="cpu")
        weight = given.to(torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise PyargsError(f"{name} must be a number, or one for each row, got {reward_weight!r}") from None
    if given.dtype == torch.bool or given.is_complex() or given.ndim > 1:
        raise PyargsError(f"{name} must be a number, or one for each row, got {_kind(given)}")
    if len(weight) not in (1, rows):
        raise PyargsError(f"{name} has {len(weight)} values for {rows} rows: give one, or one for each row")
    if not torch.isfinite(weight).all():
        raise PyargsError(f"{name} must be finite in float32, got {reward_weight!r}")
    return weight


def _several(value) -> bool:
    """Whether it is a sequence, an array or a tensor of numbers; text is none."""
    return isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _kind(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_numbers(bad: Tensor) -> None:
    """Raises PyargsError that names the rows of bad bool [B] in which nothing could be chosen."""
    if rows := bad.nonzero().flatten().tolist():
        raise no_choice(f"row(s) {rows}")


def no_choice(where: str) -> PyargsError:
    return PyargsError(
        f"the policy's logits or the rewards are not numbers in {where}, or reward_weight times a reward is beyond float32: "
        "check the models' weights, or lower reward_weight"
    )


def check_room(lm, shortest: int, longest: int, new: int) -> None:
    """Raises PyargsError where prompts of these lengths and new tokens exceed the model's positions; calls `check_lengths`."""
    config = lm.config.get_text_config(decoder=True)
    room = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if room and longest + new > room:
        raise PyargsError(f"{longest} prompt + {new} new tokens exceed the {room} positions of {type(lm).__name__}")
    check_lengths(lm, shortest, longest + new)


def stop_tokens(lm, stop: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The ids that end an answer: what is given, else the model's own."""
    name, stop = ("eos_token_id", lm.generation_config.eos_token_id) if stop is None else ("stop", stop)
    return () if stop is None else tuple(whole(name, one, 0) for one in (stop if _several(stop) else [stop]))


def stop_and_pad(lm, eos: int | Sequence[int] | None = None, pad: int | None = None) -> tuple[list[int], int]:
    """Stop tokens and the padding token: what is given, else the model's own."""
    eos = lm.generation_config.eos_token_id if eos is None else eos
    eos = [] if eos is None else [whole("eos_token_id", one, 0) for one in (eos if _several(eos) else [eos])]
    return eos, whole("pad_token_id", next(i for i in (pad, lm.generation_config.pad_token_id, *eos, 0) if i is not None), 0)


def _noise(seed: int | list[int] | None, rows: int, steps: int) -> Tensor:
    """Uniform noise [rows, steps]. One seed per row makes a row's answer independent of the batch it is in."""
    if not isinstance(seed, list):
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.rand(rows, steps, generator=rng, dtype=torch.float32, device="cpu")
    each = [torch.rand(steps, generator=torch.Generator().manual_seed(one), dtype=torch.float32, device="cpu") for one in seed]
    return torch.stack(each) if each else torch.zeros(0, steps, dtype=torch.float32, device="cpu")


def as_float(x: Tensor) -> Tensor:
    """float64 models (tests) are rounded to float32, which the ops take; other types pass as they are."""
    return x.float() if x.dtype == torch.float64 else x
