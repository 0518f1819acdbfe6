"""What the plain form of a step keeps, by its definitions; the ops are compared with it."""

from __future__ import annotations

import pytest
import torch
from states import copied, same_state, state_of

from pyargs.ops import score_step
from pyargs.ops.row_state import counts, note, spread_of, uniform


def rewards(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("k", [1, 3, 10, 64])
def test_the_spread_is_the_standard_deviation_of_a_row_s_own_candidates(k):
    given, count = rewards(50, k), torch.arange(50) % k + 1
    want = torch.stack([row[:own].double().std(correction=0) for row, own in zip(given, count, strict=True)]).float()
    given[torch.arange(k) >= count.unsqueeze(1)] = 0.0
    torch.testing.assert_close(spread_of(given, count), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(spread_of(given), given.double().std(1, correction=0).float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(spread_of(torch.nn.functional.pad(given, (0, 5)), count), spread_of(given, count))


@pytest.mark.parametrize("k", [1, 3, 10, 64])
def test_the_op_s_spread_is_that_one_bit_for_bit(k):
    given, count = rewards(50, k), torch.arange(50) % k + 1
    own = given.masked_fill(torch.arange(k) >= count.unsqueeze(1), 0.0)
    for kept, state in ((given, state_of(50)), (own, state_of(50, count=count))):
        zeros = torch.zeros(50, k)
        score_step(given.unsqueeze(2), torch.ones(1, 1), torch.zeros(50).long(), zeros, zeros.long(), state)
        assert torch.equal(state.chosen[:, 3].float(), spread_of(kept, state.count))


def test_a_row_that_has_finished_stays_as_it_is():
    state = state_of(3, finished=torch.tensor([False, True, False]), so_far=torch.ones(3), total=torch.ones(3))
    state = state._replace(limit=torch.tensor([1, 9, 9]))
    before, reward = copied(state), torch.tensor([0.5, 0.5, 2.0])
    note(state, torch.tensor([7, 0, 8]), torch.tensor([2, 0, 1]), reward, reward, torch.tensor([False, True, False]))
    assert state.step.tolist() == [1, 1, 3] and state.finished.tolist() == [True, True, False]  # the first by its limit
    assert state.slot.tolist() == [-1, -1, 1] and state.token.tolist() == [7, 0, 8]
    assert state.chosen[:, 1].tolist() == [2, 0, 1]
    assert state.total.tolist() == [1.5, 1.0, 3.0] and state.so_far.tolist() == [1.5, 1.0, 1.0]
    same_state(state, before, torch.zeros(3, dtype=torch.bool))  # what is only read has not changed


def test_the_noise_is_that_of_the_step_and_the_last_one_behind_the_end():
    noise = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    assert torch.equal(uniform(noise, torch.tensor([0, 1, 5])), torch.tensor([0.1, 0.4, 0.6]))


def test_one_candidate_stays_whatever_is_asked_and_whatever_is_no_number():
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [torch.nan] * 3, [-torch.inf] * 3])
    none = torch.zeros(3, dtype=torch.float64)
    assert counts(logprobs, torch.tensor([0, 3, 3]), none, none).tolist() == [1, 1, 1]
