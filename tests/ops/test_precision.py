"""The ops against float64 on every path that this CPU has, for numbers that are large, equal, tiny, masked or not finite."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from conftest import CAPABILITIES, take_capability
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyargs.ops import score_select, tokenwise_select, topk_logprobs, user_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*CAPABILITIES, pytest.param("emulated", marks=emulated.needed)])
def op_of(request):
    """The ops on one path: a CPU capability, or the CUDA kernels on the host."""
    if request.param == "emulated":
        return lambda op: getattr(emulated, op.__name__)
    take_capability(request, request.param)
    return lambda op: op


def logits(kind: str, rows: int, vocab: int, offset: float, spread: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Logits of one kind around an offset, as the dtype holds them: no two of the kernels' inputs differ by rounding."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    if kind == "equal":
        x[:] = 0
    x = x * 1e-41 if kind == "tiny" else x + offset
    if kind == "one certain":
        x[:, vocab // 2] += 200
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    if kind == "masked":
        x[:, torch.arange(vocab) % 3 > 0] = -math.inf
    elif kind == "masked by the smallest number":
        x[:, torch.arange(vocab) % 3 > 0] = torch.finfo(dtype).min
    return x.to(dtype)


def drawn_logits(data, name: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    kinds = ["plain", "equal", "masked", "masked by the smallest number", "one certain", "tiny"]
    return logits(
        data.draw(st.sampled_from(kinds), f"kind of {name}"),
        rows,
        vocab,
        data.draw(st.sampled_from([0.0, 1e4, -1e4, 1e8, -1e8, 3e38, -3e38]), f"offset of {name}"),
        data.draw(st.sampled_from([0.1, 5.0, 300.0]), f"spread of {name}"),
        dtype,
        data.draw(st.integers(0, 99), f"seed of {name}"),
    )


def logprobs_hold(x: Tensor, k: int, op) -> None:
    logprobs, ids, logsumexp = op(x, k)
    exact = x.double().log_softmax(-1)
    assert torch.equal(ids, torch.sort(x.float(), dim=-1, descending=True, stable=True).indices[:, :k])
    expected = exact.gather(-1, ids)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(logprobs, expected.float(), atol=2e-6, rtol=2e-7)
    torch.testing.assert_close(logsumexp, x.double().logsumexp(-1).float(), atol=2e-6, rtol=2e-7)
    assert (logprobs.double().exp().sum(-1) <= 1 + 2e-6).all()


def test_logprobs_of_logits_of_any_size(op_of):
    """Log-probs are exact to their own size, and none is above 0, however far from 0 the logits lie."""

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def check(data):
        vocab = data.draw(st.sampled_from([1, 2, 17, 64, 511, 513, 3000]), "vocab")
        x = drawn_logits(data, "logits", 2, vocab, data.draw(st.sampled_from(DTYPES), "dtype"))
        k = data.draw(st.sampled_from([1, min(10, vocab), min(64, vocab)]), "k")
        logprobs_hold(x, k, op_of(topk_logprobs))

    check()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e8])
def test_logprobs_over_several_chunks(op_of, offset):
    logprobs_hold(logits("plain", 2, 20000, offset, 5.0, torch.float32, 0), 10, op_of(topk_logprobs))


def test_rows_without_a_distribution(op_of):
    """All -inf, or +inf or NaN somewhere: what log_softmax and logsumexp say, in every chunk of a row."""
    for vocab in (5, 700, 17000):
        for place in {0, vocab // 2, vocab - 1}:
            x = torch.zeros(4, vocab)
            x[0], x[1, place], x[2, place], x[3, place] = -math.inf, math.inf, math.nan, -math.inf
            logprobs, ids, logsumexp = op_of(topk_logprobs)(x, 2)
            assert logprobs[:3].isnan().all() and (ids[1:3, 0] == place).all()
            assert logsumexp[0] == -math.inf and logsumexp[1] == math.inf and logsumexp[2].isnan()
            assert math.isclose(logsumexp[3], math.log(vocab - 1), rel_tol=1e-6)


def test_rewards_of_tokens(op_of):
    """The rewards of `tokenwise_select` are log-probs too."""

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def check(data):
        vocab = data.draw(st.sampled_from([2, 17, 513, 3000]), "vocab")
        x, y = (drawn_logits(data, name, 2, vocab, data.draw(st.sampled_from(DTYPES), name)) for name in ("policy", "reward"))
        k = min(10, vocab)
        finished = torch.zeros(2, dtype=torch.bool)
        reward = op_of(tokenwise_select)(x, y, torch.zeros(2), finished, k)[2]
        ids = torch.sort(x.float(), dim=-1, descending=True, stable=True).indices[:, :k]
        assert (reward <= 0).all()
        torch.testing.assert_close(reward, y.double().log_softmax(-1).gather(-1, ids).float(), atol=2e-6, rtol=2e-7)

    check()


def test_rewards_of_heads(op_of):
    """An MLP of each user's own: within the rounding of a float32 sum, which is in proportion to the terms' sizes."""

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def check(data):
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
        size = data.draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), "size")
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        depth, units, k = data.draw(st.sampled_from([1, 7, 64, 577]), "D"), data.draw(st.sampled_from([1, 5, 33]), "H"), 5
        activation = data.draw(st.sampled_from(["identity", "relu", "gelu", "leaky_relu"]), "activation")
        hidden = (torch.randn(2, k, depth, generator=g) * min(size, 100)).to(dtype)
        bank = torch.randn(3, units, depth, generator=g).to(dtype)
        user = torch.tensor([2, 0])
        features = op_of(user_mlp)(hidden, bank, user)
        terms = hidden.double().unsqueeze(2) * bank.double()[user].unsqueeze(1)
        assert ((features - terms.sum(-1)).abs() <= 1e-6 * terms.abs().sum(-1) + 1e-37).all()
        weight, bias = torch.randn(3, units, generator=g), torch.randn(3, units, generator=g) * size
        reward = op_of(score_select)(
            features,
            weight,
            user,
            torch.zeros(2),
            torch.zeros(2, k),
            torch.zeros(2, k, dtype=torch.int64),
            torch.zeros(2, dtype=torch.bool),
            bias=bias,
            activation=activation,
        )[2]
        x = features.double() + bias.double()[user].unsqueeze(1)
        act = {
            "identity": lambda x: x,
            "relu": torch.relu,
            "gelu": torch.nn.functional.gelu,
            "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.2),
        }[activation]
        parts = act(x) * weight.double()[user].unsqueeze(1)
        room = (x.abs() * weight.double()[user].unsqueeze(1).abs()).sum(-1)
        assert ((reward - parts.sum(-1)).abs() <= 1e-6 * room + 1e-37).all()

    check()
