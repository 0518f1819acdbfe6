"""What builders of data sets share: sources and downloads, hard negatives, simulated users, the check, blind scorers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import row, write

from pyargs import cli, data, prepare
from pyargs.data import schema, sources
from pyargs.data.preferences import read
from pyargs.data.sets import pref_lamp as lamp_files
from pyargs.errors import PyargsError
from pyargs.prepare import check, mining, preferences, simulate

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
CI = SHARED / "pref_lamp_like" / "ci"
needs_shared = pytest.mark.skipif(not CI.is_dir(), reason="the data pack ../shared/data is not here")


# ---- sources ----


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.parquet"])
def test_rows_name_their_place(tmp_path, name):
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2]}), tmp_path / name)
    else:
        write(tmp_path / name, [{"x": 1}, {"x": 2}])
    places, found = zip(*sources.rows(tmp_path / name), strict=True)
    assert found == ({"x": 1}, {"x": 2}) and places[1] == f"{name}, {'row' if name.endswith('parquet') else 'line'} 2"


def test_a_byte_order_mark_and_other_line_ends_are_no_damage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n\r\n{"x": 2}\r\n')
    assert [row for _, row in sources.rows(tmp_path / "a.jsonl")] == [{"x": 1}, {"x": 2}]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(PyargsError, match="deep.jsonl"):
        list(sources.rows(tmp_path / "deep.jsonl"))


def test_damaged_sources_name_the_file_and_the_row(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [{"x": "y" * i} for i in range(3000)]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "mixed.jsonl.gz").write_bytes(whole[:100] + b"\0" * 50 + whole[150:])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    for name, message in {
        "cut.jsonl.gz": r"cut.jsonl.gz is damaged after line \d+",
        "mixed.jsonl.gz": "mixed.jsonl.gz",
        "a.parquet": "a.parquet is damaged",
    }.items():
        with pytest.raises(PyargsError, match=message):
            list(sources.rows(tmp_path / name))


@pytest.mark.parametrize("ranges", [True, False])
def test_downloads_go_on_where_they_broke_off(server, ranges):
    content = bytes(range(256)) * 20000
    (server.folder / "file.json").write_bytes(content)
    server.cut, server.ranges = 3_000_000, ranges
    with pytest.raises(PyargsError, match="run the command again"):
        sources.download(f"{server.address}/file.json", "set/file.json")
    path = sources.download(f"{server.address}/file.json", "set/file.json")
    assert path.read_bytes() == content and server.asked[1].startswith("bytes=") and server.asked[1] != "bytes=0-"
    assert sources.download("http://127.0.0.1:1/nowhere", "set/file.json") == path  # it is here
    path.write_bytes(content[:-1])
    with pytest.raises(PyargsError, match="not what was downloaded"):
        sources.download(f"{server.address}/file.json", "set/file.json")


def test_a_download_that_was_complete_but_not_noted(server):
    (server.folder / "file.json").write_bytes(b"whole")
    part = sources.cache_dir() / "data" / "set" / "file.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"whole")
    assert sources.download(f"{server.address}/file.json", "set/file.json").read_bytes() == b"whole"
    with pytest.raises(PyargsError, match="404"):
        sources.download(f"{server.address}/other.json", "set/other.json")


# ---- hard negatives ----


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 8), st.integers(1, 4))
def test_negatives_are_near_and_another_users(seed, users, each, k):
    rng = np.random.default_rng(seed)
    names = [str(u) for u in range(users) for _ in range(each)]
    vectors = rng.standard_normal((len(names), 6)).astype(np.float32)
    titles = [f"title {i}" for i in range(len(names))]
    for row_, other in zip(rng.integers(0, len(names), 2), rng.integers(0, len(names), 2), strict=True):
        titles[row_], vectors[row_] = titles[other].upper() + "!", vectors[other]  # a paper of two users, or one twice
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    try:
        found = mining.hard_negatives(names, titles, vectors, k=k, near=0.999, seed=seed)
    except PyargsError as error:
        assert "are left" in str(error)
        return
    cosines = vectors @ vectors.T
    for i, negative in enumerate(found):
        own = {schema.plain(t) for t, u in zip(titles, names, strict=True) if u == names[i]}
        assert schema.plain(titles[negative.row]) not in own and cosines[i, negative.row] < 0.9991
        better = {
            schema.plain(t)
            for j, t in enumerate(titles)
            if schema.plain(t) not in own and cosines[i, negative.row] + 1e-5 < cosines[i, j] < 0.9989
        }
        assert len(better) <= negative.rank < k


def test_a_draw_depends_on_user_and_key_alone():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    users, keys = [str(i % 8) for i in range(40)], [str(i) for i in range(40)]
    titles = [f"t{i}" for i in range(40)]
    order = rng.permutation(40)
    one = mining.hard_negatives(users, titles, vectors, k=4, keys=keys)
    two = mining.hard_negatives(
        *([x[i] for i in order] for x in (users, titles)), vectors[order], k=4, keys=[keys[i] for i in order]
    )
    assert [titles[one[i].row] for i in order] == [titles[order[n.row]] for n in two]
    assert len({n.rank for n in one}) == 4  # not always the nearest
    limit = 0.3
    far = mining.hard_negatives(users, titles, vectors, k=2, keys=keys, near=limit)
    assert all(n.cosine < limit for n in far) and max(n.cosine for n in one) > limit
    with pytest.raises(PyargsError, match="0 of 4 similar texts"):
        mining.hard_negatives(["a"] * 40, titles, vectors, k=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 10), st.integers(1, 3), st.randoms(use_true_random=False))
def test_no_title_is_rejected_in_both_parts_of_a_user(seed, users, each, k, random):
    rng = np.random.default_rng(seed)
    names = [str(u) for u in range(users) for _ in range(each)]
    vectors = rng.standard_normal((len(names), 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    titles = [f"title {i % (each * users - 2)}" for i in range(len(names))]  # two are there twice
    held = [random.random() < 0.3 for _ in names]
    try:
        found = mining.hard_negatives(names, titles, vectors, k=k, near=1.1, seed=seed, held=held)
    except PyargsError as error:
        assert "are left" in str(error)
        return
    sides = [{(u, titles[n.row]) for n, u, h in zip(found, names, held, strict=True) if h is part} for part in (True, False)]
    assert not sides[0] & sides[1]
    plain = mining.hard_negatives(names, titles, vectors, k=k, near=1.1, seed=seed)
    assert [n for n, h in zip(found, held, strict=True) if h] == [n for n, h in zip(plain, held, strict=True) if h]


def test_a_users_own_papers_do_not_use_up_the_neighbours(monkeypatch):
    """However many of the nearest are the user's own: the k nearest of others are found."""
    monkeypatch.setattr(mining, "SPARE", 0)
    rng = np.random.default_rng(0)
    close = np.array([1.0, 0, 0, 0, 0]) + 0.1 * rng.standard_normal((30, 5))  # all of one user
    vectors = np.concatenate([close, rng.standard_normal((10, 5))]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    users, titles = ["a"] * 30 + ["b"] * 10, [f"t{i}" for i in range(40)]
    found = mining.hard_negatives(users, titles, vectors, k=5, near=1.1)
    assert all(negative.row >= 30 for negative in found[:30])


@needs_shared
def test_items_of_the_full_set():
    papers = lamp_files.items(SHARED / "pref_lamp_like")
    kinds, users = papers["user_split"][:], papers["user_id"][:]
    assert (kinds.count("train"), kinds.count("adapt")) == (24111, 6247)
    assert len({u for u, k in zip(users, kinds, strict=True) if k == "train"}) == 485 and len(set(users)) == 611


@needs_shared
def test_neighbours_of_the_real_set():
    """The pack's own neighbours (cosine of float16 vectors) are found, but for near-duplicates and near ties."""
    stored = np.load(CI / "abstract_embeddings_minilm.npz")
    papers = {p["item_id"]: p for p in lamp_files.items(CI)}
    ids = stored["item_id"].tolist()
    vectors = stored["embedding"].astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    known = {r["item_id"]: dict(r["neighbours"]) for _, r in sources.rows(CI / "neighbours_minilm.jsonl.gz")}
    for kind in ("train", "adapt"):
        rows = [i for i, item in enumerate(ids) if papers[item]["user_split"] == kind]
        found = mining.hard_negatives(
            [papers[ids[i]]["user_id"] for i in rows], [papers[ids[i]]["title"] for i in rows], vectors[rows], k=10
        )
        for i, negative in zip(rows, found, strict=True):
            cosines = known[ids[i]]
            item = ids[rows[negative.row]]
            assert item in cosines or negative.cosine >= min(cosines.values()) - 2e-3, (ids[i], item)


# ---- simulated users over any file ----


def pairs_file(folder: Path, train: int = 60, new: int = 30) -> Path:
    words = "I you we my your tremendously little cat observed running over seas".split()
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(words, rng.integers(3, 12))) + "."  # noqa: E731
    rows = [row(user=f"real{i % 5}", prompt=f"p{i}", chosen=text(), rejected=text() + " x") for i in range(train)]
    rows += [
        row(user=f"new{i % 3}", role=("support", "query")[i % 2], prompt=f"q{i}", chosen=text(), rejected=text() + " x")
        for i in range(new)
    ]
    return write(folder / "pairs.jsonl", rows)


def test_dense_overlap(tmp_path):
    config = preferences.Config(
        simulated_users=30, simulated_new_users=6, labels_per_pair=10, simulated_pairs=40, embedder="none"
    )
    found = prepare.build("preferences", pairs_file(tmp_path), tmp_path / "out", config)
    dataset = data.load(tmp_path / "out")
    train = data.of_split(dataset, "train", "train_test")
    labels = {}
    for r in train:
        labels.setdefault(r["pair_id"], []).append((r["user_id"], r["chosen"]))
    assert len(labels) == 40 and all(len({user for user, _ in several}) >= 9 for several in labels.values())
    assert len(train) <= 400 == 40 * config.labels_per_pair and set(dataset["user_id"]) <= {
        *(f"sim_{i:02d}" for i in range(30)),
        *(f"new_sim_{i}" for i in range(6)),
    }
    assert sum(len({chosen for _, chosen in several}) == 2 for several in labels.values()) > 20  # tastes differ
    support, query = (set(data.of_split(dataset, s)["pair_id"]) for s in ("support", "query"))
    assert support and query and not support & query and not (support | query) & set(labels)
    assert found["check"]["problems"] == {} and found["statistics"]["users_per_pair"]["mean"] > 6


def test_simulated_users_are_consistent():
    """Each user's labels follow one weight vector: a logistic regression on the attributes separates them."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    words = "I you we my your tremendously little cat observed running over seas . !".split()
    pairs = [
        {
            "prompt": "p",
            "pair_id": str(i),
            "chosen": " ".join(rng.choice(words, rng.integers(3, 30))),
            "rejected": " ".join(rng.choice(words, rng.integers(3, 30))),
        }
        for i in range(200)
    ]
    pairs = [pair | {"split": "train"} for pair in pairs]
    rows = simulate.label_densely(pairs, users=3, labels_per_pair=3)
    for user in {r["user_id"] for r in rows}:
        own = [r for r in rows if r["user_id"] == user]
        x = np.array([[f(r["chosen"]) - f(r["rejected"]) for f in simulate.TASTES.values()] for r in own])
        x /= x.std(0)
        x, y = np.concatenate([x, -x]), np.repeat([1, 0], len(x))
        fitted = LogisticRegression(C=1e4, fit_intercept=False, max_iter=1000).fit(x, y)
        assert fitted.score(x, y) > 0.98
        sign, name = own[0]["attribute"][0], own[0]["attribute"][1:]
        assert (fitted.coef_[0, list(simulate.TASTES).index(name)] > 0) == (sign == "+")
    assert len({tuple(r["chosen"] for r in rows if r["user_id"] == u) for u in ("sim_0", "sim_1", "sim_2")}) == 3
    with pytest.raises(PyargsError, match="10 labels per pair"):
        simulate.label_densely(pairs, users=3, labels_per_pair=10)


def test_hybrid_keeps_the_real_users(tmp_path):
    source = pairs_file(tmp_path)
    config = preferences.Config(simulated_users=12, labels_per_pair=5, hybrid=True, embedder="none")
    prepare.build("preferences", source, tmp_path / "out", config)
    dataset = data.load(tmp_path / "out")
    real = [r for r in dataset if not r["user_id"].startswith("sim")]
    plain = {(r["user_id"], r["prompt"], r["chosen"], r["rejected"]) for r in data.load(source)}
    assert {(r["user_id"], r["prompt"], r["chosen"], r["rejected"]) for r in real} == plain
    sides = [set(data.of_split(dataset, s)["prompt"]) for s in ("train", "train_test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    built = preferences.Config(simulated_users=12, labels_per_pair=5, hybrid=True, embedder="none")
    prepare.build("preferences", tmp_path / "out", tmp_path / "again", built)  # over a set with its own train_test
    again = data.load(tmp_path / "again")
    sides = [set(data.of_split(again, s)["prompt"]) for s in ("train", "train_test")]
    assert not sides[0] & sides[1] and any(u.startswith("sim") for u in data.of_split(again, "train_test")["user_id"])
    with pytest.raises(PyargsError, match="no rows of support or query"):
        rows = write(tmp_path / "train.jsonl", [row(prompt=f"p{i}") for i in range(5)])
        prepare.build("preferences", rows, tmp_path / "x", preferences.Config(simulated_new_users=3, embedder="none"))


# ---- the check ----


def report(rows: list[dict]) -> dict:
    return check.check(((f"f, line {number}", r) for number, r in enumerate(rows, 1)), embedder=None)


def test_a_clean_set_has_no_problems():
    rows = [row(user=f"u{i % 4}", prompt=f"p{i}", chosen=f"good {i}", rejected=f"evil {i}") for i in range(40)]
    assert report(rows)["problems"] == report(rows)["notes"] == {}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("rows that cannot be used", [row(chosen=["a"]), row()]),
        ("rows that cannot be used", [row(chosen="bad"), row()]),
        ("rows that cannot be used", [row(role="test"), row()]),
        ("users trained on and adapted to", [row(), row(role="query", prompt="q")]),
        ("one pair in two splits of a user", [row(role="support"), row(role="query")]),
        ("one pair in two splits of a user", [row(), row(role="train_test", chosen="bad", rejected="good")]),
        (
            "responses rejected in query that the same user rejects in support",
            [row(role="support"), row(role="query", prompt="q", chosen="other", rejected="bad ")],
        ),
        (
            "responses rejected in train_test that the same user rejects in train",
            [row(), row(role="train_test", prompt="q", chosen="other")],
        ),
        *(
            (
                f"responses rejected in {held} that the same user rejects in {other}",
                [row(role=other, rejected=one), row(role=held, prompt="q", chosen="other", rejected=again)],
            )
            for held, other in (("query", "support"), ("train_test", "train"))
            for one, again in (("A Bad Title", "a bad title."), ("so-so", "So so"), ("two  words", "two\nwords"), ("!", "! "))
        ),
        ("template markers in a text", [row(prompt="<|im_start|>user\nhi<|im_end|>")]),
        ("template markers in a text", [row(chosen="fine</s>")]),
        ("template markers in a text", [row(chosen="<|reserved_special_token_0|> fine")]),
        ("one answer to a prompt in two splits of a user", [row(role="support"), row(role="query", rejected="other")]),
        ("one answer to a prompt in two splits of a user", [row(), row(role="train_test", chosen="good ", rejected="other")]),
        ("one pair_id for different pairs", [row(pair_id="a"), row(pair_id="a", prompt="q")]),
        ("prompts of both kinds, texts and messages", [row(), row(prompt=[{"role": "user", "content": "x"}])]),
        (
            "prompts that do not end with a user's turn, or have unknown roles",
            [row(prompt=[{"role": "assistant", "content": "x"}])],
        ),
        (
            "prompts that do not end with a user's turn, or have unknown roles",
            [row(prompt=[{"role": "human", "content": "x"}])],
        ),
        ("a printed list instead of its texts", [row(rejected="[{'role': 'assistant', 'content': 'x'}]")]),
        ("rows that cannot be used", [row(chosen="\ud800"), row()]),
        ("a printed list instead of its texts", [row(rejected="['one', \"it's\"]")]),
        ("a form that one side has", [row(prompt=f"p{i}", chosen=f" good {i}") for i in range(20)]),
        ("a form that one side has", [row(prompt=f"p{i}", rejected=f"Title: bad {i}") for i in range(20)]),
    ],
)
def test_the_check_finds(kind, rows):
    assert kind in report(rows)["problems"]


def test_signs_alone_are_told_apart():
    found = report([row(role="support", rejected="👍"), row(role="query", prompt="q", chosen="other", rejected="👎")])
    assert found["problems"] == {}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("pairs of train users among the adapt users'", [row(), row(user="u2", role="query")]),
        (
            "answers of train users that are an adapt user's, to the same prompt",
            [row(), row(user="b", role="query", rejected="x")],
        ),
        (
            "responses rejected in query that the same user rejects in support",
            [row(role="support"), *(row(role="query", prompt=f"q{i}", rejected="bad" + "x" * i) for i in range(21))],
        ),
        ("prompts in query and support", [row(role="support"), row(role="query", chosen="other", rejected="worse")]),
        ("users with query pairs and no support pairs", [row(role="query")]),
        ("users with support pairs and no query pairs", [row(role="support")]),
        ("responses that differ in white space or case alone", [row(chosen="Good", rejected="good ")]),
        ("a form that decides", [row(prompt=f"p{i}", chosen="a longer text") for i in range(4)]),
        ("pairs that a user has more than once", [row(), row()]),
        ("pairs that a user decides both ways", [row(), row(chosen="bad", rejected="good")]),
        ("pairs of one user's train in another's train_test", [row(), row(user="u2", role="train_test")]),
        ("turns written into a prompt's text instead of messages", [row(prompt="Human: hi\n\nAssistant: yes\n\nHuman: x")]),
    ],
)
def test_the_check_notes(kind, rows):
    found = report(rows)
    assert kind in found["notes"] and not found["problems"]


def test_what_is_no_artefact():
    texts = ["['a','b'] is the list ['c']", "[1, 2]", "a <s>struck</s> word", "[sic]", "x < y | z > w"]
    rows = [row(prompt=f"p{i}", chosen=text, rejected="another") for i, text in enumerate(texts)]
    assert report(rows)["problems"] == {}


def test_a_form_that_one_side_has_counts_from_five_points():
    def found(quoted: int) -> bool:
        rows = [row(prompt=f"p{i}", chosen=f"'good {i}'" if i < quoted else f"good {i}") for i in range(100)]
        return "a form that one side has" in report(rows)["problems"]

    assert found(6) and not found(5)


def test_blind_scorers():
    from pyargs.metrics.blind import blind, contents, overlap

    instruct = "Name it: "
    prompts = [f"{instruct}red fox", f"{instruct}blue owl", f"{instruct}old hen"]
    found = blind(prompts, ["red fox.", "an owl it is", "hen"], ["a cow", "owl", "the name"], ["a", "a", "b"], embedder=None)
    assert {n: (f["accuracy"], f["reversed"], f["tie_rate"]) for n, f in found.items()} == {
        "words": (33.33, 33.33, 33.33),
        "characters": (66.67, 33.33, 0.0),
        "lines": (0.0, 0.0, 100.0),
        "terminator": (33.33, 0.0, 66.67),
        "brackets": (0.0, 0.0, 100.0),
        "word_overlap": (66.67, 33.33, 0.0),
    }
    assert contents(prompts) == ["red fox", "blue owl", "old hen"]
    assert contents([[{"role": "user", "content": "x"}, {"role": "user", "content": "last"}]]) == ["last"]
    assert overlap("The red-fox, 12", "FOX fox 12 cow") == pytest.approx(2 / 3) and overlap("a", "...") == 0


def test_blind_cosine(encoder):
    from pyargs.lm.embed import embed
    from pyargs.metrics.blind import blind

    prompts, chosen, rejected = ["red fox", "blue owl"], ["red", "cow hen"], ["rain", "blue"]
    found = blind(prompts, chosen, rejected, ["a", "b"], embedder=encoder)[f"{encoder}_cosine"]
    one, two, three = (embed(encoder, texts) for texts in (prompts, chosen, rejected))
    assert found["accuracy"] == 50 * sum((one * two).sum(1) > (one * three).sum(1)) and found["n"] == 2


def test_users_who_share_their_pairs_are_no_fault(tmp_path, capsys):
    """Everybody judges everything, each in an own way: the point of personalisation."""
    pairs = [(u, i, (f"a{i}", f"b{i}")[:: 1 if u % 2 else -1]) for u in range(6) for i in range(8)]
    shared = write(
        tmp_path / "shared.jsonl",
        [
            row(
                user=f"u{u}",
                role="train" if u < 3 else ("support", "query")[i % 2],
                prompt=f"p{i}",
                chosen=one,
                rejected=other,
            )
            for u, i, (one, other) in pairs
        ],
    )
    assert cli.main(["data", "check", "--embedder", "none", str(shared)]) == 0
    assert "pairs of train users among the adapt users'" in json.loads(capsys.readouterr().out)["notes"]


def test_check_command(tmp_path):
    command = [sys.executable, "-m", "pyargs.cli", "data", "check", "--embedder", "none"]
    bad = write(tmp_path / "bad.jsonl", [row(role="support"), row(role="query")])
    ran = subprocess.run([*command, bad], capture_output=True, text=True)
    assert ran.returncode == 1 and "one pair in two splits of a user: 1" in ran.stderr
    assert json.loads(ran.stdout)["problems"]["one pair in two splits of a user"]["first"] == [
        "u1: bad.jsonl, line 1, bad.jsonl, line 2"
    ]
    ran = subprocess.run([*command, "demo"], capture_output=True, text=True)
    assert ran.returncode == 0 and json.loads(ran.stdout)["problems"] == {}
    ran = subprocess.run([*command, tmp_path / "none.jsonl"], capture_output=True, text=True)
    assert ran.returncode == 1 and "No file" in ran.stderr


@needs_shared
@pytest.mark.parametrize(
    "file",
    [
        "hh_rlhf_users/length_prefs",
        "hh_rlhf_users/two_types_prefs",
        "persona_statements/prefs",
        "pandalm_annotators/prefs",
        "pref_lamp_like/ci/prefs_minilm",
    ],
)
def test_real_files_have_no_problems(file):
    found = check.check(read(SHARED / f"{file}.jsonl.gz"), embedder=None)
    repeated = found["problems"].pop("responses rejected in query that the same user rejects in support", {"count": 0})
    assert found["problems"] == {} and repeated["count"] == (50 if "pref_lamp" in file else 0)


@needs_shared
def test_word_overlap_decides_the_real_titles():
    found = check.check(read(CI / "prefs_minilm.jsonl.gz"), embedder=None)
    assert found["blind"]["word_overlap"]["accuracy"] > 95 and found["blind"]["words"]["accuracy"] < 50
