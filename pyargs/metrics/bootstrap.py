"""Intervals over users: the users are drawn again and again with replacement, each with all of its values.

95% unless another level is asked for. Over few users a percentile interval is too narrow (with ten it holds the truth 89% of
the time instead of 95%), so each is stretched about the mean by `small_sample`. It may then end outside the range of the
values, as those of Student's t do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from pyargs.errors import PyargsError

DRAWS = 10_000
LEVEL = 0.95


def user_interval(values: Mapping[str, Sequence[float]], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> dict:
    """Mean of all values together (micro) and its interval, by resampling users.

    values: user id -> that user's values, of all pairs and all seeds, in any unit: a user is drawn with all of them, since
    pairs of one user are not independent. Gives mean, low, high, n (values) and users; low and high are None with fewer
    than two users. Raises PyargsError without values or with one that is not finite.
    """
    users = sorted(values)
    sums, counts = _sums(values, users)
    found = {"mean": float(sums.sum() / counts.sum()), "low": None, "high": None, "n": int(counts.sum()), "users": len(users)}
    if len(users) > 1:
        taken = resamples(len(users), draws, seed)
        found |= _interval(found["mean"], (taken @ sums) / (taken @ counts), level, len(users))
    return found


def user_difference(
    values: Mapping[str, Sequence[float]],
    others: Mapping[str, Sequence[float]],
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict:
    """Mean of `values` minus mean of `others`, with its interval: the same users are drawn on both sides.

    As `user_interval`; `n` counts the values of the first. Raises PyargsError when the two have different users.
    """
    if set(values) != set(others):
        raise PyargsError("a difference over users needs the same users on both sides: these values are of other data")
    users = sorted(values)
    (sums, counts), (other_sums, other_counts) = _sums(values, users), _sums(others, users)
    difference = _exact(sums.sum() / counts.sum() - other_sums.sum() / other_counts.sum())
    found = {"mean": difference, "low": None, "high": None, "n": int(counts.sum()), "users": len(users)}
    if len(users) > 1:
        taken = resamples(len(users), draws, seed)
        drawn = (taken @ sums) / (taken @ counts) - (taken @ other_sums) / (taken @ other_counts)
        found |= _interval(difference, drawn, level, len(users))
    return found


def tails(level: float) -> tuple[float, float]:
    """The quantiles between which an interval of this level lies: 0.95 -> 0.025, 0.975."""
    tail = round((1 - level) / 2, 12)
    return tail, 1 - tail


def small_sample(count: int, level: float = LEVEL) -> float:
    """How much wider than a percentile interval one over `count` users has to be: t over z, times sqrt(n / (n - 1)).

    The first for the spread that is estimated, the second for its bias; 1.22 for ten users at 95%, 1.01 for a hundred.
    """
    from scipy.stats import norm, t

    _, upper = tails(level)
    return float(t.ppf(upper, count - 1) / norm.ppf(upper) * np.sqrt(count / (count - 1)))


@lru_cache(maxsize=4)  # a table draws the same users for every value
def resamples(count: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each of `count` units is in each draw, float64 [draws, count], read-only; a row sums to count."""
    taken = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    taken.setflags(write=False)
    return taken


def _sums(values: Mapping[str, Sequence[float]], users: list[str]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(values[user]) for user in users], dtype=np.float64)
    if not len(users) or not counts.all():
        raise PyargsError("an interval over users needs at least one user, and at least one value of each")
    sums = np.array([float(np.sum(values[user])) for user in users])
    if not np.isfinite(sums).all():
        raise PyargsError(f"user {users[int(np.argmin(np.isfinite(sums)))]} has a value that is not a number")
    return sums, counts


def _interval(mean: float, drawn: np.ndarray, level: float, users: int) -> dict:
    ends = mean + small_sample(users, level) * (np.quantile(drawn, tails(level)) - mean)
    return {"low": _exact(ends[0]), "high": _exact(ends[1])}


def _exact(value: float) -> float:
    """Rounds away what sums in another order would change, so that equal rows differ by exactly 0."""
    return round(float(value), 9) + 0.0
