"""What was computed otherwise when older cells were made: they are marked where they are shown, and made again.

A cell notes the newest rule when it was made (`key.recipe`). A new rule here marks what it touches among the cells that are
there, and `python -m experiments reproduce` makes those again; the others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Rule(NamedTuple):
    """before: what was otherwise in older cells, as words behind a colon. touches: does that change a cell's numbers?
    of_weight: is it about the chosen weight alone, which changes nothing of what a reward model ranks?"""

    number: int
    before: str
    touches: Callable[[dict], bool]
    of_weight: bool = False


def largest_tried(cell: dict) -> bool:
    """Whether the chosen weight is the largest that was tried, so that a larger one may be better."""
    tried = [point["relative"] for point in _grid(cell)]
    return len(tried) > 1 and cell["values"].get("relative") == max(tried) > 0


def held_by_the_bound(cell: dict) -> bool:
    """Whether a larger weight than the chosen was better: only the bound on perplexity keeps such a one from being chosen."""
    values = {point["relative"]: point["value"] for point in _grid(cell) if point.get("value") is not None}
    return values.get(cell["values"].get("relative"), math.inf) < max(values.values(), default=0)


def _grid(cell: dict) -> list[dict]:
    return (cell.get("tune") or {}).get("grid") or []


def _ended_at_the_grid(cell: dict) -> bool:
    """Whether larger weights would be tried now: the largest was chosen, and its answers are not known to be broken."""
    if not largest_tried(cell):
        return False
    tuned = cell["tune"]
    found, base = tuned["grid"][-1].get("perplexity"), tuned.get("unguided_perplexity")
    return found is None or base is None or found <= tuned["max_perplexity"] * base


RULES = (
    Rule(
        3,
        "PAL-A's projector did not add its input to its output",
        lambda cell: cell.get("method") == "pal" and (cell.get("fields") or {}).get("variant") == "A",
    ),
    Rule(4, "VPL's encoder had no biases on query, key and value", lambda cell: cell.get("method") == "vpl"),
    Rule(
        5,
        "a title that a user's support (or train) rejects could be rejected in the user's query (or train_test) again, as "
        "in 50 of the 170 queries of cpu",
        lambda cell: cell["set"] == "pref_lamp",
    ),
    Rule(
        6,
        "prompt and response kept up to 2048 tokens together, where those of guided rows keep 512 (14 of the 1,550 queries "
        "of length_prefs and 4 of the 400 of two_types are longer)",
        lambda cell: cell["row"] == "Zero-Shot" and cell["set"] in ("length_prefs", "two_types"),
    ),
    Rule(7, "the largest weight of the grid was the best, and no larger one was tried", _ended_at_the_grid, of_weight=True),
)
NEWEST = RULES[-1].number


def older(cell: dict) -> list[Rule]:
    """The rules that came after a cell and touch it."""
    made = (cell.get("key") or {}).get("recipe") or 0
    return [rule for rule in RULES if rule.number > made and rule.touches(cell)]


def hardly_adapted(cell: dict, steps: int = 200) -> bool:
    """Whether P-DPO's new users were given fewer steps than its default: 2 or 10 leave the policy as it is."""
    return cell.get("method") == "pdpo" and (cell.get("fields") or {}).get("adapt_steps", steps) < steps


def marks(cells: Iterable[dict], ranked: Iterable[dict] = ()) -> dict[str, dict[str, list[int]]]:
    """What must be said of cells: a sentence -> its rows -> their seeds.

    ranked: cells of which no more is shown than what their reward model ranks, for which no weight matters.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for cell, weighed in (*((cell, True) for cell in cells), *((cell, False) for cell in ranked)):
        behind = [rule for rule in older(cell) if weighed or not rule.of_weight]
        said = [f"made by the older rule: {rule.before}" for rule in behind]
        if weighed and largest_tried(cell) and not any(rule.of_weight for rule in behind):
            said.append("the chosen weight is the largest tried")
        if weighed and held_by_the_bound(cell):
            said.append("a larger weight is better, but its text breaks the bound on perplexity")
        if hardly_adapted(cell):
            said.append("so few steps for new users leave the policy as it is (the default is 200)")
        for one in said:
            seeds = found.setdefault(one, {}).setdefault(cell["row"], [])
            seeds += [cell["seed"]] * (cell["seed"] not in seeds)
    return found
