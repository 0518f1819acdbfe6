"""Titles by author from LaMP-5: splits, hard negatives, the policy's own titles, damage."""

from __future__ import annotations

import gzip
import json

import pytest
from rows import lamp

from pyargs import data, prepare
from pyargs.data import sources
from pyargs.data.sets import pref_lamp as lamp_files
from pyargs.errors import PyargsError
from pyargs.prepare import pref_lamp


def test_lamp_from_its_server(server, tmp_path, monkeypatch, encoder):
    served = lamp(tmp_path / "lamp", {"1": ("train", 4), "2": ("train", 4), "3": ("dev", 4), "4": ("dev", 4)})
    for path in served.iterdir():
        target = server.folder / path.name.split("_")[0] / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(pref_lamp, "ADDRESS", server.address)
    found = prepare.build("pref_lamp", "hub", tmp_path / "out", pref_lamp.Config(embedder=encoder, k=2, near=1.1))
    assert found["counts"]["papers"] == 20 and set(found["sources"]) == {path.name for path in served.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, g: q[1]["profile"][0].update(title=" "), r"question 2 \(id 2\), profile entry 1: title is empty"),
        (lambda q, g: q[1]["profile"][0].update(abstract=None), "profile entry 1: abstract is NoneType"),
        (lambda q, g: q[0]["profile"].append(q[0]["profile"][0]), "question 1 .* profile entry 2: the id 10 is there twice"),
        (lambda q, g: q.append(q[0]), "train_questions.json, question 3: the id 1 is there twice"),
        (lambda q, g: g.append(g[0]), "train_outputs.json, gold 3: the id 1 is there twice"),
        (lambda q, g: g.pop(), "question 2 .*train_outputs.json has no output"),
        (lambda q, g: g[1].update(output=""), r"train_outputs.json, gold 2 \(id 2\): output is empty"),
        (lambda q, g: q[1].update(profile=[]), "train_questions.json: user 2 has a single paper"),
        (lambda q, g: q[0].update(input="Write a tweet"), "not LaMP-5"),
        (lambda q, g: q[0].update(input=lamp_files.INSTRUCTION), "abstract is empty"),
        (lambda q, g: q.insert(0, "x"), "not an array of objects"),
        (lambda q, g: q[1]["profile"][0].update(title="\u200b..."), "without a letter or digit"),
        (lambda q, g: q[1]["profile"][0].update(id=None), "profile entry 1: the id is None"),
        (lambda q, g: q[1]["profile"][0].update(date=[2010]), r"profile entry 1: date is \[2010\]"),
        (lambda q, g: q[1]["profile"][0].update(date=True), "date is True"),
        (lambda q, g: (q.clear(), g.clear()), "train_questions.json: no users to train on"),
    ],
)
def test_lamp_names_what_is_wrong(tmp_path, change, message):
    with pytest.raises(PyargsError, match=message):
        pref_lamp.build(str(lamp(tmp_path / "lamp", change=change)), pref_lamp.Config())


def test_lamp_refuses_other_data(tmp_path):
    with pytest.raises(PyargsError, match="no train_questions.json"):
        lamp_files.items(tmp_path)
    (tmp_path / "train_questions.json").write_text("[{")
    with pytest.raises(PyargsError, match="damaged or not JSON"):
        lamp_files.items(tmp_path)
    (tmp_path / "train_questions.json").unlink()
    whole = gzip.compress(json.dumps([{"id": i} for i in range(2000)]).encode())
    (tmp_path / "train_questions.json.gz").write_bytes(whole[:-50])
    with pytest.raises(PyargsError, match="train_questions.json.gz is damaged"):
        lamp_files.items(tmp_path)
    with pytest.raises(PyargsError, match="No file or folder"):
        lamp_files.load(tmp_path / "nowhere")
    folder = lamp(tmp_path / "lamp")
    (folder / "dev_outputs.json").unlink()
    with pytest.raises(PyargsError, match="dev_outputs.json .*is missing"):
        pref_lamp.build(str(folder), pref_lamp.Config())


def test_pref_lamp(tmp_path, encoder):
    users = {"1": ("train", 9), "2": ("train", 14), "3": ("train", 4), "7": ("dev", 9), "8": ("dev", 4)}
    source, out = lamp(tmp_path / "lamp", users), tmp_path / "out"
    config = pref_lamp.Config(embedder=encoder, k=3, near=1.1)
    found = prepare.build("pref_lamp", source, out, config)
    rows = [r for split in data.SPLITS for _, r in sources.rows(out / f"{split}.parquet")]
    papers = {p["item_id"]: p for p in lamp_files.items(source)}
    assert len(rows) == len(papers) == 45 and found["check"]["problems"] == {}
    for r in rows:
        mine, other = papers[r["pair_id"]], papers[r["similar"]]
        assert (r["user_id"], r["prompt"], r["chosen"]) == (mine["user_id"], mine["prompt"], mine["title"])
        assert r["rejected"] == other["title"] and other["user_id"] != r["user_id"]
        assert other["user_split"] == mine["user_split"]
    for user, (kind, count) in users.items():
        own = [r for r in rows if r["user_id"] == user]
        sides = [{r["rejected"] for r in own if (r["split"] in ("train_test", "query")) is held} for held in (True, False)]
        assert all(sides) and not sides[0] & sides[1], "nothing is rejected again where it counts"
        held = [r for r in own if r["split"] in ("train_test", "query")]
        assert len(held) == int(0.2 * (count + 1) + 0.5)
        if kind == "dev":  # the newest, and the question
            dates = {s: [r["date"] for r in own if r["split"] == s and r["date"]] for s in ("support", "query")}
            assert user in {r["pair_id"] for r in held} and max(dates["support"]) <= min(dates["query"], default="3000")
    again = prepare.build("pref_lamp", source, tmp_path / "again", config)
    assert again["statistics"]["sha256"] == found["statistics"]["sha256"] and again["files"] == found["files"]
    other = prepare.build("pref_lamp", source, tmp_path / "other", pref_lamp.Config(embedder=encoder, k=3, near=1.1, seed=1))
    assert other["statistics"]["sha256"] != found["statistics"]["sha256"]
    from datasets import load_dataset

    assert {name: len(part) for name, part in load_dataset(str(out)).items()} == {
        name: s["pairs"] for name, s in found["statistics"]["splits"].items()
    }


def test_pref_lamp_draws_users(tmp_path, encoder):
    users = {str(i): ("train" if i < 14 else "dev", 3) for i in range(10, 22)}
    config = pref_lamp.Config(embedder=encoder, k=2, near=1.1, users=10)
    found = prepare.build("pref_lamp", lamp(tmp_path / "lamp", users), tmp_path / "out", config)
    splits = found["statistics"]["splits"]
    assert splits["train"]["users"] == 8 and splits["query"]["users"] == 2
    with pytest.raises(PyargsError, match="users=13, but the source has 12"):
        pref_lamp.build(str(tmp_path / "lamp"), pref_lamp.Config(embedder=encoder, users=13))


def test_a_paper_is_there_once(tmp_path, encoder):
    """Neither twice in a profile, nor with a train user and a new one: its title would be known from another split."""

    def change(questions, golds):
        first, second = questions
        first["profile"][1] |= {"title": "TITLE 10!", "abstract": "The same title again."}
        second["profile"][0] |= {"title": "Title 30", "abstract": "A paper of user 3, too."}

    users = {"1": ("train", 5), "2": ("train", 5), "3": ("dev", 4), "4": ("dev", 4)}
    config = pref_lamp.Config(embedder=encoder, k=2, near=1.1)
    found = prepare.build("pref_lamp", lamp(tmp_path / "lamp", users, change=change), tmp_path / "out", config)
    assert found["counts"]["papers that a user has twice, dropped"] == 1
    assert found["counts"]["papers of train users that new users have, dropped"] == 1
    titles = data.load(tmp_path / "out")["chosen"][:]
    assert titles.count("Title 30") == 1 and sum(t.casefold().startswith("title 10") for t in titles) == 1
    assert found["check"]["problems"] == {}


def test_years_and_dates_of_any_kind(tmp_path, encoder):
    def change(questions, golds):
        for number, paper in enumerate(questions[0]["profile"]):
            paper["date"] = ["2011-05-06", 2012, "2013", 10**30][number % 4]

    users = {"1": ("train", 5), "2": ("train", 5), "3": ("dev", 4), "4": ("dev", 4)}
    config = pref_lamp.Config(embedder=encoder, k=2, near=1.1)
    prepare.build("pref_lamp", lamp(tmp_path / "lamp", users, change=change), tmp_path / "out", config)
    assert len(data.load(tmp_path / "out")) == 22


def test_ids_of_items_that_several_users_have_are_told_apart(tmp_path, encoder):
    source = lamp(
        tmp_path / "lamp",
        {str(i): ("train" if i < 3 else "dev", 3) for i in range(1, 5)},
        change=lambda q, g: [
            paper.update(id=str(number)) for question in q for number, paper in enumerate(question["profile"], 100)
        ],
    )
    found = prepare.build("pref_lamp", source, tmp_path / "out", pref_lamp.Config(embedder=encoder, k=2, near=1.1))
    assert found["statistics"]["pair_ids"] == 16


def test_pref_lamp_against_the_policys_own_titles(tmp_path):
    users = {"1": ("train", 4), "7": ("dev", 4)}
    config = pref_lamp.Config(negatives="policy", policy="tiny-random", embedder="none", max_new_tokens=5)
    found = prepare.build("pref_lamp", lamp(tmp_path / "lamp", users), tmp_path / "out", config)
    dataset = data.load(tmp_path / "out")
    assert (
        len(dataset) + found["counts"]["titles of the policy that are empty, dropped"]
        == 10
        > found["counts"]["titles of the policy that are the author's, dropped"]
    )
    assert all("\n" not in r["rejected"] and r["rejected"] == pref_lamp.clean_title(r["rejected"]) for r in dataset)
    again = prepare.build("pref_lamp", tmp_path / "lamp", tmp_path / "again", config)  # from the kept answers
    assert again["statistics"]["sha256"] == found["statistics"]["sha256"]


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("A Plain Title", "A Plain Title"),
        ('\n"Quoted: A Title"\nand more', "Quoted: A Title"),
        ("**Title: A Marked One**\n\nIt says", "A Marked One"),
        ("# Title:\nBelow", "Below"),
        ("“Curly”", "Curly"),
        (" \n**\n", ""),
    ],
)
def test_clean_title(answer, title):
    assert pref_lamp.clean_title(answer) == title
