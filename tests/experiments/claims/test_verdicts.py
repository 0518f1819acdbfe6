"""What decides a claim: whole intervals, wider ones where many are compared, one against is enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.claims import FAILS, HOLDS, OPEN
from experiments.claims.verdicts import (
    LEAST,
    above,
    all_of,
    any_of,
    at_least,
    at_most,
    below,
    comparison,
    decided,
    within,
)

numbers = st.floats(-100, 100)


@given(numbers, numbers, numbers, st.floats(0, 50))
def test_tests_are_for_the_whole_interval(one, two, bound, near):
    interval = {"mean": (one + two) / 2, "low": min(one, two), "high": max(one, two)}
    opposite = {True: False, False: True, None: None}
    assert at_most(bound)(interval) is opposite[above(bound)(interval)]
    assert at_least(bound)(interval) is opposite[below(bound)(interval)]
    assert (above(bound)(interval) is True) == (interval["low"] > bound)
    if within(bound - near, bound + near)(interval):
        assert not above(bound + near)(interval) and not below(bound - near)(interval)
    for one, users in ((interval | {"low": None, "high": None}, 99), (interval, LEAST - 1)):
        (made,) = decided([comparison("", lambda level, one=one: one, [], above(bound), users)])
        assert made["for"] is made["low"] is None and made["why"]


def test_many_comparisons_need_wider_intervals():
    """One row in forty lies above by chance: a claim that some row of 40 does must not hold by that."""
    asked = []

    def measured(level):
        asked.append(level)
        return {"mean": 1.0, "low": 0.1 if level < 0.96 else -0.1, "high": 2.0}

    one = comparison("x", measured, [], above(), 99)
    (alone,) = decided([one])
    many = decided([one] * 40)
    assert alone["for"] is True and alone["level"] == pytest.approx(0.95)
    assert {(each["for"], each["level"]) for each in many} == {(None, asked[-1])} and asked[-1] == pytest.approx(1 - 0.05 / 40)


@given(st.lists(st.sampled_from([True, False, None]), min_size=1), st.lists(st.just("VPL"), max_size=1))
def test_one_against_is_enough_and_one_open_is_too_much(kinds, lacking):
    found = [{"what": "x", "mean": 0.0, "low": 0.0, "high": 0.0, "why": "", "for": kind} for kind in kinds]
    every = all_of(found, lacking)[0]
    assert every == (FAILS if False in kinds else HOLDS if all(kinds) and not lacking else OPEN)
    turned = [one | {"for": None if one["for"] is None else not one["for"]} for one in found]
    assert any_of(turned, lacking)[0] == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[every]  # some = not every not
