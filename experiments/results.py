"""The cells of an evaluation, read and added up: what the tables and figures are made from.

A cell is the result of one row of the paper's tables with one seed: RESULTS/PROFILE/SET/POLICY/ROW-SEED.json, written by
`python -m experiments reproduce PROFILE`. Here cells are plain dicts. A measure of a cell is {"value", "users"}: the number
itself, and the values it is the mean of, by user (empty where the cell has none), for the intervals.
"""

from __future__ import annotations

import math
import random
import re
import shlex
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from pyargs import files
from pyargs.errors import PyargsError

PROFILES = ("paper", "gpu", "cpu", "smoke")  # the largest first
TEXT = ("rouge1", "rougeL", "bertscore", "perplexity", "words", "same_as_zero_shot")  # of generated answers
Measure = Callable[[dict], "dict | None"]


def read(folder: str | Path) -> list[dict]:
    """All cells below a results folder, by profile, set, policy, row and seed. Other JSON files there are left alone.

    Raises PyargsError when there is no cell, one is damaged, or two that would stand in one table are of different data or
    settings (the message names files and key).
    """
    folder = Path(folder)
    paths = [path for profile in PROFILES for path in sorted((folder / profile).glob("*/*/*.json"))]
    paths = [path for path in paths if not path.name.endswith(".stage.json")]
    cells = [_checked(path) for path in paths]
    _comparable(paths, cells)
    if not cells:
        raise PyargsError(f"no result cells below {folder}: `{command('smoke')}` makes some in minutes, or give --results")
    return sorted(cells, key=lambda c: (PROFILES.index(c["profile"]), c["set"], size(c["policy"]), c["row"], c["seed"]))


def of_paper(folder: str | Path) -> tuple[Path, dict | None]:
    """Where the paper's numbers belong, beside a results folder, and the numbers if they are there."""
    path = Path(folder).absolute().parent / "expected/paper.json"
    if not path.is_file():
        return path, None
    found = files.read_json(path)
    tables = found.get("tables") if isinstance(found, dict) else None  # what Table 6 holds is elsewhere
    if not isinstance(tables, dict) or not {str(number) for number in range(1, 13) if number != 6} <= set(tables):
        raise PyargsError(f"{path} does not hold the paper's tables: `python -m experiments.paper_numbers` makes it")
    return path, found


def slug(name: str) -> str:
    """A row's or policy's name in a path: "Global RM, LoRA" -> global-rm-lora."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def name(cell: dict) -> str:
    """Where a cell's file is, below the results' folder."""
    return f"{cell['profile']}/{cell['set']}/{slug(cell['policy'])}/{slug(cell['row'])}-{cell['seed']}.json"


def command(profile: str, rows: Iterable[str] = (), sets: Iterable[str] = ()) -> str:
    """The command that makes cells: of these rows, or of all; on these sets, or on all."""
    words = [profile, *(["--only", *rows] if rows else []), *(["--sets", *sets] if sets else [])]
    return " ".join(["python -m experiments reproduce", *map(shlex.quote, words)])


def size(policy: str) -> tuple[float, str]:
    """Parameters that a policy's name tells ("qwen2.5-0.5b" -> 5e8; none: 0), and the name, to order policies by."""
    found = re.findall(r"(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", policy.lower())
    return (float(found[-1][0]) * {"m": 1e6, "b": 1e9}[found[-1][1]] if found else 0.0, policy)


# --- choosing cells


def choose_profile(cells: list[dict], stands_for: str | None, profile: str | None = None) -> str:
    """The profile asked for, or else the largest that has cells of the data set, or else the largest that has any.

    stands_for: the paper's data set, or None for any. Raises PyargsError when the profile that was asked for has no cell.
    """
    present = [name for name in PROFILES if any(c["profile"] == name for c in cells)]
    if profile is not None:
        if profile not in present:
            raise PyargsError(f"no cells of profile {profile}, only of {', '.join(present)}: `{command(profile)}` makes them")
        return profile
    fitting = [c["profile"] for c in cells if stands_for in (None, c["stands_for"])]
    return min(fitting or present, key=PROFILES.index)


def of_set(cells: list[dict], profile: str, stands_for: str) -> list[dict]:
    """The cells of the one set that stands for a data set of the paper in this profile; none if there is no such set."""
    found = [c for c in cells if c["profile"] == profile and c["stands_for"] == stands_for]
    sets = sorted({c["set"] for c in found})
    if len(sets) > 1:
        raise PyargsError(f"profile {profile} has several sets for {stands_for}: {', '.join(sets)}. Move all but one away")
    return found


def policies(cells: list[dict]) -> list[str]:
    """The policies of the cells, the smallest first."""
    return sorted({c["policy"] for c in cells}, key=size)


def match(scales: Iterable[str], own: list[str]) -> dict[str, str | None]:
    """Which of our policies stands beside each of the paper's (sizes like "0.5B"): of the same size, or else the next by size.

    scales: the smallest first. None where we have no policy left.
    """
    beside: dict[str, str | None] = {scale: next((p for p in own if size(p)[0] == size(scale)[0]), None) for scale in scales}
    rest = [policy for policy in own if policy not in beside.values()]
    for scale in beside:
        if beside[scale] is None and rest:
            beside[scale] = rest.pop(0)
    return beside


# --- measures of one cell


def rm_accuracy(cell: dict) -> dict | None:
    return _accuracy(cell["values"].get("rm_accuracy"))


def policy_accuracy(cell: dict, normalize: str = "paper") -> dict | None:
    """How often the row's own decoding score ranks the chosen response first.

    normalize: "paper" (guided rows by the sum of log pi + w r, eqs. 5-6; rows that answer by themselves by their mean
    log-prob, eqs. 4 and 7), "centred" (the same with r minus its mean on the seen users' held-out pairs) or "all" (everything
    by the mean per token, which compares). "ARGS, weight 0" is a guided row with w = 0: there is nothing to centre.
    """
    given = cell["values"].get("policy_accuracy") or {}
    kind = next((name for name in ("personal", "global", "weight_0", "base") if name in given), None)
    found = given.get(kind)
    if normalize == "centred" and kind == "weight_0":
        normalize = "paper"
    if found is not None and "accuracy" not in found:
        found = found.get("mean") or found.get(normalize)
    return _accuracy(found)


def text(cell: dict, name: str) -> dict | None:
    """rouge1, rougeL or bertscore of the generated answers; perplexity, words and cut (percent that ran into the token limit)
    too, which have no users."""
    value = (cell["values"].get("generations") or {}).get(name)
    if value is None:
        return None
    by_user: dict[str, list[float]] = {}
    for answer in cell.get("answers") or []:
        if answer.get(name) is not None:
            by_user.setdefault(answer["user_id"], []).append(answer[name])
    return {"value": value, "users": by_user}


def same_text(one: dict, other: dict) -> bool:
    """Are two answers the same, word for word? By their digests where both have one: the text may be left out."""
    if one.get("digest") and other.get("digest"):
        return one["digest"] == other["digest"]
    return one["text"] is not None and one["text"] == other["text"]


def win_rate(cell: dict) -> dict | None:
    """Share of answers that the row's own reward model puts above the zero-shot answer, percent; ties are no wins."""
    found = (cell["values"].get("generations") or {}).get("win_rate")
    return None if found is None else _accuracy({**found, "accuracy": found["win_rate"]})


def win_tokens(cell: dict, side: int) -> dict | None:
    """Mean tokens of the answers that the win rate compares: side 0 the row's, 1 the zero-shot's."""
    found = ((cell["values"].get("generations") or {}).get("win_rate") or {}).get("tokens")
    return None if found is None else {"value": found[side], "users": {}}


def weight(cell: dict) -> dict | None:
    """The chosen weight in units of 1 / reward_std."""
    value = cell["values"].get("relative")
    return None if value is None else {"value": value, "users": {}}


def ties(measure: Measure) -> Measure:
    """The tie rate that comes with an accuracy or a win rate, percent."""

    def found(cell: dict) -> dict | None:
        one = measure(cell)
        return None if one is None or one.get("ties") is None else {"value": one["ties"], "users": {}}

    return found


def one_per_user(measure: Measure, seed: int = 0) -> Measure:
    """An accuracy on one pair of each user, as in Tables 3 and 7 of the paper; None where the cell has no single outcomes.

    Which pair is taken depends on `seed`, the user's id and how many pairs there are: it is the same in all rows.
    """

    def found(cell: dict) -> dict | None:
        one = measure(cell)
        if one is None or not one["users"]:
            return None
        taken = {user: [each[random.Random(f"{seed} {user}").randrange(len(each))]] for user, each in one["users"].items()}
        return {"value": sum(value for (value,) in taken.values()) / len(taken), "users": taken}

    return found


def _accuracy(found: dict | None) -> dict | None:
    if found is None:
        return None
    users = {user: [100.0 * int(outcome) for outcome in each] for user, each in (found.get("each") or {}).items()}
    return {"value": found["accuracy"], "users": users, "ties": found.get("tie_rate")}


# --- several cells


def summary(cells: list[dict], measure: Measure, **interval) -> dict | None:
    """A measure over the seeds of one row: mean, std (sample, None for one seed), low, high, n and the seeds' values.

    low and high: the interval over users (`level` as in metrics.bootstrap; 95%), all seeds of a user together; None where the
    cells have no values by user. None if no cell has the measure.
    """
    from statistics import stdev

    from pyargs.metrics.bootstrap import user_interval

    found = {cell["seed"]: one for cell in cells if (one := measure(cell)) is not None}
    if not found:
        return None
    values = [one["value"] for one in found.values()]
    of_user = pooled(found.values())
    whole = of_user and all(one["users"] for one in found.values())
    over_users = user_interval(of_user, **interval) if whole else {"low": None, "high": None}
    return {
        "mean": sum(values) / len(values),
        "std": stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
        "low": over_users["low"],
        "high": over_users["high"],
        "n": len(values),
        "seeds": {seed: one["value"] for seed, one in found.items()},
    }


def difference(cells: list[dict], others: list[dict], measure: Measure, **interval) -> dict | None:
    """A measure of one row minus that of another over the same users: mean, low, high (paired). None if one lacks it.

    interval: `level` as in metrics.bootstrap (95%).
    """
    from pyargs.metrics.bootstrap import user_difference

    sides = [[one for cell in side if (one := measure(cell)) is not None] for side in (cells, others)]
    if not all(sides) or not all(one["users"] for side in sides for one in side):
        return None
    own, rival = map(pooled, sides)
    rows = [f"{side[0]['row']} (profile {side[0]['profile']}, {side[0]['set']})" for side in (cells, others)]
    if own.keys() != rival.keys():
        raise PyargsError(f"{rows[0]} and {rows[1]} have different users: one was made on other data. {AGAIN.capitalize()}")
    pairs = [{user: len(values) for user, values in one["users"].items()} for side in sides for one in side]
    if any(each != pairs[0] for each in pairs):
        raise PyargsError(f"{rows[0]} and {rows[1]} have different pairs: one was made on other data. {AGAIN.capitalize()}")
    return user_difference(own, rival, **interval)


def points(cells: list[dict], rows: Iterable[str], x: Measure, y: Measure) -> dict[str, list[tuple[float, float]]]:
    """One point (x, y) for each seed of each row that has both, by row; rows without any are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for cell in (c for c in cells if c["row"] == row):
            if (one := x(cell)) is not None and (two := y(cell)) is not None:
                found.setdefault(row, []).append((one["value"], two["value"]))
    return found


def pooled(found: Iterable[dict]) -> dict[str, list[float]]:
    """The values of several measures together, by user."""
    together: dict[str, list[float]] = {}
    for one in found:
        for user, values in one["users"].items():
            together.setdefault(user, []).extend(values)
    return together


# --- checking


AGAIN = "make it again: remove the file and run `python -m experiments reproduce PROFILE`"


OF_SET, OF_ROW = ("data", "dtype", "decode", "bertscore"), ("row", "tune")  # parts of a cell's key: what it was made with


def _comparable(paths: list[Path], cells: list[dict]) -> None:
    """The cells of a set are of the same data and settings, those of a row of the same recipe."""
    first: dict[tuple, tuple[Path, object]] = {}
    for path, cell in zip(paths, cells, strict=True):
        of_set = (cell["profile"], cell["set"])
        for place, names in ((of_set, OF_SET), ((*of_set, cell["policy"], cell["row"]), OF_ROW)):
            for name in names:
                other, given = first.setdefault((place, name), (path, cell["key"][name]))
                if not _alike(given, cell["key"][name]):
                    raise PyargsError(
                        f"{other} and {path} differ in 'key.{name}', so their numbers do not compare: for the one that is "
                        f"out of date, {AGAIN}"
                    )


def _alike(one, other) -> bool:
    """Equal; of recipes [method, fields] the fields that both have: one that came later has the default that was the rule."""
    if all(isinstance(side, list) and len(side) == 2 and isinstance(side[1], dict) for side in (one, other)):
        return one[0] == other[0] and all(other[1].get(name, value) == value for name, value in one[1].items())
    return one == other


def _checked(path: Path) -> dict:
    try:
        cell = files.read_json(path)
    except PyargsError as error:
        raise PyargsError(f"{error}; {AGAIN}") from error
    if not isinstance(cell, dict):
        raise PyargsError(f"{path} is no cell; {AGAIN}")
    kinds = {
        "profile": str,
        "set": str,
        "stands_for": (str, type(None)),
        "policy": str,
        "row": str,
        "seed": int,
        "values": dict,
        "key": dict,
    }
    for key, kind in kinds.items():
        if key not in cell or not isinstance(cell[key], kind):
            raise PyargsError(f"{path}: '{key}' is {'wrong' if key in cell else 'missing'}; {AGAIN}")
    for name in (*OF_SET, *OF_ROW):
        if name not in cell["key"]:
            raise PyargsError(f"{path}: 'key.{name}' is missing; {AGAIN}")
    place = (cell["profile"], cell["set"], slug(cell["policy"]), f"{slug(cell['row'])}-{cell['seed']}")
    for key, said, name in zip(("profile", "set", "policy", "row"), place, [*path.parts[-4:-1], path.stem], strict=True):
        if said != name:
            raise PyargsError(
                f"{path}: '{key}' says {said}, the path says {name}; a cell may not be moved or renamed, {AGAIN}"
            )
    for name, problem in chain(_notes(cell), _problems(cell)):
        raise PyargsError(f"{path}: '{name}' {problem}; {AGAIN}")
    return cell


def _notes(cell: dict):
    """What is wrong with what a cell says about itself, as (key, problem). All of it may be absent or null."""
    kinds = {
        "data": str,
        "backbone": str,
        "dtype": str,
        "method": str,
        "fields": dict,
        "seconds": dict,
        "provenance": dict,
        "tune": dict,
        "answers": list,
    }
    for name, kind in kinds.items():
        if not isinstance(cell.get(name), kind | None):
            yield name, f"is {cell[name]!r:.40}, not {'text' if kind is str else 'a list' if kind is list else 'an object'}"
    for stage, took in (_dict(cell.get("seconds")) or {}).items():
        if took is None:
            yield f"seconds.{stage}", "is null, not a number"
        yield from _number(took, f"seconds.{stage}")
    for number, point in enumerate((_dict(cell.get("tune")) or {}).get("grid") or ()):
        point = _dict(point) or {}
        if not isinstance(point.get("relative"), int | float):
            yield f"tune.grid[{number}]", "has no relative weight"
        yield from _number(point.get("value"), f"tune.grid[{number}].value")
    if isinstance(made := cell["key"].get("recipe", 0), bool) or not isinstance(made, int):
        yield "key.recipe", f"is {made!r:.40}, not the number of a rule"
    provenance = _dict(cell.get("provenance")) or {}
    if not isinstance(provenance.get("commit"), str | None):
        yield "provenance.commit", "is not text"
    for name in ("hardware", "versions"):
        if not isinstance(provenance.get(name), dict | None):
            yield f"provenance.{name}", "is not an object"
    hardware = _dict(provenance.get("hardware")) or {}
    for name in ("cpu", "gpu"):
        if not isinstance(hardware.get(name), str | None):
            yield f"provenance.hardware.{name}", "is not text"


def _problems(cell: dict):
    """What is wrong with the values and answers of a cell, as (key, problem)."""
    values = cell["values"]
    if values.get("rm_accuracy") is not None:
        yield from _outcomes(values["rm_accuracy"], "values.rm_accuracy")
    for kind, found in (_dict(values.get("policy_accuracy")) or {}).items():
        if isinstance(found, dict) and "accuracy" not in found and found:
            for form, one in found.items():
                yield from _outcomes(one, f"values.policy_accuracy.{kind}.{form}")
        else:
            yield from _outcomes(found, f"values.policy_accuracy.{kind}")
    for name in ("relative", "reward_weight"):
        yield from _number(values.get(name), f"values.{name}")
    for key in ("policy_accuracy", "generations"):
        if values.get(key) is not None and not isinstance(values[key], dict):
            yield f"values.{key}", "is not an object"
    generations = _dict(values.get("generations")) or {}
    for name in (*TEXT, "cut", "n"):
        yield from _number(generations.get(name), f"values.generations.{name}")
    win = generations.get("win_rate")
    if win is not None:
        yield from _outcomes(win, "values.generations.win_rate", "win_rate")
        win = _dict(win) or {}
        yield from _number(win.get("n"), "values.generations.win_rate.n")
        tokens = win.get("tokens", [0, 0])
        if not isinstance(tokens, list) or len(tokens) != 2 or None in tokens:
            yield "values.generations.win_rate.tokens", "is not a pair of numbers"
        else:
            for side in tokens:
                yield from _number(side, "values.generations.win_rate.tokens")
    if not isinstance(generations.get("bertscore_model"), str | None):
        yield "values.generations.bertscore_model", "is not text"
    yield from _means(generations, cell.get("answers") or [])
    for number, answer in enumerate(cell.get("answers") or []):
        lacking = [one for one in ("user_id", "pair_id") if not isinstance((_dict(answer) or {}).get(one), str)]
        if lacking:
            yield f"answers[{number}]", f"has no {lacking[0]}"
        else:
            yield from _text(answer, f"answers[{number}]")
            for name in TEXT:
                yield from _number(answer.get(name), f"answers[{number}].{name}")


def _means(generations: dict, answers: list):
    """ROUGE is a percentage, and what is said of all answers is the mean over them."""
    for name in ("rouge1", "rougeL", "bertscore"):
        value = generations.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue  # absent, or said already
        if name != "bertscore" and not 0 <= value <= 100:
            yield f"values.generations.{name}", f"is {value}, no percentage"
        each = [answer.get(name) for answer in answers if isinstance(answer, dict)]
        if each and all(isinstance(one, int | float) for one in each) and abs(sum(each) / len(each) - value) > 0.01:
            yield f"values.generations.{name}", f"is {value}, which is not the mean of the answers' values"


def _text(answer: dict, name: str):
    """An answer has its text, or null with the words that it copies and a digest to compare it by."""
    if not isinstance(answer.get("text", 0), str | None):
        yield f"{name}.text", "is no text" if "text" in answer else "is missing"
    elif not isinstance(answer.get("digest"), str | None):
        yield f"{name}.digest", f"is {answer['digest']!r}, not a hash"
    elif answer["text"] is None:
        if not answer.get("digest"):
            yield f"{name}.digest", "is missing, and so is the text"
        for count in ("copied", "words"):
            if isinstance(answer.get(count), bool) or not isinstance(answer.get(count), int):
                yield f"{name}.{count}", "is no number of words, and the text is left out"


def _dict(value) -> dict | None:
    return value if isinstance(value, dict) else None


def _number(value, name: str):
    """A number or null; perplexity may be infinite: then no answer had a token."""
    if value is None or (value == math.inf and name.endswith(".perplexity")):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield name, f"is {value!r}, not a number"


def _outcomes(found, name: str, share: str = "accuracy"):
    """An accuracy, or another share, is a percentage and what its outcomes say."""
    if not isinstance(found, dict) or not isinstance(found.get(share), int | float):
        yield name, f"has no {share}"
        return
    yield from _number(found.get("tie_rate"), f"{name}.tie_rate")
    if not 0 <= found[share] <= 100:  # catches nan, too
        yield f"{name}.{share}", f"is {found[share]}, no percentage"
    each = found.get("each")
    if each is None:
        return
    if not isinstance(each, dict) or not each:
        yield f"{name}.each", "holds no users"
        return
    for user, outcomes in each.items():
        if not isinstance(outcomes, str) or not outcomes or set(outcomes) - {"0", "1"}:
            yield f"{name}.each", f"is {outcomes!r} for user {user}, not a 0 or 1 for each pair"
            return
    together = "".join(each.values())
    if abs(100 * together.count("1") / len(together) - found[share]) > 0.01:
        yield f"{name}.{share}", f"is {found[share]}, which is not what its outcomes say"
