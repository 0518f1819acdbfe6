"""Rows of preference data: what is taken, what is refused, what is held out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import row, said

from pyargs.data import schema
from pyargs.errors import PyargsError


def test_all_counts_as_train_and_own_train_test_is_kept():
    rows = schema.checked([row(role="all", split="all", prompt=f"p{i}") for i in range(5)])
    assert {r["split"] for r in rows} == {"train"}
    rows = schema.checked([row(prompt=f"p{i}", role="train_test" if i == 3 else "train") for i in range(5)])
    assert schema.carve(rows) == rows


def test_split_serves_where_role_is_missing_or_null():
    assert schema.checked([row(role=..., split="query")])[0]["split"] == "query"
    assert schema.checked([row(role=None, split="support")])[0]["split"] == "support"


def test_chat_prompts_and_conversational_responses():
    chat = [{"role": "user", "content": "hi", "name": "x"}]
    said = [{"role": "assistant", "content": "good"}]
    dataset = schema.to_dataset(schema.checked([row(prompt=chat, chosen=said)]))
    assert dataset[0]["prompt"] == [{"role": "user", "content": "hi"}] and dataset[0]["chosen"] == "good"


@pytest.mark.parametrize("before", [("hi",), ("hi", "yes?", "well")])
@pytest.mark.parametrize("prompt", [..., None])
def test_a_prompt_that_both_sides_begin_with(before, prompt):
    """TRL's implicit prompt."""
    (found,) = schema.checked([row(prompt=prompt, chosen=said(*before, "good"), rejected=said(*before, "bad"))])
    assert (found["prompt"], found["chosen"], found["rejected"]) == (said(*before), "good", "bad")


@pytest.mark.parametrize("prompt", ["hi", said("hi"), said("hi", "yes?", "well")])
def test_a_prompt_of_its_own_may_stand_before_the_answers_too(prompt):
    asked = said(prompt) if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": "good"}]
    for chosen in (answer, asked + answer):
        (found,) = schema.checked([row(prompt=prompt, chosen=chosen)])
        assert (found["prompt"], found["chosen"], found["rejected"]) == (prompt, "good", "bad")


def test_pair_id_does_not_depend_on_the_label():
    one, two = schema.checked([row(), row(user="u2", chosen="bad", rejected="good")])
    assert one["pair_id"] == two["pair_id"] != schema.checked([row(prompt="other")])[0]["pair_id"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": 3}, "row 1: chosen is int, not a string"),
        ({"prompt": None}, "prompt is NoneType"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"rejected": ""}, "rejected is empty"),
        ({"rejected": "good"}, "chosen and rejected are the same"),
        ({"chosen": ..., "chossen": "x"}, "no column 'chosen'.*chossen"),
        ({"user": ..., "user_ids": "x"}, "no column 'user_id'; a row has user_id, prompt, chosen, rejected, split.*user_ids"),
        ({"user": 7.0}, "user_id is float"),
        ({"user": True}, "user_id is bool"),
        ({"user": "u1", "user_id": "u2"}, "row 1: user is 'u1', but user_id 'u2'"),
        ({"user": 8, "user_id": 7}, "row 1: user is '8', but user_id '7'"),
        ({"role": "test"}, "unknown split 'test'"),
        ({"role": ..., "split": ...}, "no column 'split'"),
        ({"rejected": ..., "loser": "x"}, "no column 'rejected'; .*split. There are: loser.$"),  # none of those that are read
        ({"role": ..., "split": "adapt"}, "needs a column 'role'"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [{"role": "user"}]}, "without 'role' and 'content'"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "content is list"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "one assistant message"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(PyargsError, match=message):
        schema.checked([row(**changes)])


def test_a_user_may_be_named_twice_alike():
    for both in ({"user": 7, "user_id": "7"}, {"user": None, "user_id": 7}):
        assert schema.checked([row(**both)])[0]["user_id"] == "7"


def test_refuses_mixtures():
    with pytest.raises(
        PyargsError, match="row 2: user 'u1' has split 'query' here, but is one of the train users in rows, row 1"
    ):
        schema.checked([row(), row(role="query")])
    with pytest.raises(PyargsError, match="row 2: prompts must be all"):
        schema.checked([row(), row(prompt=[{"role": "user", "content": "x"}])])
    with pytest.raises(PyargsError, match="no rows"):
        schema.checked([])


USERS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 15)), min_size=1, max_size=80)


@settings(max_examples=200, deadline=None)
@given(USERS, st.floats(0, 0.9), st.integers(0, 3), st.randoms(use_true_random=False))
def test_carving(pairs, share, seed, rng):
    rows = schema.checked(
        [row(user=u, prompt=f"prompt {p}", rejected=f"bad {i}", pair_id=str(i)) for i, (u, p) in enumerate(pairs)]
    )
    done = schema.carve(rows, train_test=share, seed=seed)
    assert [r | {"split": "train"} for r in done] == rows  # nothing but the split changes, not even the order
    sides = {split: {r["prompt"] for r in done if r["split"] == split} for split in ("train", "train_test")}
    assert not sides["train"] & sides["train_test"]  # of anybody
    users_of = {p: {u for u, q in pairs if q == p} for _, p in pairs}
    for user in {u for u, _ in pairs}:
        prompts = {p for u, p in pairs if u == user}
        aside = {p for p in prompts if f"prompt {p}" in sides["train_test"]}
        assert aside < prompts  # something is left to train on
        wanted = min(int(share * len(prompts) + 0.5), len(prompts) - 1)
        own = {p for p in prompts if len(users_of[p]) == 1}
        common = len(aside - own)  # own prompts make up what the shared ones leave, as far as there are any
        assert len(aside) == max(common, min(wanted, common + len(own)))
    shared = {p for p, users in users_of.items() if len(users) > 1}
    assert len({p for p in shared if f"prompt {p}" in sides["train_test"]}) <= int(share * len(shared) + 0.5)
    assert schema.carve(rows, train_test=share, seed=seed) == done
    shuffled = rows[:]
    rng.shuffle(shuffled)
    key = {r["pair_id"]: r["split"] for r in done}
    assert {r["pair_id"]: r["split"] for r in schema.carve(shuffled, train_test=share, seed=seed)} == key


def test_carving_is_exact_where_nothing_is_shared():
    rows = schema.checked([row(user=u, prompt=f"{u} {i}") for u, n in (("a", 10), ("b", 49), ("c", 1)) for i in range(n)])
    done = schema.carve(rows)
    assert [sum(r["split"] == "train_test" for r in done if r["user_id"] == u) for u in "abc"] == [2, 10, 0]


def test_carving_depends_on_the_seed_and_leaves_adapt_users_alone():
    rows = schema.checked([row(prompt=f"p{i}") for i in range(50)] + [row(user="n", role="query", prompt="p")])
    first, second = (schema.carve(rows, seed=seed) for seed in (0, 1))
    assert first != second and first[-1]["split"] == "query"
    with pytest.raises(PyargsError, match="share"):
        schema.carve(rows, train_test=1.0)
    with pytest.raises(PyargsError, match="'prompt' or 'pair'"):
        schema.carve(rows, by="user")


def test_carving_by_pair_goes_by_the_texts():
    """The same pair under two ids, preferred the other way round, is on one side."""
    rows = schema.checked(
        [row(pair_id=f"a{i}", chosen="good", rejected=f"bad {i}") for i in range(20)]
        + [row(user="u2", pair_id=f"b{i}", chosen=f"bad {i}", rejected="good") for i in range(20)]
    )
    done = schema.carve(rows, by="pair")
    sides = [{schema.text_id(r) for r in done if r["split"] == split} for split in ("train", "train_test")]
    assert len(sides[1]) == 4 and not sides[0] & sides[1]


def test_carving_by_pair():
    rows = schema.checked([row(pair_id=str(i), rejected=f"bad {i}") for i in range(10)])
    assert {r["split"] for r in schema.carve(rows)} == {"train"}  # one prompt, and it stays in train
    assert sum(r["split"] == "train_test" for r in schema.carve(rows, by="pair")) == 2
