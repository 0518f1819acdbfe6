"""One case for each way through each CUDA kernel, small enough for an OS thread per CUDA thread (`.ci/emulate.py`): the
wide and the narrow loads, several blocks to a row, several tiles, more survivors than a block keeps."""

from __future__ import annotations

import emulated
import pytest
import torch
from states import copied, same_state, state_of

from pyargs import ops

pytestmark = emulated.needed
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows that no wide load may start at."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def agree(got, expected, atol: float = 2e-5) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


LOGITS = {
    "three chunks": normal(1, 17001),
    "equal": torch.ones(1, 16700),
    "two rows": normal(2, 9000, dtype=torch.bfloat16),
    "unaligned": unaligned(normal(2, 8999, dtype=torch.float16)),
}


@pytest.mark.parametrize("name", LOGITS)
def test_topk_logprobs(name):
    emulated.order(1)
    agree(emulated.topk_logprobs(LOGITS[name], 64), ops.topk_logprobs_reference(LOGITS[name], 64))


@pytest.mark.parametrize("recording", [0, 1])
def test_tickets_are_left_as_they_were_found(recording):
    """Two launches of other shapes, of which the second is right only if the first left its tickets at 0."""
    for logits, k in ((LOGITS["two rows"], 3), (LOGITS["three chunks"], 20)):
        with emulated.stream(5, recording):
            agree(emulated.topk_logprobs(logits, k), ops.topk_logprobs_reference(logits, k))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokenwise_select(dtype, sampled):
    emulated.order(2)
    finished, weight = torch.zeros(1, dtype=torch.bool), torch.ones(1)
    args = (normal(1, 8300, dtype=dtype), unaligned(normal(1, 8300, seed=1)), weight, finished, 40)
    more = dict(temperature=1.0, uniform=torch.tensor([0.5])) if sampled else {}
    agree(emulated.tokenwise_select(*args, **more), ops.tokenwise_select_reference(*args, **more))


@pytest.mark.parametrize(("k", "dtype"), [(3, torch.float32), (5, torch.bfloat16), (40, torch.float16)])
def test_score_select(k, dtype):
    emulated.order(3)
    batch, hidden = 2, 4200 if k < 40 else 2100
    features, weight = normal(batch, k, hidden, dtype=dtype), normal(3, hidden, dtype=dtype, seed=1)
    features[1] = features[0]
    args = (features, weight) if k != 5 else (unaligned(features), unaligned(weight))
    args += (torch.tensor([0, 2]),)
    args += (torch.ones(batch), normal(batch, k, seed=2), torch.arange(batch * k).view(batch, k), torch.tensor([False, False]))
    more = dict(bias=normal(3, hidden, seed=3), activation="relu", scale=0.01)
    agree(emulated.score_select(*args, **more), ops.score_select_reference(*args, **more))


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize("tokenwise", [False, True])
def test_steps_with_what_rows_keep(tokenwise, k):
    emulated.order(6)
    filters = dict(own_k=torch.tensor([k, 2, k]), top_p=torch.full((3,), 0.9).double(), min_p=torch.full((3,), 0.01).double())
    heat = dict(temperature=torch.tensor([0.0, 1.0, 1.0]), noise=torch.full((3, 2), 0.4))
    finished = torch.tensor([False, False, True])
    if tokenwise:
        one = state_of(**filters, **heat, finished=finished)
        args, op, like = (normal(3, 8300), normal(3, 8300, seed=1), k), emulated.tokenwise_step, ops.tokenwise_step_reference
    else:
        sums = dict(so_far=torch.ones(3), total=torch.zeros(3))
        one = state_of(**filters, **heat, **sums, finished=finished)
        logprobs = normal(3, k, seed=2).sort(descending=True).values
        args = normal(3, k, 300), normal(3, 300, seed=1), torch.arange(3), logprobs, torch.arange(3 * k).view(3, k)
        op, like = emulated.score_step, ops.score_step_reference
    other = copied(one)
    op(*args, one)
    like(*args, other)
    same_state(one, other)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("k", "dtype"), [(13, torch.float32), (3, torch.float16), (13, torch.bfloat16), (33, torch.float16)])
def test_user_mlp(k, dtype, wide):
    """More than 12 candidates of 16 bits go through tensor cores."""
    emulated.order(4)
    hidden, bank = normal(1, k, 584, dtype=dtype) / 8, normal(2, 17, 584, dtype=dtype, seed=1) / 8
    hidden, bank = (hidden, bank) if wide else (unaligned(hidden), unaligned(bank))
    agree([emulated.user_mlp(hidden, bank, torch.tensor([1]))], [ops.user_mlp_reference(hidden, bank, torch.tensor([1]))])


@pytest.mark.parametrize(("k", "dtype"), [(13, torch.float32), (14, torch.bfloat16)])
def test_score_step_with_a_bank(k, dtype):
    """Several blocks to a row, and a row that is over."""
    emulated.order(7)
    sums = dict(so_far=torch.ones(3), total=torch.zeros(3), finished=torch.tensor([False, False, True]))
    filters = dict(own_k=torch.tensor([k, 2, k]), top_p=torch.ones(3).double(), min_p=torch.zeros(3).double())
    one = state_of(**sums, **filters, temperature=torch.ones(3), noise=torch.full((3, 2), 0.4))
    other, logprobs = copied(one), normal(3, k, seed=2).sort(descending=True).values
    args = normal(3, k, 40, dtype=dtype), normal(3, 17, seed=1), torch.arange(3), logprobs, torch.arange(3 * k).view(3, k)
    more = dict(bias=normal(3, 17, seed=3), activation="relu", scale=0.1, bank=normal(3, 17, 40, dtype=dtype, seed=4) / 8)
    emulated.score_step(*args, one, **more)
    ops.score_step_reference(*args, other, **more)
    same_state(one, other)


@pytest.mark.parametrize("dim", [8, 7])
def test_commit(dim):
    emulated.order(5)
    states = [normal(3, 2, 9, dim, seed=i) for i in range(2)]
    expected = [tensor.clone() for tensor in states]
    for op, tensors in ((emulated.commit, states), (ops.commit_reference, expected)):
        op(tensors, torch.tensor([3, -1, 1]), torch.tensor([5, 5, 2]))
    agree(states, expected, atol=0)


@pytest.mark.parametrize(
    ("dtype", "dim", "prefix"),
    [(torch.float32, 40, 66), (torch.bfloat16, 64, 130), (torch.float16, 72, 5), (torch.bfloat16, 136, 20)],
)
def test_branch_attention(dtype, dim, prefix):
    """Several parts with two tiles of queries, a width cut short, values that are not loaded ahead; no prefix in one row."""
    emulated.order(6)
    k = 9 if prefix > 20 else 2
    query = normal(2, 2, k, dim, dtype=dtype)
    key, value = (normal(2, 1, prefix + k, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    args = query, key, value, torch.tensor([prefix, 0])
    agree(
        [emulated.branch_attention(*args)], [ops.branch_attention_reference(*args)], 1e-5 if dtype == torch.float32 else 0.04
    )
