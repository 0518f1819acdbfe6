"""Data sets: reading, refusing, splitting; the LaMP-5 format; planted users; the embedded set."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs import data
from pyargs.data import demo, pref_lamp, preferences, synthetic
from pyargs.errors import PyargsError

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
CI = SHARED / "pref_lamp_like" / "ci"
needs_shared = pytest.mark.skipif(not CI.is_dir(), reason="the data pack ../shared/data is not here")


def row(**changes) -> dict:
    base = {"user": "u1", "split": "train", "role": "train", "prompt": "p", "chosen": "good", "rejected": "bad"}
    return {name: value for name, value in (base | changes).items() if value is not ...}


def write(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- preference files ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reads_every_format(tmp_path, name):
    rows = [row(prompt=f"p{i}", pair_id=f"x{i}") for i in range(10)] + [
        row(user="u2", split="adapt", role=role, prompt="q", pair_id=f"y{role}") for role in ("support", "query")
    ]
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, rows)
    dataset = data.load(tmp_path / name)
    assert tuple(dataset.column_names) == data.COLUMNS
    assert dataset["user_id"][:] == ["u1"] * 10 + ["u2"] * 2
    assert sorted(dataset["split"]) == ["query", "support"] + ["train"] * 8 + ["train_test"] * 2
    assert data.content_hash(dataset) == data.content_hash(data.load("preferences", str(tmp_path / name)))


def test_all_counts_as_train_and_own_train_test_is_kept():
    rows = preferences.check([row(role="all", split="all", prompt=f"p{i}") for i in range(5)])
    assert {r["split"] for r in rows} == {"train"}
    rows = preferences.check([row(prompt=f"p{i}", role="train_test" if i == 3 else "train") for i in range(5)])
    assert preferences.carve(rows) == rows


def test_split_serves_where_role_is_missing_or_null():
    assert preferences.check([row(role=..., split="query")])[0]["split"] == "query"
    assert preferences.check([row(role=None, split="support")])[0]["split"] == "support"


def test_chat_prompts_and_conversational_responses():
    chat = [{"role": "user", "content": "hi", "name": "x"}]
    said = [{"role": "assistant", "content": "good"}]
    dataset = preferences.to_dataset(preferences.check([row(prompt=chat, chosen=said)]))
    assert dataset[0]["prompt"] == [{"role": "user", "content": "hi"}] and dataset[0]["chosen"] == "good"


def test_pair_id_does_not_depend_on_the_label():
    one, two = preferences.check([row(), row(user="u2", chosen="bad", rejected="good")])
    assert one["pair_id"] == two["pair_id"] != preferences.check([row(prompt="other")])[0]["pair_id"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": 3}, "row 1: chosen is int, not a string"),
        ({"prompt": None}, "prompt is NoneType"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"rejected": ""}, "rejected is empty"),
        ({"rejected": "good"}, "chosen and rejected are the same"),
        ({"chosen": ..., "chossen": "x"}, "no column 'chosen'.*chossen"),
        ({"user": ..., "user_ids": "x"}, "no column 'user'.*user_ids"),
        ({"user": 7}, "user_id is int"),
        ({"role": "test"}, "unknown split 'test'"),
        ({"role": ..., "split": ...}, "no column 'split'"),
        ({"role": ..., "split": "adapt"}, "needs a column 'role'"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [{"role": "user"}]}, "without 'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "content is list"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "one assistant message"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(PyargsError, match=message):
        preferences.check([row(**changes)])


def test_refuses_mixtures():
    with pytest.raises(PyargsError, match="row 2: user 'u1' is of the adapt users here"):
        preferences.check([row(), row(role="query")])
    with pytest.raises(PyargsError, match="row 2: prompts must be all"):
        preferences.check([row(), row(prompt=[{"role": "user", "content": "x"}])])
    with pytest.raises(PyargsError, match="no rows"):
        preferences.check([])


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [row(prompt=f"p{i}") for i in range(500)]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row()) + "\n{oops\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "a.csv").write_text("x")
    for name, message in {
        "cut.jsonl.gz": "damaged",
        "plain.jsonl.gz": "damaged",
        "bad.jsonl": "line 2: not JSON",
        "list.jsonl": "line 1: not a JSON object",
        "a.csv": "is .jsonl, .jsonl.gz or .parquet",
        "none.jsonl": "No file",
    }.items():
        with pytest.raises(PyargsError, match=message):
            preferences.load(tmp_path / name)


# ---- carving ----

USERS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 15)), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(USERS, st.floats(0, 0.9), st.integers(0, 3), st.randoms(use_true_random=False))
def test_carving(pairs, share, seed, rng):
    rows = preferences.check(
        [row(user=u, prompt=f"prompt {p}", rejected=f"bad {i}", pair_id=str(i)) for i, (u, p) in enumerate(pairs)]
    )
    done = preferences.carve(rows, train_test=share, seed=seed)
    assert [r | {"split": "train"} for r in done] == rows  # nothing but the split changes, not even the order
    for user in {u for u, _ in pairs}:
        of = {s: {r["prompt"] for r in done if r["user_id"] == user and r["split"] == s} for s in ("train", "train_test")}
        every = len(of["train"] | of["train_test"])
        assert not of["train"] & of["train_test"] and of["train"]
        assert len(of["train_test"]) == min(int(share * every + 0.5), every - 1)
    assert preferences.carve(rows, train_test=share, seed=seed) == done
    shuffled = rows[:]
    rng.shuffle(shuffled)
    key = {r["pair_id"]: r["split"] for r in done}
    assert {r["pair_id"]: r["split"] for r in preferences.carve(shuffled, train_test=share, seed=seed)} == key


def test_carving_depends_on_the_seed_and_leaves_adapt_users_alone():
    rows = preferences.check([row(prompt=f"p{i}") for i in range(50)] + [row(user="n", role="query", prompt="p")])
    first, second = (preferences.carve(rows, seed=seed) for seed in (0, 1))
    assert first != second and first[-1]["split"] == "query"
    with pytest.raises(PyargsError, match="share"):
        preferences.carve(rows, train_test=1.0)
    with pytest.raises(PyargsError, match="'prompt' or 'pair'"):
        preferences.carve(rows, by="user")


def test_carving_by_pair():
    rows = preferences.check([row(pair_id=str(i), rejected=f"bad {i}") for i in range(10)])
    assert {r["split"] for r in preferences.carve(rows)} == {"train"}  # one prompt, and it stays in train
    assert sum(r["split"] == "train_test" for r in preferences.carve(rows, by="pair")) == 2


# ---- load by name ----


def test_load_by_name(tmp_path):
    assert {"demo", "synthetic", "preferences", "pref_lamp"} <= set(data.names())
    for call, message in [
        (lambda: data.load("dmeo"), "No data set and no file 'dmeo'. Did you mean: demo"),
        (lambda: data.load("pref_lamp"), "needs a source"),
        (lambda: data.load("demo", "somewhere"), "takes no source"),
        (lambda: data.load("synthetic", usres=3), "no option 'usres'. Did you mean: users"),
        (lambda: data.load(write(tmp_path / "a.jsonl", [row()]), "other"), "is a file already"),
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


# ---- LaMP-5 ----


def lamp(folder: Path, *, gz: bool = False) -> Path:
    """Two train users and one adapt user, each with one profile paper and a question."""

    def question(user: str) -> dict:
        paper = {"id": f"{user}0", "title": f"Title {user}0", "abstract": f"About {user}0.", "date": 2019}
        return {"id": user, "input": f"{pref_lamp.INSTRUCTION}About {user}.", "profile": [paper]}

    for stem, users in (("train", ["1", "2"]), ("dev", ["3"])):
        golds = {"task": "LaMP_5", "golds": [{"id": user, "output": f"Title {user}"} for user in users]}
        for name, content in (("questions", [question(user) for user in users]), ("outputs", golds)):
            text = json.dumps(content).encode()
            path = folder / f"{stem}_{name}.json{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(text) if gz else text)
    return folder


@pytest.mark.parametrize("gz", [False, True])
def test_lamp_items(tmp_path, gz):
    found = pref_lamp.items(lamp(tmp_path, gz=gz))
    assert found["item_id"][:] == ["10", "1", "20", "2", "30", "3"]
    assert found["title"][:] == [f"Title {item}" for item in found["item_id"]]
    assert found["user_split"][:] == ["train"] * 4 + ["adapt"] * 2
    assert found[0]["prompt"] == "Generate a title for the following abstract of a paper: About 10."
    assert (found[0]["date"], found[0]["role"], found[1]["date"], found[1]["role"]) == (2019, "profile", None, "question")


def test_lamp_pairs_are_checked_against_the_papers(tmp_path):
    def pair(item: str, role: str, **changes) -> dict:
        text = {"prompt": f"{pref_lamp.INSTRUCTION}About {item}.", "chosen": f"Title {item}", "rejected": "Other"}
        return {"user": item[0], "role": role, "pair_id": item} | text | changes

    folder = lamp(tmp_path)
    with pytest.raises(PyargsError, match="found preference files none"):
        pref_lamp.load(folder)
    prefs = write(folder / "prefs.jsonl", [pair("10", "train"), pair("1", "train"), pair("30", "support"), pair("3", "query")])
    assert pref_lamp.load(folder)["split"][:] == data.load("pref_lamp", prefs)["split"][:]
    write(prefs, [pair("10", "train", chosen="Not the title")])
    with pytest.raises(PyargsError, match="pair 10 does not match"):
        pref_lamp.load(folder)


def test_lamp_refuses_other_data(tmp_path):
    with pytest.raises(PyargsError, match="no train_questions.json"):
        pref_lamp.items(tmp_path)
    (tmp_path / "train_questions.json").write_text('[{"id": "1", "input": "Write a tweet", "profile": []}]')
    with pytest.raises(PyargsError, match="not LaMP-5"):
        pref_lamp.items(tmp_path)
    (tmp_path / "train_questions.json").write_text("[{")
    with pytest.raises(PyargsError, match="damaged or not JSON"):
        pref_lamp.items(tmp_path)
    with pytest.raises(PyargsError, match="No file or folder"):
        pref_lamp.load(tmp_path / "nowhere")


@needs_shared
def test_real_titles():
    pairs, papers = data.load("pref_lamp", CI), pref_lamp.items(CI)
    assert len(papers) == len(pairs) == 1291 and papers.filter(lambda p: p["role"] == "question").num_rows == 40
    counts = {split: pairs["split"][:].count(split) for split in data.SPLITS}
    assert counts["train"] + counts["train_test"] == 960 and counts["support"] + counts["query"] == 331
    assert counts["train_test"] == 30 * 6  # 20% of 32 papers per user
    assert len(set(pairs["user_id"])) == 40


@needs_shared
@pytest.mark.parametrize(
    ("file", "pairs", "users"),
    [
        ("hh_rlhf_users/two_types_prefs", 3200, 60),
        ("persona_statements/prefs", 4800, 80),
        ("pandalm_annotators/prefs", 2489, 3),
    ],
)
def test_real_preference_files(file, pairs, users):
    dataset = data.load(SHARED / f"{file}.jsonl.gz")
    assert len(dataset) == pairs and len(set(dataset["user_id"])) == users


# ---- planted users ----


def test_synthetic_follows_its_rule():
    dataset = synthetic.load(users=8, pairs=30, new_users=4, support=5, query=6, rank=2)
    assert len(dataset) == 8 * 30 + 4 * 11
    for r in dataset:
        number = int(r["user_id"][-2:])
        direction, sign = synthetic.rule(number, 2)
        assert sign * (synthetic.score(r["chosen"], direction) - synthetic.score(r["rejected"], direction)) >= 5
        assert len(r["chosen"].split()) == len(r["rejected"].split()) == 10
        assert {*r["prompt"].split(), *r["chosen"].split(), *r["rejected"].split()} <= set(synthetic.WORDS)
    assert len(set(dataset["attribute"])) == 4 and {"+animals-tools", "-animals+tools"} <= set(dataset["attribute"])
    assert {r["split"] for r in dataset if r["user_id"].startswith("new")} == {"support", "query"}


def test_synthetic_is_seeded_and_users_do_not_depend_on_each_other():
    few, many, other = (synthetic.load(users=n, seed=s) for n, s in ((2, 0), (4, 0), (2, 1)))
    assert data.content_hash(few) == data.content_hash(synthetic.load(users=2))
    assert data.content_hash(few) != data.content_hash(other)
    assert few["chosen"][:60] == many["chosen"][:60]
    for wrong in ({"rank": 4}, {"gap": 11}):
        with pytest.raises(PyargsError):
            synthetic.load(**wrong)


def test_planted_features():
    planted = synthetic.planted_features(dim=16, users=5, pairs=40, rank=3, seed=1)
    assert planted.chosen.shape == planted.rejected.shape == (200, 16) and planted.chosen.dtype == torch.float32
    torch.testing.assert_close(planted.directions @ planted.directions.T, torch.eye(3))
    torch.testing.assert_close(planted.mixtures.sum(-1), torch.ones(5))
    margin = (planted.heads[planted.user] * (planted.chosen - planted.rejected)).sum(-1)
    assert (margin > 0).all() and planted.user.bincount().tolist() == [40] * 5
    noisy = synthetic.planted_features(dim=16, users=5, pairs=400, rank=3, scale=1.0)
    margin = (noisy.heads[noisy.user] * (noisy.chosen - noisy.rejected)).sum(-1)
    # Bradley-Terry: the share of correct labels is the mean of sigmoid(|margin|).
    assert abs((margin > 0).float().mean() - margin.abs().sigmoid().mean()) < 0.04
    for one, two in zip(planted, synthetic.planted_features(dim=16, users=5, pairs=40, rank=3, seed=1), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiny_lm(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    folder = synthetic.tiny_lm(tmp_path / "lm", family=family, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert all(len(tokenizer(form).input_ids) == 1 for w in synthetic.WORDS for form in (w, f" {w}"))
    text = "tell me about the café's cat: 42\n\nnew lines"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    assert chat == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == chat and max(ids) < len(tokenizer) == model.config.vocab_size
    again = AutoModelForCausalLM.from_pretrained(synthetic.tiny_lm(tmp_path / "again", family=family, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_tiny_lm_shows_the_rule(tmp_path):
    """A linear head on the last state finds the planted direction: what the smoke run relies on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(synthetic.tiny_lm(tmp_path)).model
    tokenizer = synthetic.tiny_tokenizer()
    rows = [r for r in synthetic.load(users=4, pairs=150, new_users=0) if r["attribute"].endswith("animals-tools")]
    rows += [r for r in synthetic.load(users=4, pairs=150, new_users=0, seed=1) if "animals-tools" in r["attribute"]]

    def last(name: str):
        texts = [f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r[name]}" for r in rows]
        with torch.no_grad():
            return model(torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)).last_hidden_state[:, -1]

    delta = last("chosen") - last("rejected")
    train = torch.tensor([r["split"] == "train" for r in rows])
    head = torch.zeros(delta.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (torch.nn.functional.softplus(-delta[train] @ head).mean() + 3e-3 * head.square().sum()).backward()
        optimizer.step()
    assert (delta[~train] @ head > 0).float().mean() > 0.85


# ---- the embedded set ----


def test_attributes():
    text = "I don't know, my friend. You can, and WE’LL see your cat: 42 times!"
    assert demo.attribute("first_person", text) == pytest.approx(100 * 3 / 13)
    assert demo.attribute("second_person", text) == pytest.approx(100 * 2 / 13)
    assert demo.attribute("sentence_length", text) == 6.5
    assert demo.attribute("sentence_length", "One two three\nfour") == 2
    assert demo.attribute("word_length", "I don't see café") == pytest.approx((1 + 4 + 3 + 4) / 4)
    for name in demo.ATTRIBUTES:
        assert demo.attribute(name, "") == demo.attribute(name, "... 42") == 0
    with pytest.raises(PyargsError, match="Did you mean: word_length"):
        demo.attribute("word_lenght", text)


def test_demo_set():
    lines = demo.prompts()
    assert len(lines) == len(set(lines)) == 160 and sum(len(demo.prompts(split)) for split in demo.RANGES) == 160
    assert len(demo.answers()) == 160 and all(len(set(four)) == 4 for four in demo.answers())
    dataset = data.load("demo")
    assert set(dataset["user_id"]) == set(demo.users())
    split_of = {line: split for split in demo.RANGES for line in demo.prompts(split)}
    pairs = {}
    for r in dataset:
        name, sign = demo.users()[r["user_id"]]
        assert r["split"] == split_of[r["prompt"]] and r["attribute"] == f"{'+' if sign > 0 else '-'}{name}"
        gap = sign * (demo.attribute(name, r["chosen"]) - demo.attribute(name, r["rejected"]))
        assert gap >= demo.ATTRIBUTES[name][1]
        assert pairs.setdefault(r["pair_id"], {r["chosen"], r["rejected"]}) == {r["chosen"], r["rejected"]}
    for user in demo.users("new"):
        counts = [r["split"] for r in dataset if r["user_id"] == user]
        assert counts.count("support") >= 8 and counts.count("query") >= 15
    assert not set(demo.users("new")) & set(demo.users("train"))
    assert sum(path.stat().st_size for path in demo.FOLDER.iterdir()) < 1_000_000
    assert len(data.load("demo", max_pairs=5)) <= 5 * 2 * len(demo.users())
