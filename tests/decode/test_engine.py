"""The engine: rows that come and go, each as if it were alone."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from company import check_company, in_threads, play, wishes
from conftest import reward_model, tiny_lm
from decoding import USERS, pair_in_float32, prompts, shared_pair
from hypothesis import given, settings
from hypothesis import strategies as st

import pyargs
from pyargs.decode import args
from pyargs.decode.backends import eager
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError, UnknownUser
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.types import Users


@settings(max_examples=25, deadline=None)
@given(
    wishes(), st.sampled_from(["linear", "mlp", "personal mlp"]), st.sampled_from(["own", "shared", "shared lora"]), st.data()
)
def test_a_row_alone_is_the_row_in_any_company(requests, head, weights, data):
    policy, model = shared_pair(weights, head, data.draw(st.integers(0, 9)))
    check_company(lambda room: Engine(policy, model, max_rows=room, backend="eager"), requests, data.draw(st.integers(1, 4)))


@settings(max_examples=25, deadline=None)
@given(wishes(), st.sampled_from(["own", "shared", "shared lora"]), st.integers(0, 9), st.integers(1, 4))
def test_on_the_cpu_stack_it_is_the_same_bit_for_bit(requests, weights, seed, room):
    policy, model = pair_in_float32(weights, seed=seed)
    check_company(lambda room: Engine(policy, model, max_rows=room, backend="cpu"), requests, room, exact=True)


@settings(max_examples=10, deadline=None)
@given(wishes(), st.integers(1, 4))
def test_one_pass_for_policy_and_lora_is_two_passes(requests, room):
    policy, model = shared_pair("shared lora", "linear", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eager.MOST_ROWS, "cpu", 1000)
        engine = Engine(policy, model, max_rows=room, backend="eager")
        assert type(engine._rows.rows.passes) is eager.Shared
        together = play(engine, requests)
        patch.setitem(eager.MOST_ROWS, "cpu", 0)
        other = Engine(policy, model, max_rows=room, backend="eager")
        assert type(other._rows.rows.passes) is not eager.Shared
        assert [one.tokens for one in play(other, requests)] == [one.tokens for one in together]


@settings(max_examples=10, deadline=None)
@given(wishes(4, clip=False), st.integers(1, 3), st.sampled_from(["cpu", "eager"]), st.booleans())
def test_a_token_reward_and_a_policy_alone_keep_company_too(requests, room, backend, guided):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    policy = tiny_lm(dtype=dtype)
    model = TokenReward(tiny_lm(seed=3, dtype=dtype), None) if guided else None
    asked = []
    for i, (prompt, user, more, *rest) in enumerate(requests):
        if guided and i % 2:
            more = more | {"num_candidates": "all"}
        if not guided:
            more = {name: value for name, value in more.items() if name not in ("reward_weight", "num_candidates")}
        asked.append((prompt, user, more, *rest))
    check_company(lambda room: Engine(policy, model, max_rows=room, backend=backend), asked, room, exact=backend == "cpu")


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_models_without_shared_prefixes_answer_in_closed_batches(family):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    rows, users = prompts([3, 8, 1, 5]), ["ann", "bob", "cid", "ann"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines = [Engine(policy, model, max_rows=room) for room in (1, 3, 4)]
    found = [[one.tokens for one in engine.generate(rows, users, reward_weight=2.0, max_new_tokens=9)] for engine in engines]
    assert found[0] == found[1] == found[2]


def test_hooks_are_called_and_the_tokens_stay():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, seen = prompts([3, 8]), []
    want = [one.tokens for one in Engine(policy, model).generate(rows, USERS[:2], reward_weight=2.0)]
    policy.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    engine = Engine(policy, model)
    assert "copy" in engine.reason
    assert [one.tokens for one in engine.generate(rows, USERS[:2], reward_weight=2.0)] == want
    assert seen


def test_a_changed_model_is_noticed_at_the_next_step():
    policy, model = pair_in_float32("own")
    for change in (
        lambda: policy.lm_head.weight.data.mul_(1.1),  # which has no version
        lambda: model.backbone.layers[0].register_forward_hook(lambda *_: None),
        lambda: policy.model.layers.__setitem__(0, copy.deepcopy(policy.model.layers[0])),
    ):
        engine = Engine(policy, model)
        engine.generate(prompts([4]), ["ann"], reward_weight=1.0, max_new_tokens=2)
        change()
        with pytest.raises(PyargsError, match=r"engine\.refresh\(\)"):
            engine.generate(prompts([4]), ["ann"], reward_weight=1.0, max_new_tokens=2)
        engine.refresh()
        engine.generate(prompts([4]), ["ann"], reward_weight=1.0, max_new_tokens=2)


def test_a_changed_weight_is_noticed_in_the_middle_of_an_answer():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model)
    engine.submit(prompts([4])[0], "ann", reward_weight=1.0)
    engine.step()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    with pytest.raises(PyargsError, match="refresh"):
        engine.step()


def test_users_take_turns():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, max_rows=1)
    many = [engine.submit(prompt, "ann", reward_weight=1.0, max_new_tokens=2) for prompt in prompts([3] * 20)]
    engine.step()
    lone = engine.submit(prompts([3])[0], "bob", reward_weight=1.0, max_new_tokens=1)
    done = []
    while engine.answer(lone) is None if lone not in done else False:
        done += [event.number for event in engine.step() if event.answer is not None]
    assert done.index(lone) <= 2 and many[0] in done


def test_a_new_user_is_served_by_the_next_request_and_one_who_left_is_unknown():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model)
    running = engine.submit(prompts([3])[0], "ann", reward_weight=1.0, max_new_tokens=8)
    engine.step()
    vectors = {name: value[:1].detach() + 1 for name, value in model.users.vectors.items()}
    model.users.append(["dan"], **vectors)
    (answer,) = engine.generate(prompts([4]), ["dan"], reward_weight=1.0, max_new_tokens=4)
    assert answer.user == "dan" and answer.tokens
    assert engine.answer(running) is not None or engine.busy
    model.users.remove(["dan"])
    with pytest.raises(UnknownUser, match="dan"):
        engine.submit(prompts([3])[0], "dan", reward_weight=1.0)


def test_answers_are_the_same_whoever_comes_to_the_table_and_leaves_it():
    policy, model = pair_in_float32("own")
    model = copy.deepcopy(model)
    rows, wish = prompts([3, 5]), dict(reward_weight=3.0, max_new_tokens=8, stop=[])
    want = [one.tokens for one in Engine(policy, model).generate(rows, ["cid", "bob"], **wish)]
    engine = Engine(policy, model)
    running = [engine.submit(prompt, user, **wish) for prompt, user in zip(rows, ["cid", "bob"], strict=True)]
    engine.step()
    new = {name: torch.randn(50, *value.shape[1:]) for name, value in model.users.vectors.items()}
    model.users.append([str(i) for i in range(50)], **new)
    engine.step()
    model.users.remove(["ann", *map(str, range(40))])
    while engine.busy:
        engine.step()
    assert [engine.answer(one).tokens for one in running] == want
    assert [one.tokens for one in engine.generate(rows, ["cid", "bob"], **wish)] == want


def test_streams_of_several_threads_are_the_answers():
    policy, model = pair_in_float32("shared")
    rows = prompts([3, 8, 1, 5, 4, 6])
    want = [one.tokens for one in Engine(policy, model).generate(rows, USERS * 2, reward_weight=2.0, stop=[])]
    engine, found = Engine(policy, model, max_rows=4), {}

    def listen(i: int) -> None:
        found[i] = [event.token for event in engine.stream(rows[i], (USERS * 2)[i], reward_weight=2.0, stop=[])]

    in_threads(listen, len(rows))
    assert [found[i] for i in range(len(rows))] == want


def test_step_tells_of_what_was_submitted_also_when_others_computed_it():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, max_rows=3)
    mine = engine.submit(prompts([3])[0], "ann", reward_weight=1.0, max_new_tokens=5, stop=[])
    engine.generate(prompts([4, 5]), ["bob", "cid"], reward_weight=1.0, max_new_tokens=9, stop=[])  # computes it, too
    events = engine.step()
    assert [event.number for event in events] == [mine] * 5 and events[-1].answer is not None
    assert [event.token for event in events] == engine.answer(mine).tokens and not engine.busy


def test_a_user_who_goes_ends_the_requests_that_wait_and_those_alone():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, max_rows=3)
    (first, waits), wish = prompts([3, 4]), dict(reward_weight=5.0, max_new_tokens=6, stop=[])
    ann, cid = (answer.tokens for answer in Engine(policy, model).generate([first] * 2, ["ann", "cid"], **wish))
    assert ann != cid
    running, leaves = (engine.submit(first, user, **wish) for user in ("ann", "cid"))
    engine.step()
    gone, other = engine.submit(waits, "bob", **wish), engine.submit(first, "ann", **wish)
    model.users.remove(["bob", "cid"])
    events = [event for _ in range(9) for event in engine.step()]
    assert engine.answer(running).tokens == engine.answer(other).tokens == ann and engine.answer(leaves).tokens == cid
    assert [event.number for event in events if event.error is not None] == [gone]
    with pytest.raises(UnknownUser, match="bob"):
        engine.answer(gone)


@pytest.mark.parametrize("prefill", [None, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_a_user_who_goes_while_requests_come_in_ends_their_own_alone(soft, prefill, monkeypatch):
    """Another thread removes the user when the rows are about to come in, behind every earlier look at the table."""
    policy, model = pair_in_float32("own")
    rows, wish = prompts([3, 4, 6]), dict(max_new_tokens=5, stop=[]) | ({} if soft else dict(reward_weight=5.0))
    if soft:
        vectors = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
        policy, model = None, UserPolicy(policy, None, soft=SoftPrompt(torch.zeros(1, 2, 32), Users(USERS, offset=vectors)))
    (want,) = Engine(policy, model).generate(rows[:1], ["ann"], **wish)
    engine = Engine(policy, model, max_rows=4, prefill_tokens=prefill)
    running = engine.submit(rows[0], "ann", **wish)
    engine.step()
    gone, other = engine.submit(rows[2], "bob", **wish), engine.submit(rows[0], "ann", **wish)
    join = engine._rows.join

    def too_late(*given) -> None:
        if "bob" in model.users.ids and any(request.user == "bob" for request in given[0]):
            in_threads(lambda _: model.users.remove(["bob"]), 1)
        join(*given)

    monkeypatch.setattr(engine._rows, "join", too_late)
    events = []
    while engine.busy:
        events += engine.step()
    assert engine.answer(running).tokens == engine.answer(other).tokens == want.tokens
    assert [event.number for event in events if event.error is not None] == [gone]
    with pytest.raises(UnknownUser, match="bob"):
        engine.answer(gone)


def test_a_cancelled_request_has_a_last_event_and_a_stream_nobody_listens_to_ends():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model)
    number = engine.submit(prompts([3])[0], "ann", reward_weight=1.0)
    engine.step()
    engine.cancel(number)
    (event,) = engine.step()
    assert (event.number, event.token, event.answer.finish_reason) == (number, None, "cancelled")
    stream = engine.stream(prompts([3])[0], "ann", reward_weight=1.0)
    assert engine.busy
    del stream
    assert not engine.busy
    for wrong in (10**6, "x"):
        with pytest.raises(PyargsError):
            engine.cancel(wrong)
    with pytest.raises(PyargsError, match="temperature"):
        engine.submit([3], "ann", temprature=1.0)
    with pytest.raises(UnknownUser, match="name the user"):
        engine.submit([3], reward_weight=1.0)


def test_a_greedy_row_is_the_same_beside_a_sampled_one_and_in_any_default_dtype():
    """log_softmax rounds two logits that are nearly the same to one, and then the lower id would win."""
    lm = tiny_lm(dtype=torch.float32)
    with torch.no_grad():
        lm.lm_head.weight[7] = lm.lm_head.weight[30] * (1 + 2**-22)
        lm.lm_head.weight[[7, 30]] *= 40
    rows, wish = prompts([3, 5, 2, 6]), dict(max_new_tokens=6, stop=[])
    for backend in ("cpu",):  # the others' own rounding depends on the batch
        want = [Engine(lm, backend=backend).generate([row], **wish)[0].tokens for row in rows]
        engine = Engine(lm, backend=backend, max_rows=5)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            greedy = [engine.submit(row, **wish) for row in rows]
            engine.step()
            sampled = engine.submit(rows[0], temperature=1.0, seed=3, **wish)
            with torch.inference_mode():  # whose tensors the engine must not keep
                engine.step()
            while engine.busy:
                engine.step()
        finally:
            torch.set_default_dtype(before)
        assert [engine.answer(number).tokens for number in greedy] == want
        alone = Engine(lm, backend=backend).generate(rows[:1], temperature=1.0, seed=[3], **wish)
        assert engine.answer(sampled).tokens == alone[0].tokens


def test_a_cancel_in_the_middle_of_a_step_waits_for_its_end(monkeypatch):
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, max_rows=2)
    one, other = (engine.submit(row, "ann", reward_weight=1.0, max_new_tokens=5, stop=[]) for row in prompts([3, 4]))
    chosen = engine._rows.rows.choose
    monkeypatch.setattr(engine._rows.rows, "choose", lambda: (engine.cancel(one), chosen())[1])
    while engine.busy:
        engine.step()
    assert engine.answer(one).finish_reason == "cancelled" and len(engine.answer(other).tokens) == 5


def test_the_last_event_of_best_of_n_has_the_answer():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, best_of=3, max_rows=2)
    number, events = engine.submit(prompts([3])[0], "ann", max_new_tokens=4, seed=1), []
    while engine.busy:
        events += engine.step()
    (event,) = events
    assert event.number == number and event.answer is engine.answer(number)


def test_who_stops_listening_cancels():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model)
    stream = engine.stream(prompts([3])[0], "ann", reward_weight=1.0)
    next(stream)
    assert engine.busy
    stream.close()
    assert not engine.busy


def test_where_nothing_can_be_chosen_the_row_ends_and_the_others_go_on():
    policy, model = pair_in_float32("own")
    model.users.vectors["mixture"].data[0] = float("nan")
    engine = Engine(policy, model)
    bad = engine.submit(prompts([3])[0], "ann", reward_weight=1.0, max_new_tokens=4)
    good = engine.submit(prompts([3])[0], "bob", reward_weight=1.0, max_new_tokens=4)
    events = [event for _ in range(5) for event in engine.step()]
    assert [event.number for event in events if event.error is not None] == [bad]
    assert engine.answer(good).finish_reason in ("length", "stop")
    with pytest.raises(PyargsError, match="not numbers in row"):
        engine.answer(bad)
    with pytest.raises(PyargsError, match="not numbers in row"):
        engine.generate(prompts([3]), ["ann"], reward_weight=1.0)
    assert not engine.busy


def test_best_of_n_keeps_the_sample_with_the_largest_reward():
    policy, model = pair_in_float32("own")
    engine = Engine(policy, model, best_of=5, max_rows=3)
    rows = prompts([3, 6])
    answers = engine.generate(rows, USERS[:2], max_new_tokens=6, seed=1)
    for answer, row in zip(answers, rows, strict=True):
        scores = model.score([(row, [answer.tokens])], [answer.user])[0] if answer.tokens else None
        assert len(answer.rewards) == 5 and (scores is None or abs(max(answer.rewards) - scores.item()) < 1e-5)
    assert answers[0].tokens == engine.generate(rows[:1], USERS[:1], max_new_tokens=6, seed=[answers[0].seed])[0].tokens


def test_a_user_policy_answers_by_itself():
    lm = tiny_lm(dtype=torch.float32)
    engine = Engine(UserPolicy(lm, None))
    assert engine.backend == "cpu"
    rows = prompts([3, 8])
    want = [lm.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[0, len(row) :].tolist() for row in rows]
    got = engine.generate(rows, max_new_tokens=6)
    assert [one.tokens for one in got] == [[t for t in row if t not in (lm.generation_config.eos_token_id,)] for row in want]


@pytest.mark.parametrize(
    "wish, message",
    [
        (dict(strength=1.0, reward_weight=1.0), "one of them"),
        (dict(), "no reward_std"),
        (dict(reward_weight=1.0, num_candidates=0), "num_candidates"),
        (dict(reward_weight=1.0, num_candidates="all"), "TokenReward"),
        (dict(reward_weight=1.0, temperature=-1), "temperature"),
        (dict(reward_weight=1.0, temperature=True), "temperature"),
        (dict(reward_weight=1.0, top_p=0.0), "top_p"),
        (dict(reward_weight=1.0, min_p=1.5), "min_p"),
        (dict(reward_weight=1.0, max_new_tokens=0), "max_new_tokens"),
        (dict(reward_weight=1.0, stop=2**63), "stop"),
        (dict(reward_weight=1.0, max_new_tokens=10**6), "positions"),
        (dict(reward_weight=float("nan")), "finite"),
    ],
)
def test_wrong_wishes_are_refused_by_name(wish, message):
    policy, model = shared_pair("own", "linear", 0)
    with pytest.raises(PyargsError, match=message):
        Engine(policy, model).submit([3, 4], "ann", **wish)


def test_ways_to_decode_that_a_model_does_not_have_are_refused():
    policy, model = shared_pair("own", "linear", 0)
    lm = tiny_lm(dtype=torch.float32)
    with pytest.raises(PyargsError, match="answers by itself"):
        Engine(None, UserPolicy(lm, None), best_of=2)
    with pytest.raises(PyargsError, match="is for a reward model that guides"):
        Engine(policy, model, best_of=2).submit([3, 4], "ann", num_candidates="all")
    with pytest.raises(PyargsError, match="eos_reward is about the head of a RewardModel"):
        Engine(None, UserPolicy(lm, None), eos_reward="before")
    with pytest.raises(PyargsError, match="strength and reward_weight are for"):
        Engine(None, UserPolicy(lm, None)).submit([3, 4], reward_weight=1.0)


def test_backends_are_chosen_by_name(monkeypatch):
    policy, model = shared_pair("own", "linear", 0)
    with pytest.raises(PyargsError, match="float64"):
        Engine(policy, model, backend="cpu")
    with pytest.raises(PyargsError, match="backend is"):
        Engine(policy, model, backend="fast")
    with pytest.raises(PyargsError, match="one GPU"):
        Engine(policy, model, backend="cuda-graph")
    single = pair_in_float32("own")
    assert Engine(*single).backend == "cpu"
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    engine = Engine(*single, backend="cpu")
    assert engine.backend == "eager" and engine.generate([[3, 4]], ["ann"], reward_weight=1.0)[0].backend == "eager"


def test_who_leaves_in_another_thread_moves_nobody_elses_vectors(monkeypatch):
    """The last user's row moves into the gap: not between the look-up of rows and the reading of their vectors."""
    policy, model = pair_in_float32("own")
    first, *_, last = model.known_users
    (prompt,) = prompts([4])
    wish = dict(reward_weight=5.0, max_new_tokens=4)
    (want,) = Engine(policy, model).generate([prompt], [last], **wish)
    engine, fold = Engine(policy, model), args._folded
    thread = threading.Thread(target=pyargs.forget, args=(model, [first]))

    def and_meanwhile(head, user):
        thread.start()
        thread.join(0.2)
        return fold(head, user)

    monkeypatch.setattr(args, "_folded", and_meanwhile)
    (got,) = engine.generate([prompt], [last], **wish)
    thread.join()
    assert got.rewards == want.rewards and first not in model.known_users


def test_a_prompt_that_is_shortened_is_warned_of():
    policy, _ = pyargs.load_lm("tiny-random")
    model = reward_model(policy)
    model.about["max_length"] = 24
    engine = Engine(policy, model, tokenizer=policy.tokenizer)
    with pytest.warns(UserWarning, match="more than 24 tokens"):
        engine.submit("tell me about cats " * 20, "ann", reward_weight=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.submit("cats", "ann", reward_weight=1.0)


def test_a_slip_in_the_order_of_arguments_is_named():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    for call in (lambda: Engine(model, policy), lambda: Engine(model, "tiny-random"), lambda: Engine((policy, None), model)):
        with pytest.raises(PyargsError, match="the policy comes first"):
            call()
    with pytest.raises(PyargsError, match="token ids, not text"):
        Engine(policy, model).submit([3, 4], "ann", reward_weight=1.0, stop=["."])
    assert repr(model.known_users) == "<3 users: ann, bob, cid>"
