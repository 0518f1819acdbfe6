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
from pyargs.ops import score_select, user_mlp, user_mlp_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


def grid(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small multiples of 1/4: their products and sums are exact in float32, so that any order of summation agrees."""
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(dtype)


def problem(batch=3, k=4, dim=8, units=6, users=5, seed=0, dtype=torch.float32, bank_dtype=None) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": grid((batch, k, dim), g, dtype),
        "bank": grid((users, units, dim), g, bank_dtype or dtype),
        "user": torch.randint(0, users, (batch,), generator=g),
    }


def agree(args: dict, op=user_mlp) -> torch.Tensor:
    """Bitwise: only for values of the grid, inf and NaN."""
    got, expected = op(**args), user_mlp_reference(**args)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)
    return got


def layout(data, x: torch.Tensor, name: str) -> torch.Tensor:
    """The same values, lying otherwise in memory."""
    kind = data.draw(st.sampled_from(["dense", "shifted", "wide", "turned", "strided", "with gaps"]), f"layout of {name}")
    a, b, c = x.shape
    if kind == "shifted":  # rows start at any address
        start = data.draw(st.integers(1, 17), f"shift of {name}")
        flat = torch.full((start + x.numel(),), NAN, dtype=x.dtype)
        return flat[start:].view(x.shape).copy_(x)
    if kind == "wide":  # what lies around a row is not read
        wide = torch.full((a + 1, b + 3, c + 5), NAN, dtype=x.dtype)
        return wide[1:, 2 : 2 + b, 3 : 3 + c].copy_(x)
    if kind == "turned":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "strided":  # the last dimension is not dense
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "with gaps":
        return torch.stack([x, torch.full_like(x, NAN)], dim=2)[:, :, 0]
    return x


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, user_mlp)


@emulated.needed
@settings(max_examples=20, deadline=None)  # half a second each
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.user_mlp)


@emulated.needed
@pytest.mark.parametrize(
    ("dtype", "some"), [(torch.float32, slice(7, 9)), (torch.bfloat16, slice(5, 20)), (torch.float16, slice(12, 26))]
)
def test_bitwise_the_same_in_any_order_of_threads_and_batch(dtype, some):
    """And with any other candidates beside; of 16 bits, as long as they are more than 12."""
    generator = torch.Generator().manual_seed(0)
    hidden, bank = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 26, 577), (4, 37, 577)))
    user = torch.tensor([3, 0, 3])
    emulated.order(0)
    first = emulated.user_mlp(hidden, bank, user)
    torch.testing.assert_close(first, user_mlp_reference(hidden, bank, user), atol=2e-4, rtol=2e-5)
    for seed in (1, 2):
        emulated.order(seed)
        assert torch.equal(emulated.user_mlp(hidden, bank, user), first)
        for row in range(3):
            alone = emulated.user_mlp(hidden[row : row + 1].clone(), bank, user[row : row + 1])
            assert torch.equal(alone[0], first[row])
            few = emulated.user_mlp(hidden[row : row + 1, some], bank[:, 5:9], user[row : row + 1])
            assert torch.equal(few[0], first[row, some, 5:9])


def drawn(data, op) -> None:
    draw = lambda strategy, label: data.draw(strategy, label)  # noqa: E731
    args = problem(
        batch=draw(st.integers(0, 5), "batch"),
        k=draw(st.one_of(st.integers(1, 13), st.sampled_from([24, 25, 40, 64])), "k"),
        dim=draw(st.one_of(st.integers(1, 70), st.sampled_from([576, 1023, 1024, 1025, 2100])), "dim"),
        units=draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 70])), "units"),
        users=draw(st.integers(1, 6), "users"),
        seed=draw(st.integers(0, 99), "seed"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        bank_dtype=draw(st.sampled_from(DTYPES), "dtype of the bank"),
    )
    args["hidden"] = layout(data, args["hidden"], "hidden")
    args["bank"] = layout(data, args["bank"], "bank")
    if len(args["user"]) and draw(st.booleans(), "bad user"):
        args["user"][0] = draw(st.sampled_from([-1, 6, 2**40]), "which")
    agree(args, op=op)


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 15, 16, 33, 577, 1024, 1040, 2100])
def test_every_capability(capability, dtype, bank_dtype, dim):
    for k in range(1, 14):
        agree(problem(batch=3, k=k, dim=dim, units=1 + k % 9, dtype=dtype, bank_dtype=bank_dtype, seed=k))
    agree(problem(batch=1, k=53, dim=dim, units=64, dtype=dtype, bank_dtype=bank_dtype))


def test_accuracy(capability):
    g = torch.Generator().manual_seed(0)
    for dim in (576, 896, 4096):
        hidden, bank = torch.randn(4, 10, dim, generator=g), torch.randn(5, 64, dim, generator=g) / math.sqrt(dim)
        user = torch.tensor([4, 0, 0, 2])
        exact = torch.einsum("bkd,bhd->bkh", hidden.double(), bank[user].double())
        assert (user_mlp(hidden, bank, user) - exact).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half(capability, dtype):
    """All 65,536 numbers are converted as PyTorch does, subnormals too."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one = torch.ones(1, 1, 1)
    torch.testing.assert_close(
        user_mlp(one, every.view(1, -1, 1), torch.tensor([0]))[0, 0], every.float(), atol=0, rtol=0, equal_nan=True
    )
    torch.testing.assert_close(
        user_mlp(every.view(1, -1, 1), one, torch.tensor([0]))[0, :, 0], every.float(), atol=0, rtol=0, equal_nan=True
    )
    finite = every[every.isfinite()]  # whole vectors, not only the end of a row
    rows = torch.zeros(len(finite), 16, dtype=dtype)
    rows[:, 7] = finite
    got = user_mlp(torch.ones(1, 1, 16), rows[None], torch.tensor([0]))
    torch.testing.assert_close(got[0, 0], finite.float(), atol=0, rtol=0)


@pytest.mark.parametrize("dim", [5, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_where_they_belong(capability, dtype, dim):
    args = problem(batch=2, k=7, dim=dim, units=6, dtype=dtype)
    args["user"] = torch.tensor([1, 3])
    args["hidden"][0, 6, dim - 1] = NAN
    args["bank"][3, 5, 0] = INF
    args["hidden"][1, :, 0] = 1
    args["bank"][2] = NAN  # nobody's
    got = agree(args)
    assert got[0, 6].isnan().all() and got[0, :6].isfinite().all()
    assert (got[1, :, 5] == INF).all() and got[1, :, :5].isfinite().all()


def test_bad_user_rows(capability):
    args = problem(batch=4, users=5) | {"user": torch.tensor([-1, 5, 4, 2**62])}
    got = agree(args)
    assert got[[0, 1, 3]].isnan().all() and got[2].isfinite().all()
    k, units = got.shape[1:]
    slot, reward = score_select(
        got,
        torch.ones(5, units),
        args["user"].clamp(0, 4),
        torch.ones(4),
        torch.zeros(4, k),
        torch.zeros(4, k).long(),
        torch.zeros(4).bool(),
        bias=torch.zeros(5, units),
        activation="relu",
    )[1:3]
    assert slot.tolist()[:2] == [-1, -1] and slot[2] >= 0 and slot[3] == -1 and reward[0].isnan().all()


def test_one_matrix_for_all(capability):
    args = problem(batch=2, users=1)
    assert torch.equal(agree(args | {"user": torch.tensor([-7, 99])}), agree(args))  # the row is not read


def test_bitwise_the_same_in_any_batch_and_with_any_threads(capability, with_threads):
    g = torch.Generator().manual_seed(0)
    hidden, bank = torch.randn(33, 11, 1337, generator=g), torch.randn(9, 37, 1337, generator=g)
    user = torch.randint(9, (33,), generator=g)
    first = with_threads(1, lambda: user_mlp(hidden, bank, user))
    for threads in (1, 2, 3, 7):
        assert torch.equal(with_threads(threads, lambda: user_mlp(hidden, bank, user)), first)
    for row in (0, 1, 17, 32):
        assert torch.equal(user_mlp(hidden[row : row + 1].clone(), bank, user[row : row + 1])[0], first[row])
    # nor does it matter how many candidates and units there are beside
    for count in range(1, 11):
        assert torch.equal(user_mlp(hidden[:, count:].clone(), bank[:, count:].clone(), user), first[:, count:, count:])


def test_strides():
    args = problem(batch=4, k=3, dim=6)
    hidden, bank = args["hidden"], args["bank"]
    agree(args | {"hidden": hidden[:1].expand(4, -1, -1), "bank": bank[:, :1].expand(-1, 6, -1)})
    agree(args | {"hidden": hidden[:, :, :1].expand(-1, -1, 6), "bank": bank[..., :1].expand(-1, -1, 6)})
    agree(args | {"hidden": hidden[:, ::2], "user": torch.tensor([1, 9, 2, 9, 0, 9, 3, 9])[::2]})
    agree(args | {"bank": bank[::2], "user": torch.tensor([0, 2, 2, 1])})
    agree({"hidden": hidden[..., ::2], "bank": bank[..., 1::2], "user": args["user"]})


def test_empty_batch():
    assert agree(problem(batch=0, users=2)).shape == (0, 4, 6)
    assert agree(problem(batch=0, users=1)).shape == (0, 4, 6)


WRONG = [
    ({"hidden": torch.zeros(3, 8)}, ValueError, r"\[B, k, D\]"),
    ({"hidden": torch.zeros(3, 4, 8, dtype=torch.float64)}, TypeError, "hidden must be float32 or bfloat16 or float16"),
    ({"hidden": torch.zeros(3, 0, 8)}, ValueError, "k >= 1"),
    ({"hidden": torch.zeros(3, 4, 0), "bank": torch.zeros(5, 6, 0)}, ValueError, "D >= 1"),
    ({"hidden": [[[1.0]]]}, TypeError, "torch.Tensor"),
    ({"bank": torch.zeros(5, 8)}, ValueError, r"\[U, H, D\]"),
    ({"bank": torch.zeros(5, 8, 6)}, ValueError, r"D = 8 but bank 6: a user's matrix is \[H, D\]"),
    ({"bank": torch.zeros(0, 6, 8)}, ValueError, "U >= 1"),
    ({"bank": torch.zeros(5, 0, 8)}, ValueError, "H >= 1"),
    ({"bank": torch.zeros(5, 6, 8).int()}, TypeError, "bank"),
    ({"user": torch.zeros(3, dtype=torch.int32)}, TypeError, "user must be int64"),
    ({"user": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shape \[3\]"),
    ({"user": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"shape \[3\]"),
    ({"bank": torch.zeros(5, 6, 8, device="meta")}, ValueError, "one device"),
    ({"user": torch.zeros(3, device="meta").long()}, ValueError, "one device"),
]


@pytest.mark.parametrize("function", [user_mlp, user_mlp_reference])
@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_errors_name_the_fix(function, change, error, says):
    with pytest.raises(error, match=says):
        function(**(problem() | change))


def test_direct_call_is_checked():
    for change, _, _ in WRONG[:4] + WRONG[5:13]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.pyargs.user_mlp(*(problem() | change).values())


def test_opcheck():
    for args in (problem(), problem(dtype=torch.bfloat16, bank_dtype=torch.float16), problem(users=1), problem(batch=0)):
        torch.library.opcheck(torch.ops.pyargs.user_mlp.default, tuple(args.values()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(hidden, bank, user):
        return torch.relu(user_mlp(hidden, bank, user + 0)) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        args = problem(batch=batch)
        assert torch.equal(compiled(**args), step(**args))


def test_schema_is_that_of_the_reference():
    inferred = torch.library.infer_schema(user_mlp_reference, mutates_args=())
    assert str(torch.ops.pyargs.user_mlp.default._schema) == f"pyargs::user_mlp{inferred}"


def test_meta_goes_through_the_fake_kernel():
    args = {name: tensor.to("meta") for name, tensor in problem(dtype=torch.bfloat16).items()}
    out = user_mlp(**args)
    assert out.shape == (3, 4, 6) and out.dtype == torch.float32 and out.device.type == "meta"


def test_native_here():
    pytest.importorskip("pyargs._C")
    assert "user_mlp" in ops.native


def test_without_the_extension():
    code = (
        "import torch, pytest, pyargs.ops as ops\n"
        "assert not ops.native\n"
        "g = torch.Generator().manual_seed(0)\n"
        "hidden, bank, user = torch.randn(3, 4, 9, generator=g), torch.randn(2, 5, 9, generator=g), torch.tensor([1, 7, 0])\n"
        "got = ops.user_mlp(hidden, bank, user)\n"
        "torch.testing.assert_close(got, ops.user_mlp_reference(hidden, bank, user), equal_nan=True, atol=0, rtol=0)\n"
        "assert got[1].isnan().all() and got[0].isfinite().all()\n"
        "torch.library.opcheck(torch.ops.pyargs.user_mlp.default, (hidden, bank, user * 0))\n"
        "compiled = torch.compile(ops.user_mlp, fullgraph=True, backend='aot_eager')\n"
        "torch.testing.assert_close(compiled(hidden, bank, user), got, equal_nan=True)\n"
        "with pytest.raises(ValueError, match='one for each row'): ops.user_mlp(hidden, bank, user[:2])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYARGS_NO_EXT": "1"})
