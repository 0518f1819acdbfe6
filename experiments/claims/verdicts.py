"""What decides a claim: comparisons with intervals, each for the claim, against it or neither, and the verdict on all.

A comparison is for a claim only if its whole interval is, and against it only if its whole interval is. So a claim never
rests on a point estimate; without an interval, or with one over fewer than LEAST units, a comparison decides nothing.
Neither does one with a trained row of fewer than LEAST_SEEDS seeds: intervals over users do not hold what another training
run would change.

Of many comparisons one is always for a claim, or against it, by chance: those of a claim with m of them have intervals of
level 1 - 0.05 / m (Bonferroni). Intervals over users are widened for few users (metrics.bootstrap.small_sample); those over
methods are not. So where nothing differs at most about one claim in forty holds by chance, and one in forty fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from experiments import results
from experiments.tables.captions import listed
from experiments.tables.specs import trained
from pyargs.metrics.bootstrap import LEVEL, resamples, tails
from pyargs.metrics.correlation import correlate_methods, weighted

HOLDS, FAILS, OPEN, UNTESTABLE = "holds", "does not hold", "can not be told", "not testable here"
VERDICTS = (HOLDS, FAILS, OPEN, UNTESTABLE)
LEAST = 5  # users or methods behind an interval: resampling fewer says little about others (default)
LEAST_SEEDS = 3  # training runs of each trained row in a comparison (default: as many as the paper has)
UNDEFINED = 0.05  # share of draws without a correlation above which its interval is not used (default)
Test = Callable[[dict], "bool | None"]
Measured = Callable[[float], dict]  # level -> {"mean", "low", "high"}


# --- tests of one number with its interval


def above(bound: float = 0.0) -> Test:
    """True: the whole interval is above the bound. False: the whole interval is at or below it."""
    return lambda one: True if one["low"] > bound else False if one["high"] <= bound else None


def at_most(bound: float) -> Test:
    """True: the whole interval is at or below the bound. False: the whole interval is above it."""
    return lambda one: True if one["high"] <= bound else False if one["low"] > bound else None


def at_least(bound: float) -> Test:
    """True: the whole interval is at or above the bound. False: the whole interval is below it."""
    return lambda one: True if one["low"] >= bound else False if one["high"] < bound else None


def below(bound: float = 0.0) -> Test:
    """True: the whole interval is below the bound. False: the whole interval is at or above it."""
    return lambda one: True if one["high"] < bound else False if one["low"] >= bound else None


def within(low: float, high: float) -> Test:
    """True: the whole interval lies in [low, high]. False: the whole interval lies on one side of it."""
    return lambda one: (
        True if low <= one["low"] and one["high"] <= high else False if one["high"] < low or one["low"] > high else None
    )


def other_than(bound: float, near: float) -> Test:
    """True: the interval is without the bound. False: the whole interval is nearer to it than `near`."""
    return lambda one: (
        False
        if bound - near < one["low"] and one["high"] < bound + near
        else True
        if one["low"] > bound or one["high"] < bound
        else None
    )


# --- comparisons


def comparison(
    what: str, measured: Measured, cells: Iterable[dict], test: Test, units: int, of: str = "users", seeds: int | None = None
) -> dict:
    """A comparison that is not decided yet: its number at any level, the test, the files, and why it can not decide.

    seeds: of the trained row that has the fewest, if the cells are not all of them.
    """
    cells, why = list(cells), ""
    seeds = fewest_seeds(cells) if seeds is None else seeds
    if units < LEAST:
        why = f"no interval: {units} {of}, {LEAST} are needed"
    elif measured(LEVEL)["low"] is None:
        why = "no interval: undefined in too many draws" if of == "methods" else "no interval: no values by user"
    elif seeds < LEAST_SEEDS:
        why = f"{seeds} seed{'s' * (seeds > 1)}: another training run may differ"
    return {
        "what": what,
        "measured": measured,
        "test": test,
        "why": why,
        "cells": sorted({results.name(cell) for cell in cells}),
    }


def fewest_seeds(cells: list[dict]) -> int:
    """Seeds of the trained row that has the fewest; LEAST_SEEDS where no row is trained."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for cell in cells:
        if trained(cell["row"]):
            seeds.setdefault((cell["row"], cell["policy"]), set()).add(cell["seed"])
    return min(map(len, seeds.values()), default=LEAST_SEEDS)


def decided(found: list[dict]) -> list[dict]:
    """All comparisons of a claim, each with an interval of a level for as many as they are.

    Of each: what it is; mean, low, high, level; the files of the cells; for: True, False or None (it decides nothing), and why
    not. Without an interval of LEAST units there is none to show.
    """
    level, made = 1 - (1 - LEVEL) / max(1, len(found)), []
    for one in found:
        number, test = one["measured"](level), one["test"]
        unusable = one["why"].startswith("no interval")
        made.append(
            {
                "what": one["what"],
                "mean": number["mean"],
                "low": None if unusable else number["low"],
                "high": None if unusable else number["high"],
                "level": level,
                "why": one["why"],
                "for": None if one["why"] else test(number),
                "cells": one["cells"],
            }
        )
    return made


def value(what: str, cells: list[dict], measure: results.Measure, test: Test) -> dict | None:
    """A measure of one row over its seeds. None where no cell has it."""
    cells = [cell for cell in cells if measure(cell) is not None]
    if not cells:
        return None
    users = {user for cell in cells for user in measure(cell)["users"]}
    measured = lambda level: results.summary(cells, measure, level=level)  # noqa: E731
    return comparison(what, measured, cells, test, len(users))


def difference(
    what: str, cells: list[dict], others: list[dict], measure: results.Measure, test: Test, seeds: int | None = None
) -> dict | None:
    """A measure of one row minus that of another, paired over users. None where one has none. seeds: as in `comparison`."""
    measured = lambda level: results.difference(cells, others, measure, level=level)  # noqa: E731
    one = measured(LEVEL)
    if one is None:
        return None
    used = [cell for cell in [*cells, *others] if measure(cell) is not None]
    return comparison(what, measured, used, test, one["users"], seeds=seeds)


def win_rate(what: str, cells: list[dict], test: Test) -> dict | None:
    """The win rate over the seeds, and its ties. None without a win rate."""
    ties = results.summary(cells, results.ties(results.win_rate))
    return value(what + (f" (ties: {ties['mean']:.1f} percent)" if ties else ""), cells, results.win_rate, test)


def correlation(what: str, cells: list[dict], rows, x, y, statistic: str, test: Test) -> dict | None:
    """A correlation of two measures over method x seed, as in the tables. None without a point."""
    points = results.points(cells, rows, x, y)
    if not points:
        return None

    def measured(level: float) -> dict:
        found = correlate_methods(points, level=level)["points"][statistic]
        usable = (found["undefined"] or 0) <= UNDEFINED
        return {"mean": found["value"], "low": found["low"] if usable else None, "high": found["high"] if usable else None}

    return comparison(what, measured, [c for c in cells if c["row"] in points], test, len(points), "methods")


def correlation_change(what: str, first: list[dict], last: list[dict], rows, x, y, statistic: str, test: Test) -> dict | None:
    """A correlation among the cells of one policy minus that among another's, the same methods drawn on both sides."""
    sides = [results.points(cells, rows, x, y) for cells in (last, first)]
    common = [row for row in rows if all(row in side for side in sides)]
    if not common:
        return None
    taken, drawn, means = resamples(len(common)), [], []
    for side in sides:
        owner = [place for place, row in enumerate(common) for _ in side[row]]
        points = np.array([point for row in common for point in side[row]], dtype=np.float64)
        drawn.append(weighted(points[:, 0], points[:, 1], taken[:, owner])[statistic])
        means.append(correlate_methods({row: side[row] for row in common})["points"][statistic]["value"])
    change = drawn[0] - drawn[1]

    def measured(level: float) -> dict:
        one = {"mean": None if None in means else means[0] - means[1], "low": None, "high": None}
        if np.isfinite(change).mean() >= 1 - UNDEFINED:
            one["low"], one["high"] = map(float, np.quantile(change[np.isfinite(change)], tails(level)))
        return one

    return comparison(what, measured, [c for c in [*first, *last] if c["row"] in common], test, len(common), "methods")


# --- the verdict


def all_of(found: list[dict], lacking: list[str]) -> tuple[str, str]:
    """Holds if every comparison is for the claim and none lacks; does not hold if one is against it."""
    return _judged(found, lacking, False, FAILS, "Against it", HOLDS, "for it, none against")


def any_of(found: list[dict], lacking: list[str]) -> tuple[str, str]:
    """Holds if one comparison is for the claim; does not hold if all are against it and none lacks."""
    return _judged(found, lacking, True, HOLDS, "For it", FAILS, "against it, none for")


def _judged(
    found: list[dict], lacking: list[str], deciding: bool, verdict: str, words: str, otherwise: str, all_words: str
) -> tuple[str, str]:
    """`verdict` if one comparison is of the deciding kind, `otherwise` if none is, none is undecided and none lacks."""
    own, undecided = ([one for one in found if one["for"] is kind] for kind in (deciding, None))
    if own:
        return verdict, f"{words}, {len(own)} of {len(found)} comparisons: {_listed(own)}."
    if undecided or lacking:
        return OPEN, " ".join([*([f"Undecided: {_listed(undecided)}."] if undecided else []), *_lacks(lacking)])
    return otherwise, f"{_count(found)} {all_words}."


def _count(found: list[dict]) -> str:
    return "The one comparison is" if len(found) == 1 else f"All {len(found)} comparisons are"


def _listed(found: list[dict]) -> str:
    shown = [f"{one['what']}, {one['why'] or _interval(one)}" for one in found[:3]]
    return "; ".join([*shown, *([f"and {len(found) - 3} more"] if len(found) > 3 else [])])


def _interval(one: dict) -> str:
    return f"{one['mean']:.2f} [{one['low']:.2f} to {one['high']:.2f}]".replace("-", "−")


def _lacks(lacking: list[str]) -> list[str]:
    return [f"Missing: {listed(dict.fromkeys(lacking))}."] if lacking else []
