"""How far one measure of the methods predicts another: Kendall's tau-b, Spearman's rho, Pearson's r, with intervals.

The paper correlates points of method x seed. Seeds of one method are not independent, so the intervals draw whole methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyargs.errors import PyargsError
from pyargs.metrics.bootstrap import DRAWS, LEVEL, resamples, tails

STATISTICS = ("kendall", "spearman", "pearson")
LEAST = 3  # points, and methods for an interval: with two, every rank correlation is 1 or -1


def correlate(x: Sequence[float], y: Sequence[float]) -> dict:
    """kendall (tau-b), spearman, pearson by scipy, and n. None where undefined: fewer than 3 points, or a constant side.

    Raises PyargsError when the lengths differ or a value is not finite.
    """
    from scipy import stats

    x, y = _checked(x, y)
    found = dict.fromkeys(STATISTICS)
    if len(x) >= LEAST and np.ptp(x) > 0 and np.ptp(y) > 0:
        for name, function in zip(STATISTICS, (stats.kendalltau, stats.spearmanr, stats.pearsonr), strict=True):
            value = float(function(x, y).statistic)
            found[name] = value if np.isfinite(value) else None
    return {**found, "n": len(x)}


def correlate_methods(
    points: Mapping[str, Sequence[tuple[float, float]]], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> dict:
    """Correlations of a method's points (x, y), one per seed: over all points, and over the methods' means.

    Gives {"points": {statistic: {"value", "low", "high"}, "n", "methods"}, "means": the same}. The intervals (95% by default)
    resample methods together with their seeds; draws in which a statistic is undefined (one method only, a constant side) are
    left out and their share is `undefined`. Without a value, or with fewer than 3 methods, low and high are None. No method
    may be without a point (PyargsError).
    """
    names = list(points)
    empty = [name for name in names if not len(points[name])]
    if empty:
        raise PyargsError(f"method '{empty[0]}' has no point to correlate: leave it out")
    owner = np.array([i for i, name in enumerate(names) for _ in points[name]], dtype=np.int64)
    every = np.array([point for name in names for point in points[name]], dtype=np.float64).reshape(-1, 2)
    means = np.array([np.mean(points[name], axis=0) for name in names], dtype=np.float64).reshape(-1, 2)
    taken = resamples(len(names), draws, seed) if names else np.zeros((0, 0))
    return {
        "points": _with_intervals(every, taken[:, owner] if names else taken, len(names), level),
        "means": _with_intervals(means, taken, len(names), level),
    }


def _with_intervals(points: np.ndarray, weights: np.ndarray, methods: int, level: float) -> dict:
    values = correlate(points[:, 0], points[:, 1])
    found: dict = {"n": values.pop("n"), "methods": methods}
    drawn = weighted(points[:, 0], points[:, 1], weights) if methods >= LEAST else {}
    for name, value in values.items():
        found[name] = {"value": value, "low": None, "high": None, "undefined": None}
        if value is not None and name in drawn:
            defined = drawn[name][np.isfinite(drawn[name])]
            found[name]["undefined"] = 1 - len(defined) / len(drawn[name])
            if len(defined):
                found[name]["low"], found[name]["high"] = map(float, np.quantile(defined, tails(level)))
    return found


def weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The three statistics of samples in which point i is `weights[:, i]` times: x, y [n], weights [draws, n] -> [draws] each.

    The same as scipy's on the repeated points (a test says so), for all draws at once; nan where undefined.
    """
    sign_x, sign_y = (np.sign(np.subtract.outer(side, side)) for side in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        agree, apart_x, apart_y = (_pairs(weights, part) for part in (sign_x * sign_y, abs(sign_x), abs(sign_y)))
        return {
            "kendall": agree / np.sqrt(apart_x * apart_y),
            "spearman": _pearson(_ranks(sign_x, weights), _ranks(sign_y, weights), weights, apart_x * apart_y > 0),
            "pearson": _pearson((x - x.mean())[None], (y - y.mean())[None], weights, apart_x * apart_y > 0),
        }


def _pairs(weights: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Sum over ordered pairs of points in the sample: w' part w."""
    return ((weights @ part) * weights).sum(1)


def _ranks(sign: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-rank of each point in each sample, but for a constant: points below plus half of those that are equal."""
    return weights @ ((sign < 0) + 0.5 * (sign == 0))


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray, varied: np.ndarray) -> np.ndarray:
    total = weights.sum(1, keepdims=True)
    x, y = (side - (weights * side).sum(1, keepdims=True) / total for side in (x, y))
    product = (weights * x * y).sum(1) / np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
    return np.where(varied, product.clip(-1, 1), np.nan)


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise PyargsError(f"a correlation needs two lists of the same length, got {list(x.shape)} and {list(y.shape)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PyargsError("a value to correlate is not a number: what it came from is broken")
    return x, y
