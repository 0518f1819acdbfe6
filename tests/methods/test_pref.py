"""PReF: its start is the factorised preferences, its loss its formula."""

from __future__ import annotations

import warnings

import numpy as np
import planted
import pytest
import torch
from formulas import USERS, compare, leaves, some_batch
from planted import ids, trained

from pyargs.methods import pref
from pyargs.types import Features


def test_pref_starts_with_the_signs_of_preferences_and_warns_of_sparse_data():
    dense = planted.pairs("low_rank", noise=0.01)
    config = pref.Config(rank=3)
    model = pref.build(planted.Backbone(), None, ids(dense.train), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pref.start(model, dense.train, config)
    assert planted.correct(model, dense.train).mean() > 0.85  # before any training
    assert model.about["warm_start"]["zero_users"] == 0 and model.about["warm_start"]["raters_per_pair"] > 5
    sparse = planted.pairs("mixtures")
    model = pref.build(planted.Backbone(), None, ids(sparse.train), config)
    with pytest.warns(UserWarning, match="13 of 16 users at 0"):  # one rater a pair: only the K = 3 largest users are seen
        pref.start(model, sparse.train, config)
    assert model.about["warm_start"]["zero_users"] == 13 / 16
    assert (model.users.vectors["mixture"].norm(dim=1) > 1e-3).all()


def test_pref_orientation_does_not_depend_on_the_label():
    dense = planted.pairs("low_rank")
    config = pref.Config(rank=3)
    swapped = Features(dense.train.hidden, dense.train.offsets, dense.train.rejected, dense.train.chosen, dense.train.users)
    starts = []
    for data in (dense.train, swapped):
        model = pref.build(planted.Backbone(), None, ids(data), config)
        pref.start(model, data, config)
        starts.append(model.users.vectors["mixture"].detach() @ model.head.directions.detach())
    torch.testing.assert_close(starts[0], -starts[1], atol=1e-4, rtol=1e-3)  # all labels turned: all heads turned


def test_fewer_users_than_features_leave_none_dead():
    data = planted.pairs("low_rank")
    few = data.train.select([i for i, user in enumerate(data.train.users) if user in ("user0", "user1")])
    model, _ = trained("pref", type(data)(**{**vars(data), "train": few}), rank=6, epochs=2)
    assert model.about["warm_start"]["empty_features"] == 4
    assert (model.head.directions.norm(dim=1) > 0).all() and (model.users.vectors["mixture"].norm(dim=0) > 0).all()


@pytest.mark.parametrize("votes", ["signed", "unit"])
def test_prefs_start_is_the_factorisation_that_its_option_names(votes):
    """Votes that are all known are factorised as they are; with gaps the filling-in is that of numpy, round by round."""
    data = planted.pairs("low_rank")
    config = pref.Config(rank=3, votes=votes)
    model = pref.build(planted.Backbone(), None, list(dict.fromkeys(data.train.users)), config)
    pref.start(model, data.train, config)
    found = model.users.vectors["mixture"].detach().double()

    rows, (low, unknown, rank) = model.users.rows(data.train.users), {"signed": (-1, 0, 3), "unit": (0, 0.5, 100)}[votes]
    left = torch.minimum(data.train.chosen, data.train.rejected)
    _, place = left.unique(return_inverse=True)
    matrix = np.full((int(place.max()) + 1, len(model.users)), np.nan)
    matrix[place, rows] = np.where(data.train.chosen == left, 1, low)
    filled = np.where(np.isnan(matrix), unknown, matrix)
    for _ in range(10):
        u, s, v = np.linalg.svd(filled, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ v[:rank]
        filled = np.where(np.isnan(matrix), low_rank.clip(low, 1), matrix)
    _, s, v = np.linalg.svd(filled, full_matrices=False)
    want = torch.tensor(v[:3].T * np.sqrt(s[:3]))
    assert np.isnan(matrix).mean() > 0.3
    torch.testing.assert_close(found @ found.T, want @ want.T, atol=1e-5, rtol=1e-4)  # whatever the vectors' signs are


@pytest.mark.parametrize("reg", ["weight_decay", "feature_l2"])
def test_formula_of_pref(reg):
    torch.manual_seed(0)
    config = pref.Config(rank=3, reg=reg)
    model = pref.build(planted.Backbone(), None, USERS, config)
    batch = some_batch()
    ours, p = leaves(model)
    change = (batch.hidden[:, 0, 0] - batch.hidden[:, 1, 0]).double() @ p["directions"].T
    margin = (p["users.vectors.mixture"][batch.user] * change).sum(1)
    want = torch.log1p(torch.exp(-margin)).mean()
    if reg == "feature_l2":
        want = want + 0.02 * change.square().sum(1).sqrt().mean()
    compare(pref.loss(model, batch, config), want, ours, p)
