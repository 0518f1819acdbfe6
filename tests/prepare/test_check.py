"""What the check finds, what it notes, what is none of its business."""

from __future__ import annotations

import pytest
from rows import CI, SHARED, needs_shared, row

from pyargs.data.preferences import read
from pyargs.prepare import check


def report(rows: list[dict]) -> dict:
    return check.report(((f"f, line {number}", r) for number, r in enumerate(rows, 1)), embedder=None)


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
    found = check.report(read(SHARED / f"{file}.jsonl.gz"), embedder=None)
    repeated = found["problems"].pop("responses rejected in query that the same user rejects in support", {"count": 0})
    assert found["problems"] == {} and repeated["count"] == (50 if "pref_lamp" in file else 0)


@needs_shared
def test_word_overlap_decides_the_real_titles():
    found = check.report(read(CI / "prefs_minilm.jsonl.gz"), embedder=None)
    assert found["blind"]["word_overlap"]["accuracy"] > 95 and found["blind"]["words"]["accuracy"] < 50
