from __future__ import annotations

import math

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pyargs.ops import branch_attention, branch_attention_reference
from pyargs.ops.branch_attention import _default

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Of values around 1: a bfloat16 rounds the weights and the result to eight bits."""
NAN = math.nan


def problem(batch=2, heads=4, kept=2, k=3, dim=8, lengths=(5, 0), room=2, dtype=torch.float32, seed=0) -> tuple[Tensor, ...]:
    """What no query may look at is NaN."""
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths[:batch], dtype=torch.int64)
    places = max(lengths[:batch], default=0) + k + room
    query = torch.randn(batch, k, heads, dim, generator=g).to(dtype).transpose(1, 2)  # as models have it
    cache = [torch.randn(batch, kept, places + 3, dim, generator=g).to(dtype) for _ in range(2)]
    for states in cache:
        for row, own in enumerate(length.tolist()):
            states[row, :, own + k :] = NAN
    return query, *(states[:, :, :places] for states in cache), length


def one_by_one(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float | None = None) -> Tensor:
    """Each query over a copy of its own keys, in float64."""
    found = torch.zeros(len(query), query.shape[2], query.shape[1], query.shape[3], dtype=torch.float64)
    for row, prefix in enumerate(length.tolist()):
        for j in range(query.shape[2]):
            seen = [*range(prefix), prefix + j]
            q, k, v = (x[row : row + 1].double() for x in (query[:, :, j : j + 1], key[:, :, seen], value[:, :, seen]))
            found[row, j] = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0, :, 0]
    return found


def agree(args: tuple[Tensor, ...], op=branch_attention, scale: float | None = None) -> Tensor:
    got = op(*args, scale)
    query = args[0]
    assert got.dtype == query.dtype and got.is_contiguous() and got.shape == query.transpose(1, 2).shape
    torch.testing.assert_close(got.double(), one_by_one(*args, scale), atol=CLOSE[query.dtype], rtol=CLOSE[query.dtype] / 4)
    return got


def drawn(data, op, small: bool = False) -> None:
    draw = lambda strategy, label: data.draw(strategy, label)  # noqa: E731
    batch, kept, groups = (
        draw(st.integers(0, 3), "batch"),
        draw(st.integers(1, 2), "kept heads"),
        draw(st.integers(1, 3 if small else 7), "groups"),
    )
    length = st.one_of(
        st.integers(0, 20), st.sampled_from([0, 15, 16, 17, 63, 64, 65, 128, 129]), st.integers(0, 140 if small else 300)
    )
    dim = st.sampled_from([8, 16, 56, 64, 80, 96, 128, 136, 256])
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    args = problem(
        batch=batch,
        heads=kept * groups,
        kept=kept,
        k=draw(st.integers(1, 6 if small else 12), "k"),
        dim=draw(dim.filter(lambda size: dtype == torch.bfloat16 or size <= 128), "elements of a head"),
        lengths=tuple(draw(st.lists(length, min_size=batch, max_size=batch), "lengths")),
        room=draw(st.integers(0, 70), "room"),
        dtype=dtype,
        seed=draw(st.integers(0, 99), "seed"),
    )
    agree(args, op, draw(st.sampled_from([None, 0.05, 0.3]), "scale"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_like_each_query_over_its_own_keys(data):
    drawn(data, branch_attention)


@emulated.needed
@settings(max_examples=12, deadline=None)  # a second each
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.branch_attention, small=True)


def test_float64():
    agree(problem(dtype=torch.float64))


@emulated.needed
def test_more_tiles_than_parts_emulated():
    """Beyond 1,024 keys a part has several tiles; the last one may be short."""
    for prefix in (1024, 1090):
        agree(problem(batch=1, heads=1, kept=1, k=2, lengths=(prefix,), dtype=torch.bfloat16), emulated.branch_attention)


@pytest.mark.parametrize("op", ["cpu", pytest.param("emulated", marks=emulated.needed)])
def test_a_row_depends_on_nothing_but_the_row(op):
    """Bit for bit: not on its company, the places behind it, the other branches, or the order in which threads run."""
    op = branch_attention if op == "cpu" else emulated.branch_attention
    exact = op is not branch_attention  # a matrix product on a CPU rounds as its shape wants
    same = lambda one, two: torch.testing.assert_close(one, two, atol=0 if exact else 1e-6, rtol=0)  # noqa: E731
    query, key, value, length = problem(batch=3, heads=6, kept=2, k=5, lengths=(130, 64, 0), room=70)
    emulated.order(0)
    together = op(query, key, value, length)
    for row in range(3):
        emulated.order(row + 1)
        places = int(length[row]) + 5
        one = slice(row, row + 1)
        same(op(query[one], key[one, :, :places], value[one, :, :places], length[one])[0], together[row])
        same(op(query[one, :, :2], key[one], value[one], length[one])[0], together[row, :2])


@pytest.mark.parametrize("op", ["reference", pytest.param("emulated", marks=emulated.needed)])
def test_what_is_no_number_stays_where_it_belongs(op):
    """A branch whose own key or value is none spoils no other; one in the prefix spoils the row."""
    op = branch_attention_reference if op == "reference" else emulated.branch_attention
    query, key, value, length = problem(batch=4, k=3, lengths=(70, 70, 70, 70))
    key[0, :, 71], value[1, :, 72], key[2, :, 69], value[3, :, 0] = NAN, NAN, NAN, math.inf
    lost = ~op(query, key, value, length).isfinite().all(-1).all(-1)
    assert lost.tolist() == [[False, True, False], [False, False, True], [True] * 3, [True] * 3]


@pytest.mark.parametrize("op", ["cpu", pytest.param("emulated", marks=emulated.needed)])
def test_lengths_out_of_range(op):
    op = branch_attention if op == "cpu" else emulated.branch_attention
    query, key, value, _ = problem(batch=4, k=3, lengths=(7, 7, 7, 7), room=0)
    got = op(query, key, value, torch.tensor([-1, 8, 2**40, 7]))
    assert got[:3].isnan().all() and got[3].isfinite().all()


@emulated.needed
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_float32_is_as_exact_as_a_float32_emulated(size):
    """Scores of any size: what three terms of 8 bits leave out, no float32 holds."""
    query, key, value, length = problem(batch=1, k=2, dim=64, lengths=(40,))
    args = query * size, key, value, length
    exact, largest = one_by_one(*args), value[value.isfinite()].abs().max()
    scores = (query * size).abs().amax() * key[key.isfinite()].abs().amax() * 64**0.5
    assert (emulated.branch_attention(*args) - exact).abs().max() <= 1e-6 * largest * (1 + scores)


@emulated.needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_does_emulated(dtype):
    """A single branch without a prefix gives its own value. Every number of the dtype, and a mean that lies between two."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    finite = finite[: len(finite) // 128 * 128].view(-1, 1, 1, 128)
    one = torch.zeros_like(finite), torch.zeros_like(finite), finite, torch.zeros(len(finite), dtype=torch.int64)
    few = tuple(part[::16] for part in one)
    got = emulated.branch_attention(*few)
    assert torch.equal(got.flatten().double(), few[2].flatten().double())
    value = torch.stack([finite[::16, 0, 0], finite[::16, 0, 0].roll(1, -1)], 1).unsqueeze(1)
    zeros = torch.zeros_like(value)
    mean = emulated.branch_attention(zeros[:, :, :1], zeros, value, torch.ones(len(value), dtype=torch.int64))
    exact = value[:, 0].float().mean(1)
    assert torch.equal(mean[:, 0, 0].double(), exact.to(dtype).double())


@emulated.needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_beyond_the_registers_are_refused_emulated(dtype):
    with pytest.raises(RuntimeError, match="at most 128"):
        emulated.branch_attention(*problem(dim=136, dtype=dtype))


@pytest.mark.parametrize("function", [branch_attention, branch_attention_reference])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"query": torch.zeros(2, 4, 3, 8).int()}, TypeError, "query must be float32"),
        ({"key": torch.zeros(2, 2, 10, 8).bfloat16()}, TypeError, "key is torch.bfloat16"),
        ({"value": torch.zeros(2, 2, 10, 8).double()}, TypeError, "value is torch.float64"),
        ({"length": torch.zeros(2)}, TypeError, "int64"),
        ({"length": 3}, TypeError, "torch.Tensor"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, r"\[B, heads, k, D\]"),
        ({"query": torch.zeros(2, 3, 3, 8)}, ValueError, "a divisor of 3"),
        ({"query": torch.zeros(2, 4, 3, 12)}, ValueError, "multiple of 8"),
        ({"query": torch.zeros(2, 4, 3, 264)}, ValueError, "at most 256"),
        ({"key": torch.zeros(1, 2, 10, 8)}, ValueError, "key must be"),
        ({"query": torch.zeros(2, 4, 11, 8)}, ValueError, "10 places, but there are 11"),
        ({"value": torch.zeros(2, 2, 9, 8)}, ValueError, "value must have the shape of key"),
        ({"length": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \[2\]"),
    ],
)
def test_errors_name_the_fix(function, change, error, says):
    given = dict(zip(("query", "key", "value", "length"), problem(), strict=True)) | change
    with pytest.raises(error, match=says):
        function(**given)


def test_opcheck_and_schema():
    torch.library.opcheck(torch.ops.pyargs.branch_attention.default, (*problem(lengths=(5, 5), room=0), 0.5))
    inferred = torch.library.infer_schema(_default, mutates_args=())
    assert str(torch.ops.pyargs.branch_attention.default._schema) == f"pyargs::branch_attention{inferred}"


def test_compile():
    args = problem(lengths=(5, 5), room=0)
    compiled = torch.compile(lambda *args: branch_attention(*args) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), branch_attention(*args) + 1)
