from __future__ import annotations

import math
import os
import subprocess
import sys

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs import ops
from pyargs.ops import topk_logprobs, topk_logprobs_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def agree(logits: torch.Tensor, k: int, atol: float = 2e-5, op=topk_logprobs) -> None:
    got, expected = op(logits, k), topk_logprobs_reference(logits, k)
    assert [t.dtype for t in got] == [torch.float32, torch.int64, torch.float32]
    assert torch.equal(got[1], expected[1])
    # torch's own sum in float32 can be off by more than 2e-5.
    logprobs = torch.log_softmax(logits.double(), -1).gather(-1, expected[1]).float()
    torch.testing.assert_close(got[0], logprobs, atol=atol, rtol=0, equal_nan=True)
    torch.testing.assert_close(got[2], expected[2], atol=atol, rtol=0, equal_nan=True)


def random_logits(batch: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 5.0) -> torch.Tensor:
    return (torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, topk_logprobs)


@emulated.needed
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.topk_logprobs)


def drawn(data, op) -> None:
    """Any shape, dtype, place in memory, and kind of row."""
    vocab = data.draw(st.one_of(st.integers(1, 1100), st.sampled_from([8191, 8192, 8193, 16897, 50257])), "vocab")
    batch = data.draw(st.integers(0, 5), "batch")
    k = data.draw(st.integers(1, min(64, vocab)), "k")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    kind = data.draw(st.sampled_from(["random", "ties", "sorted", "reversed", "constant", "masked"]), "kind")
    padding = data.draw(st.integers(0, 9), "columns beside the rows")
    offset = data.draw(st.integers(0, padding), "start of the rows")
    x = random_logits(batch, vocab, torch.float32, seed=data.draw(st.integers(0, 99), "seed"))
    if kind == "ties":
        x = x.round()
    elif kind in ("sorted", "reversed"):
        x = x.sort(-1, descending=kind == "reversed").values
    elif kind == "constant":
        x = torch.full_like(x, -3.0)
    elif kind == "masked":
        x = x.masked_fill(x < 0, -INF)
    wide = torch.full((batch, vocab + padding), 1e4, dtype=dtype)
    wide[:, offset : offset + vocab] = x.to(dtype)
    agree(wide[:, offset : offset + vocab], k, op=op)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 33, 511, 513, 8192, 49152])
def test_every_capability(capability, dtype, vocab):
    for k in {1, min(10, vocab), min(64, vocab)}:
        agree(random_logits(3, vocab, dtype), k)


def test_all_float16_values(capability):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()].flip(0)[None]
    agree(finite, 64, atol=8e-3)  # of 65504: one unit in the last place of the sums, in the reference too
    agree(finite.abs().clamp(max=6e-5), 64)  # subnormals


@pytest.mark.parametrize("size", [1.0, 30.0, 100.0])
def test_precision(size):
    logits = (torch.rand(8, 151936, generator=torch.Generator().manual_seed(1)) * 2 - 1) * size
    logprobs, ids, logsumexp = topk_logprobs(logits, 20)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids)
    assert (logprobs - exact).abs().max() < 2e-5
    assert (logsumexp - torch.logsumexp(logits.double(), -1)).abs().max() < 2e-5


SPECIAL = [
    [1.0, NAN, 2.0, NAN],
    [NAN] * 4,
    [INF, 1.0, INF, 0.0],
    [INF, NAN, 1.0, INF],
    [-INF] * 4,
    [-INF, 0.0, -INF, -INF],
    [-NAN, -INF, INF, 3.0],
    [0.0, -0.0, 0.0, -0.0],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", SPECIAL)
@pytest.mark.parametrize("at", [600, 8189])
def test_special_values(capability, dtype, row, at):
    special(topk_logprobs, dtype, row, at)


@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", SPECIAL)
def test_special_values_emulated(dtype, row):
    emulated.order(1)
    special(emulated.topk_logprobs, dtype, row, 8189)


def special(op, dtype, row, at) -> None:
    alone = torch.tensor([row], dtype=dtype)
    agree(alone, 4, op=op)
    agree(alone, 2, op=op)
    logits = random_logits(2, 20004, dtype)
    logits[1, at : at + 4] = alone
    agree(logits, 10, op=op)
    agree(logits.masked_fill(logits.isfinite(), -INF), 10, op=op)


@emulated.needed
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    vocab=st.sampled_from([50, 8192, 9001]),
    value=st.sampled_from([NAN, -NAN, INF, 0.0, -0.0, 7.0]),
    places=st.lists(st.integers(0, 9000), min_size=1, max_size=80),
    others=st.sampled_from([-INF, -1.0, -0.0, 0.0]),
    offset=st.integers(0, 1),
)
def test_one_value_anywhere_emulated(dtype, vocab, value, places, others, offset):
    """In either half of a register, or in both; aligned or not; alone, or as often as makes ties."""
    wide = torch.full((1, vocab + 1), others, dtype=dtype)
    wide[0, [place % vocab + offset for place in places]] = value
    emulated.order(1)
    agree(wide[:, offset : offset + vocab], 40, op=emulated.topk_logprobs)


@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 10, 64])
@pytest.mark.parametrize("values", [1, 3, 40, 3000])
def test_ties_across_chunks_emulated(dtype, k, values):
    """Of so many values, which are far more often there than a block keeps."""
    logits = torch.randint(values, (2, 3 * 8192 + 77), generator=torch.Generator().manual_seed(values)).to(dtype)
    agree(logits / 16, k, op=emulated.topk_logprobs, atol=2e-5 if values < 3000 else 2e-4)


@emulated.needed
def test_more_chunks_than_a_block_holds_the_survivors_of_emulated():
    logits = random_logits(1, 22 * 8192 + 5, torch.bfloat16)
    for k in (10, 64):
        agree(logits, k, op=emulated.topk_logprobs)
    agree(logits.round(), 64, op=emulated.topk_logprobs)
    agree(logits.sort(-1).values, 64, op=emulated.topk_logprobs)


@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_values_of_16_bits_emulated(dtype):
    """Each is at some time the bound that others are compared with."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    every = every[every.isfinite() & (every.abs() < 3e4)].sort(descending=True).values
    for start in range(0, len(every) - 300, 977):
        agree(every[None, start : start + 300], 7, op=emulated.topk_logprobs)


LARGE = [-3.4e38, -1e30, -1e10, -9.1e9, -8.7e9, -6.5e9, -1e9, -1e4, 1e9, 1e10, 1e30, 3.4e38]


@pytest.mark.parametrize("value", LARGE)
def test_values_near_the_limit_of_float32(capability, value):
    near_the_limit(topk_logprobs, value)


@emulated.needed
@pytest.mark.parametrize("value", LARGE)
def test_values_near_the_limit_of_float32_emulated(value):
    near_the_limit(emulated.topk_logprobs, value)


def near_the_limit(op, value) -> None:
    """Masks are often large numbers instead of -inf, and may fill a chunk, or all of a row."""
    logits = random_logits(4, 20000, torch.float32)
    logits[0, 8192:] = value
    logits[1, :16384] = value
    logits[2] = value
    logits[3, :1000] = value
    agree(logits, 10, op=op)
    agree(torch.tensor([[value, 0.0, value, -value, -INF]]), 5, op=op)


def test_nan_with_payload(capability):
    bits = torch.full((1, 600), 0x3F800000, dtype=torch.int32)
    bits[0, 3], bits[0, 500] = 0x7F800001, -4194303 + 0x1FF  # signalling, and negative with a payload
    agree(bits.view(torch.float32), 5)


def test_bitwise_the_same_in_any_batch_and_with_any_threads(capability, with_threads):
    logits = random_logits(7, 50257, torch.float32)  # odd: every row starts at another place in a cache line
    first = with_threads(1, lambda: topk_logprobs(logits, 40))
    for threads in (1, 2, 3):
        for got, expected in zip(with_threads(threads, lambda: topk_logprobs(logits, 40)), first, strict=True):
            assert torch.equal(got, expected)
    for row in range(7):
        alone = with_threads(2, lambda: topk_logprobs(logits[row : row + 1].clone(), 40))  # noqa: B023
        for got, expected in zip(alone, first, strict=True):
            assert torch.equal(got[0], expected[row])


@emulated.needed
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_in_any_order_of_threads_and_batch(dtype):
    logits = random_logits(3, 20011, dtype)
    emulated.order(0)
    first = emulated.topk_logprobs(logits, 40)
    for seed in (1, 2, 3):
        emulated.order(seed)
        for got, expected in zip(emulated.topk_logprobs(logits, 40), first, strict=True):
            assert torch.equal(got, expected)
        for row in range(3):
            for got, expected in zip(emulated.topk_logprobs(logits[row : row + 1].clone(), 40), first, strict=True):
                assert torch.equal(got[0], expected[row])


def test_strides():
    logits = random_logits(6, 1000, torch.float32)
    agree(logits.T.contiguous().T, 5)  # columns side by side
    agree(logits[:, ::3], 5)
    agree(logits[::2], 5)
    agree(logits[:1].expand(4, -1), 5)
    agree(torch.randn(2, 3, 50)[:, -1], 5)


def test_empty_batch():
    logprobs, ids, logsumexp = topk_logprobs(torch.empty(0, 10), 3)
    assert logprobs.shape == ids.shape == (0, 3) and logsumexp.shape == (0,)


@pytest.mark.parametrize("function", [topk_logprobs, topk_logprobs_reference])
@pytest.mark.parametrize(
    ("logits", "k", "error", "says"),
    [
        (torch.zeros(2, 5), 6, ValueError, "lower k"),
        (torch.zeros(2, 5), 0, ValueError, "1 to 64"),
        (torch.zeros(2, 500), 65, ValueError, "1 to 64"),
        (torch.zeros(5), 1, ValueError, r"\[B, V\]"),
        (torch.zeros(2, 3, 5), 1, ValueError, r"\[:, -1\]"),
        (torch.zeros(2, 5, dtype=torch.float64), 1, TypeError, "float32"),
        (torch.zeros(2, 5, dtype=torch.int64), 1, TypeError, "float32"),
        (torch.zeros(2, 5), 1.0, TypeError, "int"),
        ([[1.0, 2.0]], 1, TypeError, "torch.Tensor"),
        (torch.zeros(2, 5, device="meta"), 6, ValueError, "lower k"),
    ],
)
def test_errors_name_the_fix(function, logits, k, error, says):
    with pytest.raises(error, match=says):
        function(logits, k)


def test_direct_call_is_checked():
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.pyargs.topk_logprobs(torch.zeros(2, 5), 6)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyargs.topk_logprobs.default, (torch.randn(3, 50), 4))
    torch.library.opcheck(torch.ops.pyargs.topk_logprobs.default, (torch.randn(3, 50, dtype=torch.bfloat16), 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(
        lambda x: [t + 1 for t in topk_logprobs(x * 2, 4)], fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for batch in (2, 3):
        x = torch.randn(batch, 50)
        for got, expected in zip(compiled(x), topk_logprobs(x * 2, 4), strict=True):
            assert torch.equal(got, expected + 1)


def test_schema_is_that_of_the_reference():
    inferred = torch.library.infer_schema(topk_logprobs_reference, mutates_args=())
    assert str(torch.ops.pyargs.topk_logprobs.default._schema) == f"pyargs::topk_logprobs{inferred}"


def test_without_the_extension():
    """The references serve, one warning says so, and compile still works."""
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pyargs import ops
    ops.topk_logprobs(torch.randn(2, 9), 3)
    x = torch.randn(2, 9)
    got = ops.topk_logprobs(x, 3)
said = [str(w.message) for w in caught if w.category is RuntimeWarning]
assert len(said) == 1 and "slow reference ops" in said[0], said
assert ops.native == set()
for a, b in zip(got, ops.topk_logprobs_reference(x, 3)): assert torch.equal(a, b)
torch.library.opcheck(torch.ops.pyargs.topk_logprobs.default, (x, 3))
n = torch.compile(lambda x: ops.topk_logprobs(x, 3)[1], fullgraph=True, backend="aot_eager")(x)
assert torch.equal(n, got[1])
z = torch.zeros
r = ops.score_select(z(2, 3, 4), z(1, 4), z(2).long(), z(2), z(2, 3), z(2, 3).long(), z(2).bool(), activation="gelu")
assert r[0].tolist() == [0, 0]
assert ops.tokenwise_select(x, x, z(2), z(2).bool(), 3)[0].tolist() == x.argmax(1).tolist()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYARGS_NO_EXT": "1"})


def test_native_here():
    pytest.importorskip("pyargs._C")
    assert "topk_logprobs" in ops.native
