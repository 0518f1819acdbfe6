"""Folders that the first house saved (4c4f8ed: `train METHOD --profile smoke`, `adapt`) load, score as then, and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

import pyargs
from pyargs.errors import PyargsError
from pyargs.files import read_json

FOLDER = Path(__file__).parent / "first_house"
BACKBONE = str(FOLDER / "backbone")
"""`tiny-random` as it was drawn there: torch's normal numbers differ between processors in the last bits."""
EXPECTED = read_json(FOLDER / "expected.json")
"""By method: two rows of the set `synthetic`, and what the first house computed of them: log-probs of a policy that answers by
itself, rewards of the others, float [2, 2]."""


@pytest.mark.parametrize("method", sorted(EXPECTED))
def test_a_folder_of_the_first_house_loads(method):
    model, rows = pyargs.load_model(FOLDER / method, backbone=BACKBONE), Dataset.from_list(EXPECTED[method]["rows"])
    alone = not hasattr(model, "pair_scores")
    scores = model.pair_logprobs(rows)[0] if alone else model.pair_scores(rows)[1]
    torch.testing.assert_close(
        scores.double(), torch.tensor(EXPECTED[method]["scores"], dtype=torch.float64), atol=1e-3, rtol=1e-4
    )
    policy, best_of = None if alone else BACKBONE, 2 * (method == "pal")
    if best_of:
        with pytest.raises(PyargsError, match="guides no decoder"):
            pyargs.Engine(policy, model)
    engine = pyargs.Engine(policy, model, best_of=best_of)
    wish = {} if alone or best_of else {"reward_weight": 1.0}
    asked, users = rows["prompt"][:], rows["user_id"][:] if model.known_users else None
    for answer in engine.generate(asked, users, max_new_tokens=3, stop=[], **wish):
        assert len(answer.tokens) == 3
    if wish:  # it carries no unit of strength, and must not be steered by a guess
        with pytest.raises(PyargsError, match="pyargs tune"):
            engine.generate(asked, users, max_new_tokens=3)
