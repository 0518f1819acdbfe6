"""A request's `adjust` changes the policy's logits before the candidates are taken, on every path, for its own rows alone."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, chosen, engine_of, prompts, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.errors import PyargsError
from pyargs.models.token_reward import TokenReward
from pyargs.ops.library import has_extension

native = pytest.mark.skipif(not has_extension, reason="no extension")
BACKENDS = [pytest.param("cpu", marks=native), "eager"]
MORE = {"reward": dict(num_candidates=4), "token reward": dict(num_candidates=4), "alone": {}}


def pair_of(kind: str, backend: str):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    policy, other = tiny_lm(dtype=dtype), tiny_lm(seed=3, dtype=dtype)
    guides = {"reward": lambda: reward_model(other), "token reward": lambda: TokenReward(other, None), "alone": lambda: None}
    return policy, guides[kind]()


def without(forbidden):
    def adjust(rows, logits):
        assert logits.dtype == torch.float32 and len(logits) == len(rows)
        logits[:, forbidden] = -torch.inf
        return logits

    return adjust


def users_of(kind, count):
    return USERS[:count] if kind == "reward" else [""] * count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_forbidden_token_is_never_chosen_and_other_rows_stay_as_they_are(kind, backend, temperature):
    policy, model = pair_of(kind, backend)
    rows, users = prompts([4, 7, 2]), users_of(kind, 3)
    asked = dict(backend=backend, max_new_tokens=8, stop=[], temperature=temperature, **MORE[kind])
    if kind != "alone":
        asked["reward_weight"] = 2.0
    free = tokens(chosen(policy, model, rows, users, **asked))
    forbidden = sorted({token for row in free for token in row[:3]})
    held = tokens(chosen(policy, model, rows, users, **asked, adjust=[None, without(forbidden), None]))
    assert held[0] == free[0] and held[2] == free[2]
    assert not set(forbidden) & set(held[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_that_are_told_are_those_of_the_adjusted_logits(backend):
    policy, model = pair_of("reward", backend)
    engine = engine_of(policy, model, backend=backend)
    (prompt,) = prompts([5])
    logits = policy(torch.tensor([prompt])).logits[0, -1].float()
    first = int(logits.argmax())
    wish = dict(reward_weight=0.0, num_candidates=4, max_new_tokens=1, stop=[], logprobs=4)
    (answer,) = engine.generate([prompt], ["ann"], **wish, adjust=without([first]))
    want = logits.index_fill(0, torch.tensor([first]), -torch.inf).log_softmax(0).topk(4)
    told = answer.told[0].candidates
    assert [one.token for one in told] == want.indices.tolist()
    assert [one.logprob for one in told] == pytest.approx(want.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_who_comes_in_does_not_change_what_the_others_want(backend):
    """The logits of those who are here are computed when another one is about to come in."""
    policy, model = pair_of("reward", backend)
    wish = dict(reward_weight=1.0, num_candidates=3, max_new_tokens=6, stop=[])
    forbid = [without([5, 6, 7]), without([8, 9, 10]), without([11, 12, 13])]
    rows = prompts([3, 4, 5])
    want = []
    for row, adjust in zip(rows, forbid, strict=True):
        want += engine_of(policy, model, backend=backend).generate([row], ["ann"], **wish, adjust=adjust)
    engine, numbers = engine_of(policy, model, backend=backend, max_rows=3), []
    for row, adjust in zip(rows, forbid, strict=True):
        numbers.append(engine.submit(row, "ann", **wish, adjust=adjust))
        engine.step()
        engine.step()
    while engine.busy:
        engine.step()
    assert [engine.answer(number).tokens for number in numbers] == [answer.tokens for answer in want]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    room=st.integers(1, 3),
    new=st.integers(1, 6),
    backend=st.sampled_from(["cpu", "eager"]),
)
def test_rows_of_one_function_are_given_together_with_their_tokens_so_far(lengths, room, new, backend):
    policy, model = pair_of("reward", backend)
    engine, seen = engine_of(policy, model, backend=backend, max_rows=room), {}

    def adjust(rows, logits):
        assert len(rows) <= room and logits.shape == (len(rows), 61)
        for number, text in rows.items():
            seen.setdefault(number, []).append(text)
        return logits

    rows = prompts(lengths)
    wish = dict(reward_weight=1.0, num_candidates=3, max_new_tokens=new)
    numbers = [engine.submit(row, "ann", **wish, adjust=adjust) for row in rows]
    while engine.busy:
        engine.step()
    for number, row in zip(numbers, rows, strict=True):
        answer = engine.answer(number)
        assert seen[number] == [row + answer.tokens[:i] for i in range(len(seen[number]))]
        assert len(seen[number]) == len(answer.tokens) + (answer.finish_reason == "stop")


def test_what_is_no_function_and_what_gives_no_logits_is_refused():
    policy, model = pair_of("reward", "eager")
    engine = engine_of(policy, model)
    with pytest.raises(PyargsError, match="adjust is a function"):
        engine.submit([5, 6], "ann", reward_weight=1.0, adjust=[7])
    for wrong in (lambda rows, logits: None, lambda rows, logits: logits[:, :3], lambda rows, logits: logits.tolist()):
        with pytest.raises(PyargsError, match=r"adjust must return logits of shape \[1, 61\]"):
            engine.generate([[5, 6]], ["ann"], reward_weight=1.0, num_candidates=3, adjust=wrong)


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_without_a_token_left_ends_with_an_error_by_itself(kind, temperature):
    policy, model = pair_of(kind, "eager")
    engine = engine_of(policy, model)
    asked = dict(max_new_tokens=3, stop=[], temperature=temperature, **MORE[kind])
    if kind != "alone":
        asked["reward_weight"] = 1.0
    numbers = [engine.submit([5, 6], users_of(kind, 1)[0], **asked, adjust=own) for own in (None, without(slice(None)))]
    while engine.busy:
        engine.step()
    assert len(engine.answer(numbers[0]).tokens) == 3
    with pytest.raises(PyargsError, match="no token is left"):
        engine.answer(numbers[1])
