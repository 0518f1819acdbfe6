"""Perplexity of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_lm

from pyargs.metrics.perplexity import perplexities, perplexity


def test_perplexity_of_tokens():
    lm = tiny_lm()
    prompts, answers = [[5, 6], [7]], [[8, 9, 10], []]
    logs = lm(torch.tensor([[5, 6, 8, 9, 10]])).logits[0].log_softmax(-1)
    want = math.exp(-(logs[1, 8] + logs[2, 9] + logs[3, 10]).item() / 3)
    assert perplexity(lm, prompts, answers) == pytest.approx(want, rel=1e-4)
    assert perplexity(lm, prompts, [[], []]) == math.inf
    # Several sets of answers to the same prompts are worth what each is by itself.
    sets = [answers, [[], []], [[11], [12, 13]], answers]
    assert perplexities(lm, prompts, sets) == pytest.approx([perplexity(lm, prompts, one) for one in sets], rel=1e-5)
