"""Simulated users are consistent."""

from __future__ import annotations

import numpy as np
import pytest

from pyargs.errors import PyargsError
from pyargs.prepare import simulate


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
