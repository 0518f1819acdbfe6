"""The ops' own drawn tests with their arguments on a GPU, where there is one; and that a result depends on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import (
    test_branch_attention,
    test_commit,
    test_score_select,
    test_score_step,
    test_tokenwise_select,
    test_tokenwise_step,
    test_topk_logprobs,
    test_user_mlp,
)
from torch import Tensor

from pyargs.ops import (
    RowState,
    branch_attention,
    commit,
    score_select,
    score_step,
    tokenwise_select,
    tokenwise_step,
    topk_logprobs,
    user_mlp,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
OPS = {
    topk_logprobs: test_topk_logprobs.drawn,
    score_select: test_score_select.drawn,
    score_step: test_score_step.drawn,
    tokenwise_select: test_tokenwise_select.drawn,
    tokenwise_step: test_tokenwise_step.drawn,
    user_mlp: test_user_mlp.drawn,
    commit: test_commit.drawn,
    branch_attention: test_branch_attention.drawn,
}


def there(value):
    """A tensor, a list of them, or a state, on the GPU: the same strides and the same place within the same memory."""
    if isinstance(value, list):
        return [there(one) for one in value]
    if isinstance(value, RowState):
        return RowState(*map(there, value))
    if not isinstance(value, Tensor):
        return value
    empty = torch.empty(0, dtype=value.dtype, device="cuda")
    return empty.set_(value.untyped_storage().cuda(), value.storage_offset(), value.shape, value.stride())


def moved(op):
    """The op on the GPU, for tests that know only the CPU: arguments go there, results and changed arguments come back."""

    def call(*args, **kwargs):
        args, moved_args = list(args), [there(value) for value in args]
        named = {name: there(value) for name, value in kwargs.items()}
        result = op(*moved_args, **named)
        for one, other in zip(kwargs.get("state", ()), named.get("state", ()), strict=True):
            if one is not None:
                one.copy_(other)
        for value, other in zip(args, moved_args, strict=True):
            if isinstance(value, list):
                for one, two in zip(value, other, strict=True):
                    one.copy_(two)
        if result is None:
            return None
        return result.cpu() if isinstance(result, Tensor) else tuple(part.cpu() for part in result)

    return call


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_like_the_reference(op, data):
    OPS[op](data, moved(op))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [8192, 50257, 151936])
def test_top_k_is_repeatable_and_the_same_in_any_batch(vocab, dtype):
    logits = (torch.randn(33, vocab, device="cuda") * 5).to(dtype)
    first = topk_logprobs(logits, 64)
    for _ in range(20):
        assert all(torch.equal(one, two) for one, two in zip(topk_logprobs(logits, 64), first, strict=True))
    for row in (0, 17, 32):
        alone = topk_logprobs(logits[row : row + 1], 64)
        assert all(torch.equal(one[0], two[row]) for one, two in zip(alone, first, strict=True))


def test_a_graph_replays_the_ops():
    logits = torch.randn(4, 50257, device="cuda")
    topk_logprobs(logits, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = topk_logprobs(logits, 10)
    for _ in range(3):
        logits.normal_()
        graph.replay()
        assert all(torch.equal(one, two) for one, two in zip(got, topk_logprobs(logits, 10), strict=True))
