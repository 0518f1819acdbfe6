from __future__ import annotations

import math

import emulated
import pytest
import torch
from choices import WRONG_CHOICES, differing
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import DTYPES, decided_by_rounding, random_logits

from pyargs import ops
from pyargs.ops import score_select, tokenwise_select, tokenwise_select_reference, topk_logprobs
from pyargs.ops.choice import split_temperature
from pyargs.ops.tokenwise_select import _default

INF, NAN = math.inf, math.nan


def problem(batch=3, vocab=50, k=4, seed=0, dtypes=(torch.float32, torch.float32), weight=0.37) -> dict:
    return {
        "logits": random_logits(batch, vocab, dtypes[0], 2 * seed),
        "reward_logits": random_logits(batch, vocab, dtypes[1], 2 * seed + 1),
        "k": k,
        "reward_weight": torch.full((batch,), weight),
        "finished": torch.zeros(batch, dtype=torch.bool),
    }


def sampled(args: dict, temperature: float = 1.0, seed: int = 5) -> dict:
    uniform = torch.rand(len(args["logits"]), generator=torch.Generator().manual_seed(seed))
    return args | {"temperature": temperature, "uniform": uniform}


def agree(args: dict, op=tokenwise_select, like=tokenwise_select_reference) -> tuple[torch.Tensor, ...]:
    got, expected = op(**args), like(**args)
    assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.float32, torch.bool]
    clear = ~decided_by_rounding(args) | args["finished"]
    for i in (0, 1, 3):
        assert torch.equal(got[i][clear], expected[i][clear])
    torch.testing.assert_close(got[2], expected[2], atol=2e-5, rtol=0, equal_nan=True)
    return got


def composed(logits, reward_logits, reward_weight, finished, k, **choice) -> tuple[torch.Tensor, ...]:
    """What the op replaces."""
    logprobs, ids, _ = topk_logprobs(logits, k)
    rewards = reward_logits.float().log_softmax(1).gather(1, ids)
    return score_select(
        rewards.unsqueeze(-1), rewards.new_ones(1, 1), ids[:, 0], reward_weight, logprobs, ids, finished, **choice
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_like_the_reference_and_like_topk_logprobs_with_score_select(data):
    drawn(data, tokenwise_select)


@emulated.needed
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.tokenwise_select)


def drawn(data, op) -> None:
    """Any shape, dtypes, place in memory, kind of rows, and choice."""
    draw = data.draw
    vocab = draw(st.one_of(st.integers(1, 1100), st.sampled_from([8191, 8192, 8193, 16897, 50257])), "vocab")
    batch = draw(st.integers(0, 4), "batch")
    k = draw(st.integers(1, min(64, vocab)), "k")
    seed = draw(st.integers(0, 99), "seed")
    generator = torch.Generator().manual_seed(seed)
    args = {"k": k, "finished": torch.rand(batch, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]), "finished")}
    for i, name in enumerate(("logits", "reward_logits")):
        x = random_logits(batch, vocab, seed=2 * seed + i)
        kind = draw(st.sampled_from(["random", "ties", "sorted", "reversed", "constant", "masked"]), f"kind of {name}")
        if kind == "ties":
            x = x.round()
        elif kind in ("sorted", "reversed"):
            x = x.sort(-1, descending=kind == "reversed").values
        elif kind == "constant":
            x = torch.full_like(x, -3.0)
        elif kind == "masked":
            x = x.masked_fill(x < 0, -INF)
        if batch:
            special = draw(st.sampled_from([None, None, NAN, INF, -INF, "all -inf"]), f"special value of {name}")
            if special == "all -inf":
                x[0] = -INF
            elif special is not None:
                x[0, draw(st.integers(0, vocab - 1), "its place")] = special
        padding = draw(st.integers(0, 9), "columns beside the rows")
        offset = draw(st.integers(0, padding), "start of the rows")
        wide = torch.full((batch, vocab + padding), 1e4, dtype=draw(st.sampled_from(DTYPES), f"dtype of {name}"))
        args[name] = wide[:, offset : offset + vocab].copy_(x)
    weights = torch.tensor(draw(st.sampled_from([[0.37], [0.0, -0.0, 0.37], [1.13, -0.37, 30.3]]), "weights"))
    args["reward_weight"] = weights[torch.randint(len(weights), (batch,), generator=generator)]
    stop = draw(st.sampled_from([None, (), (7,), tuple(range(40))]), "stop")
    args["stop"] = None if stop is None else torch.tensor(stop, dtype=torch.int64)
    args["pad_id"] = draw(st.integers(-1, 3), "pad")
    if draw(st.booleans(), "sampled"):
        args = sampled(args, draw(st.sampled_from([0.25, 1.0, 3.0]), "temperature"), seed)
    args |= differing(data, batch, k, "uniform" in args)
    agree(args, op=op)
    agree(args, op=op, like=composed)


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True)])
@pytest.mark.parametrize("vocab", [1, 33, 511, 513, 8192, 49152, 151936])
def test_every_capability(capability, dtypes, vocab):
    for k in {1, min(10, vocab), min(64, vocab)}:
        agree(problem(2, vocab, k, dtypes=dtypes))
        agree(sampled(problem(2, vocab, k, dtypes=dtypes)))


@emulated.needed
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_a_large_vocabulary_emulated(dtypes):
    emulated.order(3)
    agree(problem(1, 151936, 64, dtypes=dtypes), op=emulated.tokenwise_select)


@emulated.needed
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_emulated_kernel_repeats_bitwise_in_any_order_of_threads_and_batch(dtypes):
    best = problem(3, 20011, 40, dtypes=dtypes) | {"finished": torch.tensor([False, True, False])}
    for args in (best, sampled(best)):
        emulated.order(0)
        first = emulated.tokenwise_select(**args)
        for seed in range(1, 7):
            emulated.order(seed)
            for got, expected in zip(emulated.tokenwise_select(**args), first, strict=True):
                assert torch.equal(got, expected)
        for row in range(3):
            for got, expected in zip(emulated.tokenwise_select(**alone(args, row)), first, strict=True):
                assert torch.equal(got[0], expected[row])


def alone(args: dict, row: int) -> dict:
    return {name: value[row : row + 1].clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def test_bitwise_the_same_in_any_batch_and_with_any_threads(capability, with_threads):
    args = problem(7, 50257, 40) | {"finished": torch.arange(7) == 3}  # odd: every row starts at another place in a cache line
    args = sampled(args)
    first = with_threads(1, lambda: tokenwise_select(**args))
    for threads in (1, 2, 3):
        for got, expected in zip(with_threads(threads, lambda: tokenwise_select(**args)), first, strict=True):
            assert torch.equal(got, expected)
    for row in range(7):
        one = with_threads(2, lambda: tokenwise_select(**alone(args, row)))  # noqa: B023
        for got, expected in zip(one, first, strict=True):
            assert torch.equal(got[0], expected[row])


@emulated.needed
def test_special_rows_emulated():
    emulated.order(1)
    special_rows(emulated.tokenwise_select)


def test_special_rows(capability):
    special_rows(tokenwise_select)


def special_rows(op) -> None:
    """Policy, rewards, weight; the slot, and the slot where sampling with uniform 0.9."""
    plain = [3.0, 2.0, 1.0, 0.0]
    cases = [
        (plain, [0.0, 0.0, 9.0, 0.0], 1.0, 2, 2),
        (plain, [0.0, 0.0, 9.0, 0.0], 0.0, 0, 1),
        (plain, [NAN, 0.0, 9.0, 0.0], 0.0, 0, 1),  # weight 0: whatever the reward
        (plain, [-INF] * 4, -0.0, 0, 1),
        (plain, [NAN, 0.0, 9.0, 0.0], 1.0, -1, -1),
        (plain, [0.0, 0.0, 0.0, NAN], 1.0, -1, -1),  # of no candidate, but in the sum
        (plain, [-INF] * 4, 1.0, -1, -1),
        (plain, [0.0, INF, 0.0, 0.0], 1.0, -1, -1),  # inf - inf of a candidate
        (plain, [0.0, 0.0, 0.0, INF], 1.0, -1, -1),
        (plain, [0.0, 0.0, 0.0, INF], 0.0, 0, 1),
        (plain, [-INF, 0.0, -INF, 0.0], 1.0, 1, 1),
        (plain, [-INF, 0.0, -INF, 0.0], -1.0, -1, -1),  # +inf
        ([INF, 2.0, 1.0, 0.0], plain, 1.0, -1, -1),
        ([NAN, 2.0, 1.0, 0.0], plain, 1.0, -1, -1),
        ([-INF] * 4, plain, 1.0, -1, -1),
        ([1.0, -INF, -INF, -INF], plain, 1.0, 0, 0),
        ([-INF, 1.0, -INF, -INF], [-INF, 0.0, 0.0, 0.0], -1.0, -1, -1),  # -inf + inf
        ([1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 5.0, 5.0], 1.0, 1, 2),  # ties: the lower slot
    ]
    logits, rewards, weight, slot, drawn_slot = (list(column) for column in zip(*cases, strict=True))
    args = {
        "logits": torch.tensor(logits),
        "reward_logits": torch.tensor(rewards),
        "k": 3,
        "pad_id": 49,
        "reward_weight": torch.tensor(weight),
        "finished": torch.zeros(len(cases), dtype=torch.bool),
    }
    token, chosen, _, finished = agree(args, op=op)
    assert chosen.tolist() == slot and finished.tolist() == [s < 0 for s in slot]
    assert all(t == 49 for t, s in zip(token.tolist(), slot, strict=True) if s < 0)
    args |= {"temperature": 1.0, "uniform": torch.full((len(cases),), 0.9)}
    assert agree(args, op=op)[1].tolist() == drawn_slot
    args["reward_logits"] = torch.tensor([[0.0, 0.0, INF, NAN]]).expand(len(cases), -1)  # side by side, of no candidate
    args["reward_weight"] = torch.ones(len(cases))
    assert agree(args | {"k": 2}, op=op)[1].tolist() == [-1] * len(cases)


@emulated.needed
def test_finished_rows_are_not_read_emulated():
    finished_rows(emulated.tokenwise_select)


def test_finished_rows_are_not_read():
    finished_rows(tokenwise_select)


def finished_rows(op) -> None:
    args = sampled(problem(3, 9000, 5)) | {"pad_id": 13, "finished": torch.tensor([True, False, True])}
    for name in ("logits", "reward_logits", "reward_weight", "uniform"):
        args[name][0], args[name][2] = NAN, INF
    token, slot, reward, finished = agree(args, op=op)
    assert token[::2].tolist() == [13, 13] and slot[::2].tolist() == [0, 0] and not reward[::2].any()
    assert finished.tolist() == [True, False, True] and slot[1] >= 0


def test_stop_tokens_finish():
    args = problem(2, 50, 3) | {"reward_weight": torch.zeros(2)}
    first = args["logits"].argmax(1)
    assert agree(args | {"stop": first[:1]})[3].tolist() == [True, bool(first[1] == first[0])]
    assert agree(args | {"stop": torch.empty(0, dtype=torch.int64)})[3].tolist() == [False, False]


@emulated.needed
def test_sampling_follows_the_distribution_emulated():
    follows(emulated.tokenwise_select, draws=500)


def test_sampling_follows_the_distribution(capability):
    follows(tokenwise_select, draws=20000)


def follows(op, draws: int) -> None:
    one = problem(1, 30, 4)
    args = {name: v.expand(draws, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for name, v in one.items()}
    args |= {"temperature": 2.0, "uniform": (torch.arange(draws) + 0.5) / draws}
    share = torch.bincount(agree(args, op=op)[1], minlength=4) / draws
    logprobs, ids, _ = topk_logprobs(one["logits"], 4)
    score = logprobs + 0.37 * one["reward_logits"].log_softmax(1).gather(1, ids)
    torch.testing.assert_close(share, (score / 2).softmax(1)[0], atol=2 / draws, rtol=0)


def test_strides():
    args = problem(6, 1000, 5)
    agree(args | {"logits": args["logits"].T.contiguous().T})
    agree(args | {"reward_logits": args["reward_logits"].T.contiguous().T})
    agree({name: v[::2] if isinstance(v, torch.Tensor) else v for name, v in sampled(args).items()})
    agree(args | {"reward_logits": args["reward_logits"][:1].expand(6, -1), "reward_weight": torch.ones(1).expand(6)})
    agree(args | {"stop": torch.tensor([1, 0, 2, 0])[::2], "finished": torch.zeros(1, dtype=torch.bool).expand(6)})


def test_empty_batch():
    token, slot, reward, finished = agree(problem(0))
    assert token.shape == slot.shape == finished.shape == (0,) and reward.shape == (0, 4)


WRONG = [
    ({"logits": torch.zeros(50)}, ValueError, r"\[B, V\]"),
    ({"reward_logits": torch.zeros(3, 2, 50)}, ValueError, r"reward_logits\[:, -1\]"),
    ({"logits": torch.zeros(3, 50, dtype=torch.float64)}, TypeError, "logits must be float32"),
    ({"reward_logits": torch.zeros(3, 50, dtype=torch.int64)}, TypeError, "reward_logits must be float32"),
    ({"reward_logits": torch.zeros(3, 51)}, ValueError, r"50 entries a row but reward_logits 51: cut both .*\[:, :V\]"),
    ({"reward_logits": torch.zeros(4, 50)}, ValueError, "reward_logits"),
    ({"reward_logits": torch.zeros(3, 50, device="meta")}, ValueError, "one device"),
    ({"k": 51}, ValueError, "lower k"),
    ({"k": 0}, ValueError, "1 to 64"),
    ({"k": 65}, ValueError, "1 to 64"),
    ({"k": 2.0}, TypeError, "int"),
    ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor"),
    ({"reward_weight": torch.ones(3).double()}, TypeError, "reward_weight"),
    ({"reward_weight": 1.0}, TypeError, "torch.Tensor"),
    ({"finished": torch.zeros(3)}, TypeError, "finished"),
    ({"finished": torch.zeros(2).bool()}, ValueError, "finished"),
    ({"temperature": 1.0, "uniform": torch.zeros(2)}, ValueError, "uniform"),
    *WRONG_CHOICES,
]


@pytest.mark.parametrize("function", [tokenwise_select, tokenwise_select_reference])
@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_errors_name_the_fix(function, change, error, says):
    with pytest.raises(error, match=says):
        function(**(problem() | change))


def positional(args: dict) -> tuple:
    number, each = split_temperature(args.get("temperature"))
    names = ("logits", "reward_logits", "reward_weight", "finished", "k", "stop")
    return (*map(args.get, names), 0, number, args.get("uniform"), args.get("count"), each)


def rows_apart(args: dict) -> dict:
    """With stops, counts and temperatures of each row its own."""
    batch = len(args["logits"])
    given = {"stop": torch.tensor([[1, -1], [2, 3], [4, 5]])[:batch], "count": torch.tensor([1, 4, 2])[:batch]}
    return args | given | {"temperature": torch.tensor([0.0, 0.5, 2.0])[:batch], "uniform": torch.full((batch,), 0.4)}


def test_direct_call_is_checked():
    for change, _, _ in WRONG:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.pyargs.tokenwise_select(*positional(problem() | change))


def test_opcheck():
    half = problem(dtypes=(torch.bfloat16, torch.float16)) | {"stop": torch.tensor([3, 4])}
    for args in (problem(), half, sampled(problem()), rows_apart(problem())):
        torch.library.opcheck(torch.ops.pyargs.tokenwise_select.default, positional(args))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def step(**args):
        token, slot, reward, finished = tokenwise_select(**args, pad_id=3)
        return token + 1, slot, reward * 2, ~finished

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        shared = sampled(problem(batch)) | {"stop": torch.tensor([1, 2])}
        for args in (shared, rows_apart(shared)):
            for got, expected in zip(compiled(**args), step(**args), strict=True):
                assert torch.equal(got, expected)


def test_schema_is_that_of_the_default():
    inferred = torch.library.infer_schema(_default, mutates_args=())
    assert str(torch.ops.pyargs.tokenwise_select.default._schema) == f"pyargs::tokenwise_select{inferred}"


def test_native_here():
    pytest.importorskip("pyargs._C")
    assert "tokenwise_select" in ops.native
