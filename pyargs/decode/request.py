"""A request to the decoder, its noise, and the checks of its values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy
import torch
from torch import Tensor

from pyargs.errors import PyargsError
from pyargs.lm.forward import check_lengths


@dataclass(frozen=True)
class Request:
    """What one row asks for.

    prompt: token ids. user: whose reward guides; "" where the model is the same for everyone. reward_weight: w of eq. 1, in
    raw units. reward_clip: c > 0 clips rewards so that |w r| <= c, None does not. num_candidates: k, or None for the whole
    vocabulary. temperature: 0 takes the best score, above it the choice is sampled from softmax(score / temperature). top_p,
    min_p: filters on the policy's candidates (1 and 0: none). stop: ids that end the answer. seed: of the sampling. logprobs:
    how many of the policy's likeliest tokens are told at each step. adjust: changes the policy's logits, see `decode.adjust`.
    theirs: the prompt as ids of a reward model with another tokenizer.
    """

    prompt: tuple[int, ...]
    user: str = ""
    reward_weight: float = 0.0
    reward_clip: float | None = None
    num_candidates: int | None = 10
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int = 0
    adjust: Callable | None = None
    theirs: tuple[int, ...] | None = None


def bounds(request: Request) -> tuple[float, float]:
    """c / |w|, to which a request's rewards are clipped, and how far behind the best log-prob a candidate can still win.

    Of two candidates whose |w r| are at most c, one that is more than 2 c behind has no better score, and of equal scores the
    first one wins. That holds for float32 scores, too: rounding keeps order, and c is taken a last bit larger. inf without a
    clip, and of the second where a row samples.
    """
    weight, most = abs(numpy.float32(request.reward_weight)), numpy.finfo(numpy.float32).max
    if request.reward_clip is None:
        return math.inf, math.inf
    if not weight:
        return math.inf, math.inf if request.temperature else 0.0
    with numpy.errstate(over="ignore"):
        limit = min(numpy.float32(request.reward_clip) / weight, most)
        largest = numpy.nextafter(weight * limit, numpy.float32(math.inf))
    return float(limit), math.inf if request.temperature else 2.0 * float(largest)


def noise(request: Request, steps: int) -> Tensor:
    """Uniform noise float32 [steps] of a row: of the request's own seed, so that it does not depend on other rows."""
    drawn = torch.zeros(steps, dtype=torch.float32, device="cpu")
    if request.temperature:
        rng = torch.Generator().manual_seed(request.seed)
        own = torch.rand(request.max_new_tokens, generator=rng, dtype=torch.float32, device="cpu")
        drawn[: request.max_new_tokens] = own
    return drawn


def integer(name: str, value, least: int, most: int | None = None) -> int:
    """value as an int. Raises PyargsError unless it is an integer (of Python, numpy or a tensor of one) within the bounds."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise PyargsError(f"{name} must be a whole number, {bounds}, got {value!r}")
    return number


def number(name: str, value, least: float, most: float = math.inf, *, above: bool = False) -> float:
    """value as a float. Raises PyargsError for a bool and outside the bounds. above: it must be larger than `least`."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most and abs(value) < math.inf
    if not fits or (above and value == least):
        bounds = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        raise PyargsError(f"{name} must be a finite number, {bounds}, got {value!r}")
    return float(value)


def ids_of(prompts, known: int) -> list[list[int]]:
    """Prompts as lists of ids. Raises PyargsError for an id that is not 0 to known - 1."""
    try:
        return [[integer("a token id", one, 0, known - 1) for one in prompt] for prompt in prompts]
    except TypeError:
        raise PyargsError(f"a prompt is a str, messages, or a list of token ids, got {str(prompts)[:60]}") from None


def sampling_temperature(temperature) -> float:
    """The temperature of a sampled choice, as a float. Raises PyargsError unless it is finite and above 0."""
    if isinstance(temperature, Real) and not isinstance(temperature, bool) and 0 < temperature < math.inf:
        return float(temperature)
    raise PyargsError(
        f"temperature must be a finite number > 0, got {temperature!r}; for the greedy choice leave do_sample out"
    )


SEEDS = -(2**63), 2**64 - 1
"""The least and the largest seed of torch."""


def seeds(seed, rows: int) -> int | list[int] | None:
    """One seed of all rows, or one for each, as torch takes them."""
    if not _several(seed):
        return None if seed is None else integer("seed", seed, *SEEDS)
    each = [integer("seed", one, *SEEDS) for one in seed]
    if len(each) != rows:
        raise PyargsError(f"{len(each)} seeds for {rows} rows: give one, or one for each row")
    return each


def numbered(seed: int, number: int) -> int:
    """The seed of prompt `number` of a call, which does not depend on how prompts are batched."""
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
    """Whether it is a sequence, an array or a tensor of numbers; a str is not."""
    return isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _kind(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_numbers(bad: Tensor) -> None:
    """Raises PyargsError that names the rows of bad bool [B] in which nothing could be chosen."""
    if rows := bad.nonzero().flatten().tolist():
        raise no_choice(f"row(s) {rows}")


def no_choice(where: str) -> PyargsError:
    return PyargsError(
        f"the policy's logits or the rewards are not numbers in {where}, reward_weight times a reward is beyond float32, or "
        "no token is left after adjust: check the models' weights, lower reward_weight, or forbid less"
    )


def positions(lm) -> int | None:
    """How many tokens a model has positions for, prompt and answer together; None where it has no limit."""
    config = lm.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def check_room(lm, shortest: int, longest: int, new: int) -> None:
    """Raises PyargsError where prompts of these lengths and new tokens exceed the model's positions; calls `check_lengths`."""
    room = positions(lm)
    if room and longest + new > room:
        raise PyargsError(
            f"{longest} prompt + {new} new tokens exceed the {room} positions of {type(lm).__name__}: shorten the "
            "prompt, or ask for fewer new tokens"
        )
    check_lengths(lm, shortest, longest + new)


def stop_tokens(lm, stop: int | Sequence[int] | None = None, name: str = "stop") -> tuple[int, ...]:
    """The ids that end an answer: what is given under this name, else the model's own."""
    name, stop = ("eos_token_id", lm.generation_config.eos_token_id) if stop is None else (name, stop)
    if isinstance(stop, str) or _several(stop) and any(isinstance(one, str) for one in stop):
        raise PyargsError(f"{name} holds token ids, not text: use tokenizer.convert_tokens_to_ids, or cut the text later")
    return () if stop is None else tuple(integer(name, one, 0, 2**31) for one in (stop if _several(stop) else [stop]))


def stop_and_pad(lm, eos: int | Sequence[int] | None = None, pad: int | None = None) -> tuple[list[int], int]:
    """Stop tokens and the padding token: what is given, else the model's own."""
    eos = list(stop_tokens(lm, eos, "eos_token_id"))
    return eos, integer("pad_token_id", next(i for i in (pad, lm.generation_config.pad_token_id, *eos, 0) if i is not None), 0)


def as_float(x: Tensor) -> Tensor:
    """float64 becomes float32, which the ops take (tests have float64 models); other dtypes stay."""
    return x.float() if x.dtype == torch.float64 else x
