"""Calls of `generate` of transformers, plain and guided, that tests of integrations share."""

from __future__ import annotations

import pyargs
from pyargs.lm.tokenize import left_pad

PROMPTS = [[5, 9, 7, 11], [4, 8, 6, 5, 9]]
STOPS = [47, 3]
"""Of the tiny model's greedy answers to these prompts, one ends with each."""


def usual(rows=PROMPTS, **asked) -> dict:
    """Arguments of `generate`, padded on the left."""
    ids, mask = left_pad([list(row) for row in rows], 1)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 50, "eos_token_id": STOPS} | asked
    return {"input_ids": ids, "attention_mask": mask, **asked}


def guided(models, asked, **how):
    """What the same call gives inside a guided loop, by default without a weight."""
    policy, model = models
    how = {"users": ["ann", "bob", "cid"][: len(asked["input_ids"])], "reward_weight": 0.0, "num_candidates": 3} | how
    return policy.generate(**asked, custom_generate=pyargs.guide(model, **how))
