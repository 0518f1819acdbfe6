"""States of a packed pass."""

from __future__ import annotations

import torch
from conftest import tiny_lm

from pyargs.lm.forward import packed_states, spans
from pyargs.lm.tokenize import pack


def test_spans_of_predicting_states():
    lm = tiny_lm()
    packed = pack([[5, 6, 7]], [[[8, 9], [4, 3, 2]]])
    states = packed_states(lm.get_decoder(), packed)
    predicting, mask = spans(states, packed, predicting=True)
    assert mask.sum(1).tolist() == [2, 3]
    assert torch.equal(predicting[0, 0], states[0, 2]) and torch.equal(predicting[1, 0], states[0, 2])
    assert torch.equal(predicting[1, 2], states[0, 6])
