"""PRISM from its conversations: pairs, users and dialogues of each split, the notebook's draw, damage."""

from __future__ import annotations

import numpy as np
import pytest
from rows import DIALOGUES, SHARED, needs_shared, prism

from pyargs import data, prepare
from pyargs.data import sources
from pyargs.errors import PyargsError
from pyargs.prepare import prism as prism_set


def test_prism(tmp_path):
    out = tmp_path / "out"
    found = prepare.build("prism", prism(tmp_path / "source", DIALOGUES), out, prism_set.Config(embedder="none"))
    rows = [r for split in data.SPLITS for _, r in sources.rows(out / f"{split}.parquet")]
    splits = {}
    for r in rows:
        splits.setdefault(r["dialogue"], set()).add(r["split"])
        assert r["user_id"] == r["dialogue"].split("-")[0] and r["chosen"].startswith(f"{r['dialogue']} reply {r['turn']}-0")
        assert r["prompt"][-1]["role"] == "user" and all(isinstance(m["content"], str) for m in r["prompt"])
        # The history holds the chosen replies.
        assert [m["content"] for m in r["prompt"][1::2]] == [f"{r['dialogue']} reply {t}-0" for t in range(r["turn"])]
    assert all(len(s) == 1 for s in splits.values())  # no dialogue in two splits
    assert sum(r["turn"] == 0 for r in rows) == 2 * len(splits) and sum(r["turn"] == 1 for r in rows) == len(splits)
    of = {s: {r["user_id"] for r in rows if r["split"] == s} for s in data.SPLITS}
    assert of["train"] == of["train_test"] and of["support"] == of["query"] and not of["train"] & of["query"]
    assert len(of["query"]) <= 4 and not any(DIALOGUES[user] == 1 for user in of["train"] | of["query"])
    for user in of["train"]:
        assert sum(d.startswith(f"{user}-") and s == {"train"} for d, s in splits.items()) == int(0.9 * DIALOGUES[user])
    for user in of["query"]:
        halves = [sum(d.startswith(f"{user}-") and s == {name} for d, s in splits.items()) for name in ("support", "query")]
        assert sum(halves) == DIALOGUES[user] and halves[0] - halves[1] in (0, 1)
    assert found["check"]["problems"] == {} and "subset" not in data.load(out).column_names
    assert found["statistics"]["users_per_pair"]["max"] == 1
    assert "users per pair: mean 1" in (out / "README.md").read_text()


def test_prism_leaves_out_what_is_no_pair(tmp_path):
    def change(survey, conversations):
        long, empty, silent = conversations[-1], conversations[-2], conversations[-3]
        asked = len(long["conversation_history"][0]["content"])
        long["conversation_history"][1]["content"] = "x" * (2301 - asked)  # the chosen reply of turn 0
        conversations[-4]["conversation_history"][1]["content"] = "x" * (2300 - len("user39-2 asks 0"))  # just short enough
        empty["conversation_history"][2]["content"] = " "
        for item in silent["conversation_history"]:
            item["if_chosen"] = False

    found = prepare.build(
        "prism", prism(tmp_path / "s", DIALOGUES, change), tmp_path / "out", prism_set.Config(embedder="none")
    )
    assert found["counts"]["pairs that are too long"] == 2 and found["counts"]["pairs of the same or of empty texts"] == 1
    assert any("Dialogues without a usable turn: user39-1" in note for note in found["notes"])


def test_prism_split_is_that_of_the_notebook(tmp_path):
    """Users, then each train user's dialogues, from one legacy stream of numpy with seed 123."""
    dialogues = {user: [f"{user}-{i}" for i in range(count)] for user, count in DIALOGUES.items()}
    np.random.seed(123)
    order = np.array(list(dialogues))
    np.random.shuffle(order)
    expected = {}
    for user in order[:36]:
        own = np.array(dialogues[user])
        np.random.shuffle(own)
        if len(own) > 1:
            cut = int(0.9 * len(own))
            expected |= dict.fromkeys(own[:cut], "train") | dict.fromkeys(own[cut:], "train_test")
    built = prism_set.build(str(prism(tmp_path, DIALOGUES)), prism_set.Config())
    assert {r["dialogue"]: r["split"] for r in built.rows if r["split"].startswith("train")} == expected
    assert built.counts["train users drawn"] == len({d.split("-")[0] for d in expected})


@pytest.mark.parametrize(
    ("texts", "longest", "usable"),
    [
        ({}, 2300, True),
        ({}, 2299, False),
        ({"rejected": ["y", "z" * 2300]}, 2300, False),
        *(({lacks: []}, 2300, False) for lacks in ("user", "chosen", "rejected")),
    ],
)
def test_a_turn_is_usable_up_to_the_longest_text(texts, longest, usable, tmp_path):
    """A dialogue without such a turn is named."""
    texts = {"user": ["a"], "chosen": ["x" * 2299], "rejected": ["y", "z" * 2299]} | texts

    def change(survey, conversations):
        conversations[-1]["conversation_history"] = [
            {"turn": 0, "role": "user" if kind == "user" else "model", "content": text, "if_chosen": kind == "chosen"}
            for kind, several in texts.items()
            for text in several
        ]

    built = prism_set.build(str(prism(tmp_path, DIALOGUES, change)), prism_set.Config(max_characters=longest))
    assert f"Dialogues without a usable turn: {'none' if usable else 'user39-3'}." in built.notes


def test_prism_drops_users_with_one_dialogue(tmp_path):
    built = prism_set.build(str(prism(tmp_path, {f"user{i}": 1 for i in range(20)})), prism_set.Config())
    assert built.rows == [] and built.counts["users with a single dialogue dropped"] == 20


def test_prism_refuses(tmp_path):
    def twice(survey, conversations):
        conversations.append(conversations[0])

    def stranger(survey, conversations):
        conversations[4]["user_id"] = "nobody"

    def a_list(survey, conversations):
        conversations[2]["conversation_history"][1]["content"] = ["a", "b"]

    def two_users(survey, conversations):
        survey.append(survey[0])

    def a_system_turn(survey, conversations):
        conversations[0]["conversation_history"][0]["role"] = "system"

    def a_word_for_a_choice(survey, conversations):
        conversations[0]["conversation_history"][2]["if_chosen"] = "False"

    def a_number(survey, conversations):
        conversations[1]["conversation_id"] = 5

    def no_history(survey, conversations):
        del conversations[1]["conversation_history"]

    for number, (change, message) in enumerate(
        [
            (twice, "conversations.jsonl, line .*user0-0 is there twice"),
            (stranger, "line 5: user nobody is not in survey.jsonl"),
            (a_list, "line 3: a content in turn 0 is list, not a string"),
            (two_users, "survey.jsonl, line .*user0 is there twice"),
            (no_history, "line 2: not a conversation"),
            (a_system_turn, "line 1: turn 0 has a role"),
            (a_word_for_a_choice, "line 1: turn 0 has a role or an if_chosen"),
            (a_number, "line 2: conversation_id or user_id is not a string"),
        ]
    ):
        with pytest.raises(PyargsError, match=message):
            prism_set.build(str(prism(tmp_path / str(number), DIALOGUES, change)), prism_set.Config())
    (tmp_path / "0" / "survey.jsonl").unlink()
    with pytest.raises(PyargsError, match="survey.jsonl.*is missing"):
        prism_set.build(str(tmp_path / "0"), prism_set.Config())


@needs_shared
def test_prism_in_the_original_layout(tmp_path):
    found = prepare.build(
        "prism", SHARED / "fixtures_synthetic" / "prism", tmp_path / "out", prism_set.Config(embedder="none")
    )
    assert found["counts"]["conversations"] == 155 and found["counts"]["users with conversations"] == 40
    rows = [r for split in data.SPLITS for _, r in sources.rows(tmp_path / "out" / f"{split}.parquet")]
    owners = {
        c["conversation_id"]: c["user_id"] for _, c in sources.rows(SHARED / "fixtures_synthetic/prism/conversations.jsonl")
    }
    assert all(owners[r["dialogue"]] == r["user_id"] for r in rows) and found["check"]["problems"] == {}
    utterances = {}
    for _, u in sources.rows(SHARED / "fixtures_synthetic/prism/utterances.jsonl"):
        utterances.setdefault((u["conversation_id"], u["turn"], u["if_chosen"]), set()).add(u["model_response"])
    for r in rows:  # another file of the source says the same
        assert r["chosen"] in utterances[r["dialogue"], r["turn"], True]
        assert r["rejected"] in utterances[r["dialogue"], r["turn"], False]
