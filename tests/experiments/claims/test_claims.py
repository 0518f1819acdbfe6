"""The paper's claims: verdicts turn with the cells, few users or seeds decide nothing, what is missing is said."""

from __future__ import annotations

import re
import shlex

import cells as made
import pytest
from cells import ROOT

from experiments import results
from experiments.claims import CLAIMS, FAILS, HOLDS, OPEN, UNTESTABLE, evidence, findings
from experiments.claims.common import PERSONAL
from experiments.claims.verdicts import (
    LEAST,
    LEAST_SEEDS,
    above,
    decided,
    difference,
)
from experiments.tables.specs import GUIDES, PRISM_EIGHT, PRISM_ROWS, TLDR_EIGHT, UNGUIDED
from pyargs import files

PAPER = files.read_json(ROOT / "experiments/expected/paper.json")


USERS, PAIRS = 8, 20


SETS = {"TLDR": "length_prefs", "PRISM": "two_types", "Pref-LaMP": "pref_lamp", None: "same_content"}


def cell(
    data, row, *, seed=0, rm=None, policy=None, mean=None, rouge=None, win=None, text="a title", by="smollm2-135m", weight=1.0
):
    """A cell in which every user has the same outcomes: rm, policy, mean of 20 pairs are right; rouge of each answer."""
    outcomes = lambda right: made.accuracy({f"u{n}": "1" * right + "0" * (PAIRS - right) for n in range(USERS)})  # noqa: E731
    values, answers = {"relative": weight}, []
    if rm is not None:
        values["rm_accuracy"] = outcomes(rm)
    if policy is not None:
        forms = {"paper": outcomes(policy), "all": outcomes(policy if mean is None else mean)}
        values["policy_accuracy"] = {"base": {"mean": outcomes(policy)}} if row == "Zero-Shot" else {"personal": forms}
    if rouge is not None:
        answers = [{"user_id": f"u{n}", "pair_id": f"u{n}-0", "text": text, "rouge1": rouge} for n in range(USERS)]
        values["generations"] = {"n": USERS, "rouge1": rouge}
        if win is not None:
            won = {f"u{n}": "1" * int(win) + "0" * (100 - int(win)) for n in range(USERS)}
            values["generations"]["win_rate"] = {
                "win_rate": win,
                "tie_rate": 0.0,
                "n": 100 * USERS,
                "unscored": 0,
                "each": won,
            }
    return {
        "profile": "cpu",
        "set": SETS[data],
        "stands_for": data,
        "policy": by,
        "row": row,
        "seed": seed,
        "values": values,
        "dtype": "float32",
        "answers": answers,
    }


def rows(data, levels: dict, key: str, **more) -> list[dict]:
    return [cell(data, row, **{key: level}, **more) for row, level in levels.items()]


def thrice(cells: list[dict]) -> list[dict]:
    """The same cells with three seeds; those of rows that have several are left alone."""
    several = {one["row"] for one in cells if one["seed"]}
    return [one | {"seed": seed} for one in cells for seed in ([one["seed"]] if one["row"] in several else range(3))]


def verdict(id: str, cells: list[dict]) -> dict:
    return next(claim for claim in CLAIMS if claim.__name__ == id)(evidence(cells, PAPER, "cpu"))


def lamp(levels: dict, **more) -> list[dict]:
    return rows("Pref-LaMP", levels, "rouge", **more)


def guided(rouge: float, **other) -> dict:
    return {**dict.fromkeys(GUIDES, rouge), **other}


def rising(data, names, slope: int, **more) -> list[dict]:
    """Rows whose policy accuracy rises with their RM accuracy (slope 1), or falls (-1)."""
    return [cell(data, row, rm=10 + n, policy=10 + slope * n, **more) for n, row in enumerate(names)]


QWEN = ("qwen2.5-0.5b", "qwen2.5-7b")


PRISM_ONE = dict.fromkeys(PRISM_ROWS, 10)


FLIPS = {  # claim -> cells for it, then cells against it (one list or more)
    "tau_range": tuple(rising("TLDR", TLDR_EIGHT, s) for s in (-1, 1)),
    "prism_tau": tuple(rising("PRISM", PRISM_EIGHT, s) for s in (-1, 1)),
    "tldr_corr": tuple(
        rising("TLDR", TLDR_EIGHT, s, by="smollm2-135m") + rising("TLDR", TLDR_EIGHT, -s, by="smollm2-1.7b") for s in (1, -1)
    ),
    "prism_corr": tuple(
        rising("PRISM", PRISM_EIGHT, s, by=QWEN[0]) + rising("PRISM", PRISM_EIGHT, -s, by=QWEN[1]) for s in (-1, 1)
    ),
    "tldr_prior": tuple(rows("TLDR", {"MPU": p, "MPU-Avg": p, "PReF": p, "Zero-Shot": 12}, "policy") for p in (8, 15)),
    "tldr_prior_all": tuple(
        rows("TLDR", {"MPU": 8, "MPU-Avg": 8, "PReF": 8}, "policy", mean=m) + rows("TLDR", {"Zero-Shot": 12}, "policy")
        for m in (8, 15)
    ),
    "tldr_lore": tuple(rows("TLDR", {**dict.fromkeys(TLDR_EIGHT, 12), "LoRE": p}, "policy") for p in (16, 8)),
    "tldr_pal": tuple(rows("TLDR", {**dict.fromkeys(TLDR_EIGHT, 12), "PAL": p}, "rm") for p in (16, 8)),
    "prism_global": tuple(rows("PRISM", {**PRISM_ONE, "Global RM": p}, "rm") for p in (15, 8)),
    "prism_vpl": tuple(
        [cell("PRISM", row, rm=10, policy=10) for row in PRISM_EIGHT if row != "VPL"] + [cell("PRISM", "VPL", rm=r, policy=15)]
        for r in (8, 12)
    ),
    "prism_bands": tuple(
        rows("PRISM", {"VPL": 10, "LoRE-Alt": 12}, "policy", by=QWEN[0])
        + rows("PRISM", {"VPL": p, "LoRE-Alt": 12}, "policy", by=QWEN[1])
        for p in (10, 15)
    ),
    "icl_gain": tuple(lamp(guided(40, **{"ICL-RAG": r}), by=QWEN[1]) for r in (43, 41)),
    "threshold": tuple(lamp(guided(40, **{"ICL-RAG": r}), by=QWEN[1]) for r in (43, 39)),
    "small_policies": tuple(lamp(guided(40, **{"ICL-RAG": r})) for r in (39, 43)),
    "rag_over_icl": tuple(lamp({"ICL": 40, "ICL-RAG": r, "ICL, 2 shots": 40, "ICL-RAG, 2 shots": 41}) for r in (41, 39)),
    "icl_shots": tuple(lamp({"ICL": 40, "ICL-RAG": 40, "ICL, 16 shots": 41, "ICL-RAG, 16 shots": r}) for r in (41, 39)),
    "rgd_gain": tuple(lamp(guided(20, LoRE=r, **{UNGUIDED: 20})) for r in (22, 19)),
    "weight_0": tuple(lamp({"Zero-Shot": 20, UNGUIDED: r}) for r in (22, 20.1)),
    "no_op": tuple(
        lamp({"Global RM": 20, "LoRE": 20, UNGUIDED: 20}) + lamp({"MPU-Avg": 20}, text=text) for text in ("a title", "another")
    ),
    "collapse": tuple(
        lamp({UNGUIDED: 20})
        + [
            cell("Pref-LaMP", row, seed=seed, rouge=r if (row, seed) == ("VPL", 1) else 20)
            for row in ("LoRE-Alt", "VPL", "MPU")
            for seed in range(3)
        ]
        for r in (5, 20)
    ),
    "rm_gap_20": tuple(
        [cell("Pref-LaMP", row, rm=10, rouge=r) for row in GUIDES if row != "LoRE"]
        + [cell("Pref-LaMP", "LoRE", rm=18, rouge=20)]
        for r in (20.5, 25)
    ),
    "genarm_win": tuple(lamp({"GenARM": r}, win=100.0) + lamp({"Zero-Shot": 20}) for r in (19, 22)),
    "global_win": tuple(
        [cell("Pref-LaMP", row, rm=18 if row == "Global RM" else 10, rouge=20, win=w) for row in GUIDES] for w in (100.0, 60.0)
    ),
    "t6_range": (
        [
            cell("Pref-LaMP", row, seed=n, rm=8 + n, policy=8 + n, win=50.0 + n, rouge=30 + n % 2)
            for row in GUIDES
            for n in range(3)
        ],  # seeds that go up and down again: tau is 0 whichever methods are drawn
        *(
            [cell("Pref-LaMP", row, rm=8 + n, policy=8 + n, win=50.0 + n, rouge=30 + s * n) for n, row in enumerate(GUIDES)]
            for s in (-1, 1)
        ),
    ),
    "blind": tuple(rows("Pref-LaMP", guided(r, **{"word overlap": 15}), "rm") for r in (15, 18)),
    "form": tuple(
        [one for data in ("TLDR", "PRISM", "Pref-LaMP") for one in rows(data, {"Zero-Shot": 12, UNGUIDED: p}, "policy")]
        for p in (15, 12)
    ),
    "same_content": tuple(rows(None, {**dict.fromkeys(PERSONAL, 10), "PAL": p, "Global RM": 12}, "rm") for p in (15, 10)),
}


FLIPS = {id: [thrice(cells) for cells in sides] for id, sides in FLIPS.items()}


def test_every_claim_has_cells_that_turn_it():
    assert set(FLIPS) == {claim.__name__ for claim in CLAIMS}
    assert [claim.__name__ for claim in CLAIMS] == [one["id"] for one in findings([], PAPER, "cpu")]


@pytest.mark.parametrize("id", FLIPS)
def test_a_verdict_turns_with_its_cells(id):
    own, *others = (verdict(id, cells) for cells in FLIPS[id])
    for other in others:
        assert (own["verdict"], other["verdict"]) == (HOLDS, FAILS), (own, other)
        assert own["claim"] == other["claim"] and own["rule"] == other["rule"]  # nothing but numbers knows the result
    assert all(set(one["cells"]) <= set(map(results.name, FLIPS[id][0])) and one["cells"] for one in own["ours"])


@pytest.mark.parametrize("id", FLIPS)
def test_few_users_decide_nothing(id):
    """The same outcomes of fewer than LEAST users, or of fewer methods: no verdict."""
    few = []
    for one in FLIPS[id][0]:
        values = dict(one["values"])
        cut = lambda found: made.accuracy({u: e for u, e in found["each"].items() if int(u[1:]) < LEAST - 1})  # noqa: E731
        if "rm_accuracy" in values:
            values["rm_accuracy"] = cut(values["rm_accuracy"])
        values["policy_accuracy"] = {
            k: {f: cut(a) for f, a in v.items()} for k, v in values.get("policy_accuracy", {}).items()
        }
        if "generations" in values:
            values["generations"] = dict(values["generations"])
            if "win_rate" in values["generations"]:
                values["generations"]["win_rate"] = {"win_rate": 100.0, "n": 3, "each": {"u0": "111"}}
        few.append(one | {"values": values, "answers": one["answers"][: LEAST - 1]})
    if "corr" in id or "tau" in id or id == "t6_range":
        few = [one for one in FLIPS[id][0] if one["row"] in ("LoRE", "MPU", "VPL")]
    assert verdict(id, few)["verdict"] in (OPEN, UNTESTABLE)


UNTRAINED = {"rag_over_icl", "icl_shots", "weight_0", "form"}  # claims about rows for which nothing is trained


@pytest.mark.parametrize("id", FLIPS)
def test_few_seeds_decide_nothing(id):
    """A trained row with two seeds: another training run may differ. Demonstrations and decoders need one."""
    for cells in FLIPS[id]:
        found = verdict(id, [one for one in cells if one["seed"] < (1 if id in UNTRAINED else LEAST_SEEDS - 1)])
        if id in UNTRAINED:
            assert found["verdict"] == verdict(id, cells)["verdict"]
        else:
            assert found["verdict"] == OPEN
            assert {one["why"] for one in found["ours"]} == {"2 seeds: another training run may differ"}


def test_rounding_is_not_taken_for_the_decoder():
    for cells in FLIPS["weight_0"]:
        texts = [one | {"answers": [answer | {"text": one["row"]} for answer in one["answers"]]} for one in cells]
        found = verdict("weight_0", [one | {"dtype": "bfloat16"} for one in texts])
        assert found["verdict"] == OPEN and "round differently" in found["reason"]
    cells = [one | {"dtype": "bfloat16"} for one in FLIPS["weight_0"][0]]
    plain = {one["policy"]: one for one in cells if one["row"] == "Zero-Shot"}
    copied = [one | {name: plain[one["policy"]][name] for name in ("values", "answers")} for one in cells]
    found = verdict("weight_0", copied)  # the same answers, word for word: there is nothing to be taken for anything
    assert found["verdict"] == FAILS and all(one["mean"] == 0 for one in found["ours"])


@pytest.mark.parametrize("id", FLIPS)
def test_what_is_missing_is_said(id):
    assert verdict(id, [])["verdict"] == UNTESTABLE and "reproduce cpu" in verdict(id, [])["reason"]
    one = verdict(id, FLIPS[id][0][:1])
    assert one["verdict"] in (OPEN, UNTESTABLE)
    said = r"1 methods, 5 are needed" if id in ("tau_range", "prism_tau", "t6_range") else r"Missing: |Needs "
    assert re.search(said, one["reason"]), one["reason"]


def test_intervals_that_decide_are_those_of_the_tables():
    values = [18.0, 21, 20, 24, 19, 22, 21, 23]
    sides = []
    for row in ("Zero-Shot", "ICL"):
        one = cell("Pref-LaMP", row, rouge=20)
        for answer, more in zip(one["answers"], values, strict=True):
            answer["rouge1"] = more if row == "ICL" else 20
        sides.insert(0, [one])
    measure = lambda one: results.text(one, "rouge1")  # noqa: E731
    (decides,), shown = decided([difference("x", *sides, measure, above())]), results.difference(*sides, measure)
    assert (decides["low"], decides["high"]) == (shown["low"], shown["high"])


def test_commands_name_rows_that_exist():
    rows = {*made.ROWS, *(f"{row}, {shots} shots" for row in ("ICL", "ICL-RAG") for shots in (2, 4, 16))}
    for one in findings([cell(data, "no row", rm=10) for data in SETS], PAPER, "cpu"):
        named = re.findall(r"`python -m experiments reproduce cpu --only (.*?)(?: --sets (\w+))?`", one["reason"])
        assert all(set(shlex.split(words)) <= rows for words, _ in named), one["reason"]
        assert all(name == SETS.get(one["data"], "same_content" * (one["data"] in SETS.values())) for _, name in named)
        assert one["verdict"] == UNTESTABLE and (named or "Needs" in one["reason"])
