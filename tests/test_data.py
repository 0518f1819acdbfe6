"""Data sets by name: loading, building from their sources, checking. Real data where ../shared/data is there."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rows import DIALOGUES, lamp, prism, row, tldr_source, write

from pyargs import cli, data, prepare
from pyargs.data import sources
from pyargs.data.sets import hh_rlhf_users, persona_statements
from pyargs.data.sets import pref_lamp as lamp_files
from pyargs.errors import PyargsError
from pyargs.prepare import check, pref_lamp, preferences, tldr
from pyargs.prepare import prism as prism_set

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
CI = SHARED / "pref_lamp_like" / "ci"
needs_shared = pytest.mark.skipif(not CI.is_dir(), reason="the data pack ../shared/data is not here")


# ---- load by name ----


def test_load_by_name(tmp_path):
    assert {"demo", "synthetic", "preferences", "pref_lamp", "hh_rlhf_users"} <= set(data.names())
    assert prepare.names() == ["pref_lamp", "preferences", "prism", "tldr"]
    for call, message in [
        (lambda: data.load("dmeo"), "No data set and no file 'dmeo'. Did you mean: demo"),
        (lambda: data.load("pref_lamp"), "needs a source"),
        (lambda: data.load("demo", "somewhere"), "takes no source"),
        (lambda: data.load("synthetic", usres=3), "no option 'usres'. Did you mean: users"),
        (lambda: data.load(write(tmp_path / "a.jsonl", [row()]), "other"), "is a file or folder already"),
        (lambda: data.load("tldr", tmp_path), "pyargs data build tldr"),
        (lambda: prepare.build("demo", tmp_path, tmp_path / "out"), "'demo' is not built"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()


def test_show_command(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(prompt=f"p{i}") for i in range(10)])
    command = [sys.executable, "-m", "pyargs.cli", "data"]
    shown = json.loads(subprocess.run([*command, "show", path], capture_output=True, check=True).stdout)
    assert shown["pairs"] == 10 and shown["splits"]["train_test"]["pairs"] == 2
    assert shown["words"]["chosen"] == {"min": 1, "median": 1.0, "mean": 1, "max": 1} and len(shown["sha256"]) == 64
    wrong = subprocess.run([*command, "show", "no-such"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert subprocess.run(command, capture_output=True).returncode == 2


# ---- the hub ----


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(PyargsError, match="huggingface.co/datasets/openai/summarize_from_feedback"):
        tldr.build("hub", tldr.Config())


def test_sets_of_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub, and that the folder which comes back is read like a local one."""
    import huggingface_hub

    served = {
        "openai/summarize_from_feedback": (tldr_source(tmp_path / "tldr"), "refs/convert/parquet", tldr.Config(support=4)),
        "HannahRoseKirk/prism-alignment": (prism(tmp_path / "prism", DIALOGUES), None, prism_set.Config()),
    }

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset" and revision == served[repo][1]
        return str(served[repo][0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for module, (source, _, config) in zip((tldr, prism_set), served.values(), strict=True):
        assert module.build("hub", config) == module.build(str(source), config)


def test_lamp_from_its_server(server, tmp_path, monkeypatch, encoder):
    served = lamp(tmp_path / "lamp", {"1": ("train", 4), "2": ("train", 4), "3": ("dev", 4), "4": ("dev", 4)})
    for path in served.iterdir():
        target = server.folder / path.name.split("_")[0] / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(pref_lamp, "ADDRESS", server.address)
    found = prepare.build("pref_lamp", "hub", tmp_path / "out", pref_lamp.Config(embedder=encoder, k=2, near=1.1))
    assert found["counts"]["papers"] == 20 and set(found["sources"]) == {path.name for path in served.iterdir()}


# ---- LaMP-5 ----


@pytest.mark.parametrize("gz", [False, True])
def test_lamp_items(tmp_path, gz):
    found = lamp_files.items(lamp(tmp_path, gz=gz))
    assert found["item_id"][:] == ["10", "1", "20", "2", "30", "3"]
    assert found["title"][:] == [f"Title {item}" for item in found["item_id"]]
    assert found["user_split"][:] == ["train"] * 4 + ["adapt"] * 2
    assert found[0]["prompt"] == "Generate a title for the following abstract of a paper: About 10."
    assert (found[0]["date"], found[0]["role"], found[1]["date"], found[1]["role"]) == ("2010", "profile", None, "question")


def test_lamp_pairs_are_checked_against_the_papers(tmp_path):
    def pair(item: str, role: str, **changes) -> dict:
        text = {"prompt": f"{lamp_files.INSTRUCTION}About {item}.", "chosen": f"Title {item}", "rejected": "Other"}
        return {"user": item[0], "role": role, "pair_id": item} | text | changes

    folder = lamp(tmp_path)
    with pytest.raises(PyargsError, match="found preference files none.*pyargs data build"):
        lamp_files.load(folder)
    prefs = write(folder / "prefs.jsonl", [pair("10", "train"), pair("1", "train"), pair("30", "support"), pair("3", "query")])
    assert lamp_files.load(folder)["split"][:] == data.load("pref_lamp", prefs)["split"][:]
    write(prefs, [pair("10", "train", chosen="Not the title")])
    with pytest.raises(PyargsError, match="pair 10 does not match"):
        lamp_files.load(folder)


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


def test_options_that_cannot_be(tmp_path):
    source = lamp(tmp_path / "lamp")
    for config, message in [
        (pref_lamp.Config(embedder="none"), "neighbours need an embedder"),
        (pref_lamp.Config(near=0.0), "near is a cosine above 0"),
        (pref_lamp.Config(near=float("nan")), "near is a cosine above 0"),
    ]:
        if config.near != 0.95:
            config.embedder = "minilm"
        with pytest.raises(PyargsError, match=message):
            pref_lamp.build(str(source), config) if config.near != 0.95 else prepare.build(
                "pref_lamp", source, tmp_path / "o", config
            )
    late = pref_lamp.Config(negatives="policy", embedder="nobody/nothing", policy="nobody/else")
    with pytest.raises(PyargsError, match="cannot load the embedding model"):  # before a title is written
        prepare.build("pref_lamp", source, tmp_path / "out", late)
    with pytest.raises(PyargsError, match="no official place"):
        prepare.build("preferences", "hub", tmp_path / "out", preferences.Config(embedder="none"))


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


# ---- the command ----


def test_build_command(tmp_path, capsys):
    def call(*words: str) -> tuple[int, dict, str]:
        try:
            code = cli.main(["data", "build", "tldr", "--source", source, *words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, json.loads(out or "{}"), err

    source = str(tldr_source(tmp_path / "source"))
    options = ["--out", str(tmp_path / "out"), "--embedder", "none", "--support"]
    code, done, err = call(*options, "4")
    assert code == 0, err
    assert done["counts"]["train rows"] == 306 and (tmp_path / "out.stage.json").is_file()
    assert call(*options, "4")[1]["already_done"]
    code, _, err = call(*options[:-1])
    assert code == 1 and "other settings" in err
    assert call(*options, "4", "--k", "3")[0] == 2
    code, _, err = call("--out", str(tmp_path / "source" / "out"), "--support", "4")
    assert code == 1 and "inside the source" in err
    assert call("--out", str(tmp_path / "new"), "--support", "6")[0] == 1
    assert not (tmp_path / "new.stage.json").exists()


# ---- the other sets ----


def test_turns_of_a_dialogue():
    found = hh_rlhf_users.messages("Human: Hi\nthere\n\nAssistant: Yes?\n\nHuman: One\n\nHuman: Two")
    assert found == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "One\n\nTwo"},
    ]
    assert hh_rlhf_users.messages("no mark") == [{"role": "user", "content": "no mark"}]
    assert hh_rlhf_users.messages("Human: a\n\nAssistant: \n\nHuman: b") == [{"role": "user", "content": "a\n\nb"}]


@needs_shared
def test_real_titles():
    pairs, papers = data.load("pref_lamp", CI), lamp_files.items(CI)
    assert len(papers) == len(pairs) == 1291 and papers.filter(lambda p: p["role"] == "question").num_rows == 40
    counts = {split: pairs["split"][:].count(split) for split in data.SPLITS}
    assert counts["train"] + counts["train_test"] == 960 and counts["support"] + counts["query"] == 331
    assert abs(counts["train_test"] - 30 * 6) <= 3 and len(set(pairs["user_id"])) == 40


@needs_shared
@pytest.mark.parametrize(
    ("name", "options", "pairs", "splits"),
    [
        ("hh_rlhf_users", {}, 6100, {"train": 10, "train_test": 10, "support": 31, "query": 31}),
        ("hh_rlhf_users", {"users": "two_types"}, 3198, {"train": 40, "train_test": 40, "support": 20, "query": 20}),
        ("persona_statements", {}, 4800, {"train": 60, "train_test": 60, "support": 20, "query": 20}),
        ("pandalm_annotators", {}, 2489, {"train": 3, "train_test": 3}),
        ("pandalm_annotators", {"new_user": "annotator1"}, None, {"train": 2, "train_test": 2, "support": 1, "query": 1}),
    ],
)
def test_other_real_sets(name, options, pairs, splits):
    dataset = data.load(name, SHARED / name, **options)
    assert pairs is None or len(dataset) == pairs
    found = {s: set(data.of_split(dataset, s)["user_id"]) for s in data.SPLITS}
    assert {s: len(users) for s, users in found.items() if users} == splits
    chat = [r["prompt"] for r in dataset if isinstance(r["prompt"], list)]
    assert all(p[-1]["role"] == "user" and all(a["role"] != b["role"] for a, b in zip(p, p[1:], strict=False)) for p in chat)
    assert bool(chat) == (name == "hh_rlhf_users")
    told = check.check(((str(i), r) for i, r in enumerate(dataset)), embedder=None)
    assert told["problems"] == {}


@needs_shared
def test_signs_of_the_simulated_people():
    signs = persona_statements.signs(SHARED / "persona_statements")
    assert len(signs) == 80 and all(len(of) == 10 and set(of.values()) <= {1, -1} for of in signs.values())
    dataset = data.load("persona_statements", SHARED / "persona_statements")
    assert set(dataset["user_id"]) == set(signs) and set(dataset["attribute"]) == set(next(iter(signs.values())))


def test_pandalm_needs_a_known_annotator(tmp_path):
    rows = [row(user=f"annotator{i % 3}", role="all", prompt=f"p{i // 3}") for i in range(60)]
    path = write(tmp_path / "prefs.jsonl", rows)
    with pytest.raises(PyargsError, match="No annotator 'annotator7'. Did you mean"):
        data.load("pandalm_annotators", path, new_user="annotator7")
    dataset = data.load("pandalm_annotators", path, new_user="annotator1")
    new = {r["prompt"] for r in dataset if r["user_id"] == "annotator1"}
    assert new and not new & {r["prompt"] for r in dataset if r["user_id"] != "annotator1"}
