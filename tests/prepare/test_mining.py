"""Hard negatives: near, another user's, never in both parts of a user."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import CI, needs_shared

from pyargs.data import schema, sources
from pyargs.data.sets import pref_lamp as lamp_files
from pyargs.errors import PyargsError
from pyargs.prepare import mining


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
        own = {schema.normalized(t) for t, u in zip(titles, names, strict=True) if u == names[i]}
        assert schema.normalized(titles[negative.row]) not in own and cosines[i, negative.row] < 0.9991
        better = {
            schema.normalized(t)
            for j, t in enumerate(titles)
            if schema.normalized(t) not in own and cosines[i, negative.row] + 1e-5 < cosines[i, j] < 0.9989
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
