"""95% intervals over users: the users are drawn again and again with replacement, each with all of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from pyargs.errors import PyargsError

DRAWS = 10_000
LEVEL = (0.025, 0.975)


def user_interval(values: Mapping[str, Sequence[float]], *, draws: int = DRAWS, seed: int = 0) -> dict:
    """Mean of all values together (micro) and its 95% interval, by resampling users.

    values: user id -> that user's values, of all pairs and all seeds, in any unit: a user is drawn with all of them, since
    pairs of one user are not independent. Gives mean, low, high, n (values) and users; low and high are None with fewer
    than two users. Raises PyargsError without values or with one that is not finite.
    """
    users = sorted(values)
    sums, counts = _sums(values, users)
    found = {"mean": float(sums.sum() / counts.sum()), "low": None, "high": None, "n": int(counts.sum()), "users": len(users)}
    if len(users) > 1:
        taken = resamples(len(users), draws, seed)
        found["low"], found["high"] = _quantiles((taken @ sums) / (taken @ counts))
    return found


def user_difference(
    values: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]], *, draws: int = DRAWS, seed: int = 0
) -> dict:
    """Mean of `values` minus mean of `others`, with its 95% interval: the same users are drawn on both sides.

    As `user_interval`; `n` counts the values of the first. Raises PyargsError when the two have different users.
    """
    if set(values) != set(others):
        raise PyargsError("a difference over users needs the same users on both sides: these cells were made on other data")
    users = sorted(values)
    (sums, counts), (other_sums, other_counts) = _sums(values, users), _sums(others, users)
    difference = float(sums.sum() / counts.sum() - other_sums.sum() / other_counts.sum())
    found = {"mean": difference, "low": None, "high": None, "n": int(counts.sum()), "users": len(users)}
    if len(users) > 1:
        taken = resamples(len(users), draws, seed)
        drawn = (taken @ sums) / (taken @ counts) - (taken @ other_sums) / (taken @ other_counts)
        found["low"], found["high"] = _quantiles(drawn)
    return found


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


def _quantiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, LEVEL)
    return float(low), float(high)
