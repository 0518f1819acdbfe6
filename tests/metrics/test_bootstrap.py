"""Intervals resample users, are wider where they are few, and nothing undefined becomes a number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyargs.errors import PyargsError
from pyargs.metrics.bootstrap import resamples, small_sample, user_difference, user_interval


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from([0.0, 100.0]), min_size=1, max_size=6), min_size=2, max_size=8))
def test_the_interval_holds_the_mean(users):
    values = {str(n): each for n, each in enumerate(users)}
    found = user_interval(values, draws=2000)
    every = [value for each in users for value in each]
    assert found["mean"] == pytest.approx(sum(every) / len(every)) and found["n"] == len(every)
    wider = small_sample(len(users))
    assert found["mean"] * (1 - wider) - 1e-6 <= found["low"] <= found["mean"] + 1e-6
    assert found["mean"] - 1e-6 <= found["high"] <= found["mean"] + wider * (100 - found["mean"]) + 1e-6


def test_the_interval_shrinks_with_users_and_not_with_copies_of_pairs():
    draw = np.random.default_rng(0)
    users = {str(n): list(100.0 * (draw.random(10) < draw.random())) for n in range(400)}
    few = {user: users[user] for user in list(users)[:25]}
    width = lambda found: found["high"] - found["low"]  # noqa: E731
    assert width(user_interval(users)) < 0.4 * width(user_interval(few)), "widened for 25 users by a tenth"
    copied = {user: values * 5 for user, values in few.items()}
    assert width(user_interval(copied)) == pytest.approx(width(user_interval(few)))


def test_the_interval_is_that_of_a_plain_bootstrap_widened_for_few_users():
    users = {"a": [100], "b": [0] * 12, "c": [100, 0], "d": [100], "e": [0] * 8 + [100]}  # pairs count, not users
    draw, means = np.random.default_rng(1), []
    for _ in range(4000):
        taken = [value for name in draw.choice(list(users), len(users)) for value in users[name]]
        means.append(np.mean(taken))
    found = user_interval(users)
    factor = stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975) * (5 / 4) ** 0.5
    right = [found["mean"] + factor * (end - found["mean"]) for end in np.quantile(means, (0.025, 0.975))]
    assert (found["low"], found["high"]) == pytest.approx(tuple(right), abs=3)


def test_a_difference_is_paired():
    """Users differ a lot and the methods by five points: only the paired interval sees it."""
    draw = np.random.default_rng(0)
    other = {str(n): [level] for n, level in enumerate(draw.uniform(0, 90, 30))}
    own = {user: [level + 5] for user, (level,) in other.items()}
    found = user_difference(own, other)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((5, 5, 5))
    with pytest.raises(PyargsError, match="same users"):
        user_difference(own, {"0": [1]})


def test_rows_that_are_the_same_differ_by_nothing():
    """Whatever the order in which their values are added up, and however many seeds they have."""
    draw = np.random.default_rng(0)
    own = {str(n): list(draw.uniform(0, 90, 17)) for n in range(10)}
    found = user_difference({user: values * 3 for user, values in own.items()}, own)
    assert (found["mean"], found["low"], found["high"]) == (0, 0, 0) and str(found["low"]) == "0.0"


@pytest.mark.parametrize("outcomes", ["normal", "right or wrong"])
def test_an_interval_over_ten_users_covers_what_it_should(outcomes):
    """Of 1,000 made-up sets of ten users: an interval of 95% misses the truth in about 50, a percentile one in over 80."""
    draw, missed, plain = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        drawn = draw.normal(size=(10, 1)) if outcomes == "normal" else draw.random((10, 17)) < draw.beta(6, 3, size=(10, 1))
        truth = 0.0 if outcomes == "normal" else 6 / 9
        found = user_interval({str(n): each.tolist() for n, each in enumerate(drawn)}, draws=1000)
        missed += not found["low"] <= truth <= found["high"]
        ends = [found["mean"] + (found[end] - found["mean"]) / small_sample(10) for end in ("low", "high")]
        plain += not ends[0] <= truth <= ends[1]
    assert plain > 80 and 30 < missed < 75
    assert small_sample(10) == pytest.approx(1.2166, abs=1e-3) and small_sample(1000) == pytest.approx(1, abs=0.01)
    users = {str(n): each.tolist() for n, each in enumerate(drawn)}
    assert user_interval(users, level=0.99)["low"] < user_interval(users)["low"]


def test_intervals_of_nothing():
    with pytest.raises(PyargsError, match="at least one"):
        user_interval({})
    with pytest.raises(PyargsError, match="at least one"):
        user_interval({"a": []})
    with pytest.raises(PyargsError, match="user b"):
        user_interval({"a": [1.0], "b": [math.nan]})
    alone = user_interval({"a": [0.0, 100.0]})
    assert alone["mean"] == 50 and alone["low"] is None
    taken = resamples(7, 100)
    assert (taken.sum(1) == 7).all() and taken.shape == (100, 7)
