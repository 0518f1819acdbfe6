"""The report from made-up cells: one file, no stranger's text, gaps said."""

from __future__ import annotations

import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cells as made
import pytest
from cells import ROOT

from experiments import report
from experiments.__main__ import main
from experiments.claims.common import same_answers
from experiments.tables import table
from experiments.tables.render import shown
from pyargs import files
from pyargs.errors import PyargsError


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
