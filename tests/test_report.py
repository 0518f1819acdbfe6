"""The report and its findings from made-up cells: verdicts turn with the cells, no stranger's text, one file, gaps said."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cells as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import report, results
from experiments.__main__ import main
from experiments.claims import CLAIMS, FAILS, HOLDS, OPEN, UNTESTABLE, findings, world
from experiments.claims.common import PERSONAL, same_answers
from experiments.claims.verdicts import (
    LEAST,
    LEAST_SEEDS,
    above,
    all_of,
    any_of,
    at_least,
    at_most,
    below,
    comparison,
    decided,
    difference,
    within,
)
from experiments.tables import table
from experiments.tables.render import shown
from experiments.tables.specs import GUIDES, PRISM_EIGHT, PRISM_ROWS, TLDR_EIGHT, UNGUIDED
from pyargs import files
from pyargs.errors import PyargsError

ROOT = Path(__file__).resolve().parent.parent
PAPER = files.read_json(ROOT / "experiments/expected/paper.json")
USERS, PAIRS = 8, 20
SETS = {"TLDR": "length_prefs", "PRISM": "two_types", "Pref-LaMP": "pref_lamp", None: "same_content"}


# --- claims


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
    return next(claim for claim in CLAIMS if claim.__name__ == id)(world(cells, PAPER, "cpu"))


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


numbers = st.floats(-100, 100)


@given(numbers, numbers, numbers, st.floats(0, 50))
def test_tests_are_for_the_whole_interval(one, two, bound, near):
    interval = {"mean": (one + two) / 2, "low": min(one, two), "high": max(one, two)}
    opposite = {True: False, False: True, None: None}
    assert at_most(bound)(interval) is opposite[above(bound)(interval)]
    assert at_least(bound)(interval) is opposite[below(bound)(interval)]
    assert (above(bound)(interval) is True) == (interval["low"] > bound)
    if within(bound - near, bound + near)(interval):
        assert not above(bound + near)(interval) and not below(bound - near)(interval)
    for one, users in ((interval | {"low": None, "high": None}, 99), (interval, LEAST - 1)):
        (made,) = decided([comparison("", lambda level, one=one: one, [], above(bound), users)])
        assert made["for"] is made["low"] is None and made["why"]


def test_many_comparisons_need_wider_intervals():
    """One row in forty lies above by chance: a claim that some row of 40 does must not hold by that."""
    asked = []

    def measured(level):
        asked.append(level)
        return {"mean": 1.0, "low": 0.1 if level < 0.96 else -0.1, "high": 2.0}

    one = comparison("x", measured, [], above(), 99)
    (alone,) = decided([one])
    many = decided([one] * 40)
    assert alone["for"] is True and alone["level"] == pytest.approx(0.95)
    assert {(each["for"], each["level"]) for each in many} == {(None, asked[-1])} and asked[-1] == pytest.approx(1 - 0.05 / 40)


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


@given(st.lists(st.sampled_from([True, False, None]), min_size=1), st.lists(st.just("VPL"), max_size=1))
def test_one_against_is_enough_and_one_open_is_too_much(kinds, lacking):
    found = [{"what": "x", "mean": 0.0, "low": 0.0, "high": 0.0, "why": "", "for": kind} for kind in kinds]
    every = all_of(found, lacking)[0]
    assert every == (FAILS if False in kinds else HOLDS if all(kinds) and not lacking else OPEN)
    turned = [one | {"for": None if one["for"] is None else not one["for"]} for one in found]
    assert any_of(turned, lacking)[0] == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[every]  # some = not every not


# --- the page


class Resources(HTMLParser):
    """Everything that a browser would fetch, all tags, and ids with the links to them."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.tags, self.ids, self.links, self.open = [], set(), [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "srcset", "data", "poster", "action")]
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag not in ("meta", "br", "img", "hr", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag or tag in ("li", "p")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of two sets beside the paper's numbers; one has answers with more in them than may be shown."""
    root = tmp_path_factory.mktemp("experiments")
    shutil.copytree(ROOT / "experiments/expected", root / "expected")
    for row in (*made.ROWS, "ICL, 2 shots"):
        one = made.cell(row)
        for answer in one["answers"]:
            answer |= {
                "text": f"{row} <i>{answer['pair_id']}</i> & more",
                "prompt": "SECRET abstract",
                "chosen": "SECRET title",
            }
        made.write(root / "results", one)
    made.write(
        root / "results", *(made.cell(row, set="length_prefs", stands_for="TLDR", answers=[]) for row in ("LoRE", "MPU"))
    )
    broken = made.cell("VPL", 1)
    broken["values"]["generations"]["perplexity"] = float("inf")
    made.write(root / "results", broken)
    return root / "results"


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory) -> Path:
    """The data set that the cells' answers are of, as a file."""
    ids = [(answer["user_id"], answer["pair_id"]) for answer in made.cell("LoRE")["answers"]]
    rows = [
        {
            "user_id": user,
            "prompt": f"ABSTRACT <{pair}>",
            "chosen": f"AUTHOR <{pair}>",
            "rejected": f"STRANGER <{pair}>",
            "split": "query",
            "pair_id": pair,
        }
        for user, pair in ids
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    files.write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", "--results", str(folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page):
    found = Resources(page)
    assert all(one.startswith("data:image/png;base64,") for one in found.fetched) and len(found.fetched) == 3
    assert not found.tags & {"script", "link", "iframe", "object", "base"} and "@import" not in page and "url(" not in page
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(set(found.ids)) == len(found.ids) and found.open == []


def test_without_the_data_no_text_of_it_is_in_the_page(page, pairs):
    assert "SECRET" not in page and "AUTHOR" not in page and "ABSTRACT" not in page
    for row in files.read_jsonl(pairs):
        assert not any(form(row[key]) in page for key in ("prompt", "chosen", "rejected") for form in (str, html.escape))


def test_with_the_data_the_users_own_text_stands_beside_ours(folder, pairs, tmp_path):
    out = tmp_path / "own.html"
    assert main(["report", "--results", str(folder), "--data", str(pairs), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    own = re.findall(r"AUTHOR &lt;(user \d-\d)&gt;", page)
    assert len(own) == report.USERS * report.PROMPTS == len(set(own))
    for pair in own:
        assert f"ABSTRACT &lt;{pair}&gt;" in page and f"LoRE &lt;i&gt;{pair}&lt;/i&gt; &amp; more" in page
    assert re.search(r"\d of its \d words stand in one run in the prompt", page)
    assert "STRANGER" not in page and "AUTHOR <" not in page and "mind its licence" in page


def test_data_that_are_not_the_cells(folder, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    files.write_jsonl(
        path, [{"user_id": "x", "prompt": "p", "chosen": "c", "rejected": "r", "split": "query", "pair_id": "1"}]
    )
    assert main(["report", "--results", str(folder), "--data", str(path), "--out", str(tmp_path / "o.html")]) == 1
    assert "sets with answers: pref_lamp" in capsys.readouterr().err and not (tmp_path / "o.html").exists()
    assert main(["report", "--results", str(folder), "--source", "x", "--out", str(tmp_path / "o.html")]) == 1


def test_texts_are_escaped_and_numbers_are_numbers(page):
    assert "<i>user" not in page and "&lt;i&gt;user" in page
    text = re.sub(r"data:image[^\"]*|<style>.*?</style>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b|>None<|\bFalse\b|\bTrue\b|\{\{|\[object", text, flags=re.I) and "∞" in text


def test_what_is_there_and_what_is_missing(page, folder):
    text = re.sub(r"<[^>]+>", " ", page)
    assert "stands in for TLDR, which it is not" in text and "pref_lamp_like/ci, 40 users" in text
    assert "LoRE (seeds 1, 2)" in text and "two_types is missing as a whole" in re.sub(r"\s+", " ", text)
    assert "python -m experiments reproduce cpu" in text and "Pref-LaMP (here: pref_lamp)" in text
    made_of, _ = table("9", folder)
    for row in made_of.rows:
        for column in made_of.columns:
            assert (
                html.escape(shown(row.get(column.key), column, "±", "–", "−")) in page
            )  # the page has the tables' own numbers
    for path in folder.glob("*/*/*/*.json"):
        assert str(path.relative_to(folder)) in page  # the list of cells


def test_texts_that_are_left_out(tmp_path, pairs):
    """They are compared by their digests, and the page says how much they copy."""
    whole, left, same = (made.cell(row) for row in ("LoRE", "MPU", "VPL"))
    for one, digest in ((whole, "aa"), (left, "bb"), (same, "bb")):
        for answer in one["answers"]:
            answer |= {"digest": digest, "words": 12} | ({} if one is whole else {"text": None, "copied": 11})
    made.write(tmp_path / "results", whole, left, same)
    measure = same_answers([same])
    assert [measure(one)["value"] for one in (whole, left)] == [0, 100]
    out = tmp_path / "a.html"
    for data in ((), ("--data", str(pairs))):
        assert main(["report", "--results", str(tmp_path / "results"), *data, "--out", str(out)]) == 0
        page = out.read_text(encoding="utf-8")
        assert page.count("copies 11 words of its prompt or title; text left out") == report.USERS * report.PROMPTS
        assert "MPU and VPL" in page and (not data or "11 of its 12 words stand in one run in the prompt or the title" in page)


def test_a_script_beside_the_results_is_not_executed(tmp_path):
    made.write(tmp_path / "results", made.cell("word overlap", provenance={"hardware": {"cpu": "x", "threads": 1}}))
    (tmp_path / "profiles.py").write_text("open('planted', 'w')\ndef cells(profile): return []\n", encoding="utf-8")
    found = report.report(tmp_path / "results")
    assert not (tmp_path / "planted").exists() and found["grid"]["cells"] > 50, "the project's own tells the grid"
    assert found["summary"]["hardware"] == ["x, 1 thread"]


def test_one_cell_alone_and_no_paper_beside_it(tmp_path):
    made.write(tmp_path / "results", made.cell("word overlap"))
    found = report.report(tmp_path / "results")
    report.write(tmp_path / "a.html", found)
    report.write(tmp_path / "b.html", report.report(tmp_path / "results"))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert found["grid"]["there"] == 1 and "python -m experiments.paper_numbers" in page
    assert page.count("Not drawn") == 3 and "no cell of this profile has generated answers" in page
    assert page == (tmp_path / "b.html").read_text(encoding="utf-8")
    with pytest.raises(PyargsError, match=r"no cells of profile gpu"):
        report.report(tmp_path / "results", "gpu")


def test_commands_name_rows_that_exist():
    rows = {*made.ROWS, *(f"{row}, {shots} shots" for row in ("ICL", "ICL-RAG") for shots in (2, 4, 16))}
    for one in findings([cell(data, "no row", rm=10) for data in SETS], PAPER, "cpu"):
        named = re.findall(r"`python -m experiments reproduce cpu --only (.*?)(?: --sets (\w+))?`", one["reason"])
        assert all(set(shlex.split(words)) <= rows for words, _ in named), one["reason"]
        assert all(name == SETS.get(one["data"], "same_content" * (one["data"] in SETS.values())) for _, name in named)
        assert one["verdict"] == UNTESTABLE and (named or "Needs" in one["reason"])
