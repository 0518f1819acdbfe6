"""The tokens of a batch's answers: streamed, padded behind a stop token, looked at a few steps late."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, arguments, guided, prompts

from pyargs.decode.answer import Output
from pyargs.decode.request import check
from pyargs.errors import PyargsError


def test_stopped_rows_write_padding_and_lengths_leave_the_stop_token_out():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    stops = list(range(1, 40))  # most tokens stop
    got = guided(policy, model, prompts([2, 6, 4]), USERS, eos_token_id=stops, pad_token_id=50)
    for row, length in zip(got.tokens.tolist(), got.lengths.tolist(), strict=True):
        assert all(token not in stops for token in row[:length])
        if length < len(row):
            assert row[length] in stops and set(row[length + 1 :]) <= {50}


def test_tokens_are_streamed_as_they_are_chosen():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    seen = []
    got = guided(policy, model, prompts([2, 6]), USERS[:2], token_callback=lambda tokens: seen.append(tokens.tolist()))
    assert torch.tensor(seen).T.tolist() == got.tokens.tolist()


@pytest.mark.parametrize("broken", range(9))
def test_a_late_look_raises_within_8_steps(broken):
    request = check(tiny_lm(), reward_model(tiny_lm()), torch.tensor([[5]]), None, ["ann"], **arguments(max_new_tokens=40))
    output, finished = Output(1, 40, "cpu"), torch.tensor([False])
    output.late = True
    with pytest.raises(PyargsError, match=r"row\(s\) \[0\]"):
        for step in range(40):
            slot = torch.tensor([-1 if step == broken else 0])
            output.add(torch.tensor([3]), slot, torch.zeros(1, 2), finished)
            output.stop(request, step, finished)
    assert step - broken < 8
