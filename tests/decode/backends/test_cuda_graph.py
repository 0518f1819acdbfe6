"""The captured step: on a GPU as a CUDA graph, on a CPU its operators recorded and replayed (tests/replay.py)."""

from __future__ import annotations

import types
import unittest.mock
import warnings

import pytest
import replay
import torch
from company import check_company, in_threads, wishes
from conftest import FULL_ATTENTION, reward_model, tiny_lm
from decoding import USERS, prompts, shared_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.backends import cuda_graph, eager
from pyargs.decode.engine import Engine
from pyargs.decode.rows import Rows
from pyargs.errors import PyargsError
from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.lm import lora
from pyargs.lm.structure import as_written
from pyargs.models.token_reward import TokenReward
from pyargs.types import Users

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = ["own", "shared", "shared lora"]


def vectors(**shapes) -> Users:
    return Users(USERS, **{name: torch.randn(3, *shape) for name, shape in shapes.items()})


HEADS = {
    "linear": lambda: linear.Head(32, 3, vectors(mixture=(3,)), softmax=True),
    "mlp": lambda: mlp.Head(32, 8, Users()),
    "personal mlp": lambda: mlp.Head(32, 8, vectors(bias=(8,)), activation="gelu", second=6),
    "distance": lambda: distance.Head(32, 32, 4, vectors(mixture=(4,))),
    "latent": lambda: latent.Head(32, 5, vectors(latent=(5,))),
    "user_mlp": lambda: user_mlp.Head(32, 8, ids=USERS),
}
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


def refusal_on_a_cpu(guide, *models, by_text: bool = False) -> str | None:
    return None if guide is not None and not by_text and as_written(*models) else "hooks, no reward, or one of texts"


@pytest.fixture(autouse=True, scope="module")
def without_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(cuda_graph, "capture", replay.capture)
            patch.setattr(cuda_graph, "refusal", refusal_on_a_cpu)
        yield


def captured(policy, model, room=4, **more) -> Engine:
    engine = Engine(policy.to(DEVICE), model.to(DEVICE), max_rows=room, **dict(backend="cuda-graph") | more)
    assert engine.backend == "cuda-graph"
    return engine


def recordings(engine: Engine) -> list:
    return list(engine._rows.recordings.values())


def ask(engine: Engine, lengths=(4, 2, 7), users=USERS, **more) -> list[tuple]:
    """Tokens, slots and rewards of all answers."""
    more = dict(reward_weight=2.0, num_candidates=5, max_new_tokens=9) | more
    answers = engine.generate(prompts(lengths), list(users)[: len(lengths)], **more)
    return [(one.tokens, one.slots, one.rewards) for one in answers]


def plain(policy, model, **more) -> list[tuple]:
    found = ask(Engine(policy, model, backend="eager", **more.pop("engine", {})), **more)
    return [(tokens, slots, pytest.approx(rewards, abs=2e-5, rel=2e-5)) for tokens, slots, rewards in found]


@settings(max_examples=25, deadline=None)
@given(
    wishes(),
    st.sampled_from(["linear", "mlp", "personal mlp"]),
    st.sampled_from(WEIGHTS),
    st.integers(0, 9),
    st.integers(1, 6),
    st.sampled_from([None, None, 1, 4]),
)
def test_rows_in_any_company_are_those_of_eager_passes(requests, head, weights, seed, room, part):
    """They come and go, are cancelled, are read in parts, and differ in all that one can ask; caches and buffers grow."""
    requests = [(*one[:2], one[2] | {"logprobs": 3 * (i % 2)}, *one[3:]) for i, one in enumerate(requests)]
    policy, model = shared_pair(weights, head, seed)
    with pytest.MonkeyPatch.context() as patch:
        for module in (cuda_graph, eager):
            patch.setattr(module, "PLACES", 4)
        check_company(
            lambda room: captured(policy, model, room, prefill_tokens=part),
            requests,
            room,
            alone=lambda room: Engine(policy, model, max_rows=room, backend="eager"),
        )


@settings(max_examples=15, deadline=None)
@given(wishes(clip=False), st.data(), st.integers(1, 6))
def test_rows_that_a_token_reward_guides_in_any_company(requests, data, room):
    """Some of them choose among all tokens."""
    for _, _, more, *_ in requests:
        if data.draw(st.booleans(), "among all tokens"):
            more["num_candidates"] = "all"
    policy, model = tiny_lm(), TokenReward(tiny_lm(seed=3), None)
    check_company(
        lambda room: captured(policy, model, room),
        requests,
        room,
        alone=lambda room: Engine(policy, model, max_rows=room, backend="eager"),
    )


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_families_and_attention(family, attention):
    policy, model = tiny_lm(family, attention=attention), reward_model(tiny_lm(family, seed=5, attention=attention))
    want = plain(tiny_lm(family), reward_model(tiny_lm(family, seed=5)))
    assert ask(captured(policy, model)) == want
    assert policy.config._attn_implementation == attention


@pytest.mark.parametrize("eos_reward", ["before", "state"])
def test_token_averages_and_rewards_of_stop_tokens(eos_reward):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3), head="mlp", pool="mean", step_reward="prefix_mean")
    more = dict(reward_weight=20.0, stop=list(range(1, 20)), max_new_tokens=20)
    want = plain(policy, model, engine=dict(eos_reward=eos_reward), **more)
    assert ask(captured(policy, model, eos_reward=eos_reward), **more) == want


def test_a_recording_serves_other_prompts_users_weights_temperatures_and_noise():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    engine, seen = captured(policy, model), []
    for more in (
        dict(reward_weight=2.0, seed=1, temperature=0.1),
        dict(reward_weight=[0.0, 1.0, 2.0], seed=2, temperature=1.0, users=["cid", "cid", "ann"]),
        dict(lengths=[30, 2, 5], reward_weight=0.5, seed=3, temperature=50.0, max_new_tokens=5, stop=[7]),
    ):
        assert ask(engine, **more) == plain(policy, model, **more)
        seen.append([id(one) for one in recordings(engine)])
    assert seen[0][:1] == seen[1][:1] and all(set(seen[0]) <= set(other) for other in seen[1:])


def test_rows_are_captured_in_few_numbers():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    engine = captured(policy, model, 5)
    for count in range(1, 6):
        lengths = [4, 2, 7, 1, 5][:count]
        more = dict(lengths=lengths, users=[USERS[i % 3] for i in range(count)], stop=[])
        assert ask(engine, **more) == plain(policy, model, **more)
    assert sorted({key[0] for key in engine._rows.recordings}) == [1, 2, 4, 5]


def test_recordings_are_few_and_the_one_used_last_is_kept():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    engine = captured(policy, model)
    run = lambda k: ask(engine, [4], ["ann"], num_candidates=k, max_new_tokens=2)  # noqa: E731
    run(1)
    (hot,) = recordings(engine)
    for k in range(2, cuda_graph.KEPT + 4):
        run(k)
        run(1)
    assert len(recordings(engine)) == cuda_graph.KEPT and any(one is hot for one in recordings(engine))


@pytest.mark.parametrize("head", HEADS)
def test_users_come_go_and_change_without_a_new_recording(head):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.head = HEADS[head]().to(DEVICE)
    engine = captured(policy, model)

    def agree(*users):
        more = dict(lengths=[4, 2], users=users, reward_weight=5.0, stop=[])
        assert ask(engine, **more) == plain(policy, model, **more)
        return [id(one) for one in recordings(engine)]

    first = agree("ann", "bob")
    if model.users.personal:
        running = engine.submit(prompts([3])[0], "cid", reward_weight=1.0, max_new_tokens=30)
        new = {name: torch.randn(1, *value.shape[1:], device=DEVICE) for name, value in model.users.vectors.items()}
        model.users.append(["dan"], **new)
        engine.cancel(running)
        assert agree("dan", "ann") == first
        model.users.remove(["ann"])
        assert agree("dan", "cid") == first
        for value in model.users.vectors.values():
            value.data.neg_()
    assert agree("dan", "cid") == first


def test_buffers_and_caches_that_grew_are_recorded_anew(monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    for module in (cuda_graph, eager):
        monkeypatch.setattr(module, "PLACES", 4)
    engine, seen = captured(policy, model), []
    for more in (dict(), dict(lengths=[20, 3, 4]), dict(stop=[3, 4, 5, 6]), dict(temperature=1.0, seed=1), dict()):
        assert ask(engine, **more) == plain(policy, model, **more)
        seen.append(recordings(engine)[-1])  # kept, so that no other takes its place in memory
    assert len({id(one) for one in seen}) == 5


def test_a_small_request_leaves_room_for_the_candidates_of_others(monkeypatch):
    """Each row of a step has the candidates of the one that asks for most."""
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    for module in (cuda_graph, eager):
        monkeypatch.setattr(module, "PLACES", 1)
    wanted = [
        (prompts([9])[0], "ann", dict(reward_weight=1.0, num_candidates=1, max_new_tokens=12, stop=[]), 0, None),
        (prompts([1])[0], "bob", dict(reward_weight=1.0, num_candidates=40, max_new_tokens=3, stop=[]), 9, None),
    ]
    check_company(lambda room: captured(policy, model, room), wanted, 2)
    check_company(lambda room: Engine(policy, model, max_rows=room, backend="eager"), wanted, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda policy, model: policy.lm_head.weight.detach().mul_(0.7),
        lambda policy, model: model.head.directions.data.mul_(2.0),
        lambda policy, model: setattr(model.head, "divisor", 3.0),
        lambda policy, model: setattr(model.backbone.layers[0].self_attn, "scaling", 2.0),
        lambda policy, model: setattr(policy.model.layers[1].mlp, "act_fn", torch.nn.Tanh()),
        lambda policy, model: lora.layers_of(model.backbone)[0].scaling.update(default=9.0),
    ],
)
def test_what_a_recording_keeps_of_the_models_is_looked_at(change):
    policy, model = shared_pair("shared lora", "linear", 0)
    engine = captured(policy, model)
    ask(engine)
    change(policy, model)
    with pytest.raises(PyargsError, match=r"engine\.refresh\(\)"):
        ask(engine)
    engine.refresh()
    assert ask(engine) == plain(policy, model)


def test_a_hook_is_called_after_refresh():
    policy, model = shared_pair("own", "linear", 0)
    engine, seen = captured(policy, model, backend="auto"), []
    want = ask(engine)
    policy.model.layers[1].register_forward_hook(lambda *a: seen.append(1))
    with pytest.raises(PyargsError, match=r"engine\.refresh\(\)"):
        ask(engine)
    engine.refresh()
    assert [one[:2] for one in ask(engine)] == [one[:2] for one in want]
    assert seen and engine.backend == "eager" and "hooks" in engine.reason


@torch.no_grad()
@pytest.mark.parametrize("weights", [*WEIGHTS, "token reward", "token reward, all tokens"])
def test_a_capture_leaves_running_rows_as_they_are(weights):
    tokenwise, everything = weights.startswith("token"), weights.endswith("all tokens")
    policy, model = shared_pair("own" if tokenwise else weights, "linear", 1)
    model = TokenReward(tiny_lm(seed=3), None) if tokenwise else model
    engine = captured(policy, model)
    for prompt in prompts([4, 6]):
        k = "all" if everything else 10
        engine.submit(prompt, "ann", reward_weight=1.0, num_candidates=k, max_new_tokens=20, stop=[])
    for _ in range(3):
        engine.step()
    steps = engine._rows
    choices = steps.flush()
    assert len(choices) == 3
    guided, caches = steps.rows, [half.cache for half in steps.rows.halves]

    def state():
        kept = [buffer.clone() for buffer in guided.rows.buffers.values()]
        prefixes = [
            states[row, :, :length].clone()
            for cache in caches
            for row, length in enumerate(cache.lengths)
            for layer in cache.layers
            for states in (layer.keys, layer.values)
        ]
        return [*kept, *prefixes, *(cache.length.clone() for cache in caches)]

    before = state()
    steps._record(4)
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    for cache in caches:  # prompt, and the three tokens that were followed
        assert cache.lengths == cache.length[: len(cache.lengths)].tolist()
        assert sorted(set(cache.lengths)) == [7, 9] and not cache.captured


@pytest.mark.parametrize("where", ["policy", "reward"])
def test_what_is_not_a_number_ends_its_row_and_leaves_nothing_behind(where):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    want = plain(policy, model, lengths=[4, 2], stop=[])
    engine = captured(policy, model)
    model.users.append(["nan"], mixture=torch.full((1, 3), torch.nan))
    unused = min(set(range(2, 61)) - {token for tokens, *_ in want for token in tokens} - {*sum(prompts([4, 2]), [])})
    if where == "policy":
        policy.get_input_embeddings().weight.data[unused] = torch.nan
    bad = engine.submit([unused], "ann" if where == "policy" else "nan", reward_weight=2.0)
    assert ask(engine, [4, 2], stop=[]) == want
    with pytest.raises(PyargsError, match=r"not numbers in row"):
        engine.answer(bad)
    assert ask(engine, [4, 2], stop=[]) == want  # in the same places
    engine.step()  # tells of what others computed
    assert not engine.busy


def test_a_weight_that_overflows_is_an_error():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.head.directions.data *= 1e4
    with pytest.raises(PyargsError, match=r"beyond float32.* lower reward_weight"):
        ask(captured(policy, model), reward_weight=3e38)


def test_choices_are_read_some_steps_later_and_at_once_where_a_row_reaches_its_length():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    engine = captured(policy, model)
    long = engine.submit(prompts([4])[0], "ann", reward_weight=1.0, max_new_tokens=12, stop=[])
    short = engine.submit(prompts([3])[0], "bob", reward_weight=1.0, max_new_tokens=6, stop=[])
    events = [engine.step() for _ in range(6)]
    assert [len(several) for several in events] == [0, 0, 0, 0, 2, 10]
    assert engine.answer(short).finish_reason == "length"
    engine.step()
    engine.cancel(long)  # with what was computed of it
    assert engine.busy and [event.number for event in engine.step()] == [long, long]  # a token and the end
    assert not engine.busy and len(engine.answer(long).tokens) == 7


@pytest.mark.parametrize("where", [(eager.Policy, "join"), (eager.Scorer, "join"), (Rows, "join"), (cuda_graph, "capture")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_recordings_are_lost_only_where_their_memory_makes_room(where, error):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    engine, counts = captured(policy, model), range(1, cuda_graph.KEPT + 1)
    run = lambda k: ask(engine, [4], ["ann"], num_candidates=k, max_new_tokens=3)  # noqa: E731
    want, before = [run(k) for k in counts], recordings(engine)
    with pytest.raises(error), pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, unittest.mock.Mock(side_effect=error))
        run(20)
    assert [id(one) for one in recordings(engine)] == [id(one) for one in before if error is KeyboardInterrupt]
    assert [run(k) for k in counts] == want


def test_steps_after_a_stop_are_padding():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    more = dict(stop=list(range(1, 40)), max_new_tokens=40)
    engine = captured(policy, model)
    assert ask(engine, **more) == plain(policy, model, **more)
    for prompt in prompts([2, 6]):
        engine.submit(prompt, "ann", reward_weight=1.0, **more)
    steps = 0
    while engine.busy:
        events = engine.step()
        steps += 1
    assert events[-1].answer.finish_reason == "stop"
    assert steps <= max(len(event.answer.tokens) for event in events if event.answer) + 1 + cuda_graph.CHUNK


def test_streams_of_several_threads_are_the_answers():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, users = prompts([3, 8, 1, 5]), [*USERS, "ann"]
    want = [
        one.tokens
        for one in Engine(policy, model, backend="eager").generate(rows, users, reward_weight=2.0, max_new_tokens=12)
    ]
    engine, found = captured(policy, model, 3), {}

    def listen(i: int) -> None:
        more = dict(reward_weight=2.0, max_new_tokens=12)
        *_, last = engine.stream(rows[i], users[i], **more)
        found[i] = last.answer.tokens

    in_threads(listen, len(rows))
    assert [found[i] for i in range(len(rows))] == want


def test_a_step_that_cannot_be_captured_falls_back_aloud(monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    want = plain(policy, model)

    def forbidden(step, device):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = captured(policy, model, backend="auto")
    running = engine.submit(prompts([5])[0], "bob", reward_weight=2.0, max_new_tokens=30, stop=[])
    engine.step()
    monkeypatch.setattr(cuda_graph, "capture", forbidden)
    with pytest.warns(UserWarning, match="cannot be captured.*not permitted") as caught:
        assert ask(engine) == want
    assert len(caught) == 1 and engine.backend == "eager" and "not permitted" in engine.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(engine) == want
    while engine.busy:
        engine.step()
    answer = engine.answer(running)
    (alone,) = Engine(policy, model, backend="eager").generate(
        prompts([5]), ["bob"], reward_weight=2.0, max_new_tokens=30, stop=[]
    )
    assert answer.tokens == alone.tokens and answer.backend == "eager"
    with pytest.raises(PyargsError, match="cannot be captured"):
        ask(captured(policy, model))


def test_models_are_as_before_a_recording():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    x = torch.tensor([[3, 4, 5]], device=DEVICE)
    before = policy.to(DEVICE)(x).logits
    ask(captured(policy, model))
    assert torch.equal(policy(x).logits, before) and "forward" not in vars(policy.model.norm)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_graph_reads_no_memory_that_was_freed(head, weights, monkeypatch):
    policy, model = shared_pair(weights, "linear", 1)
    model.head = HEADS[head]().to(DEVICE)
    engine, found = captured(policy, model), []

    def capture(step, device):
        replay.freed(step, device, found)
        return lambda: engine._rows.rows.rows["chosen"][:, -1].fill_(1.0)  # it computes nothing, and all rows end

    monkeypatch.setattr(cuda_graph, "capture", capture)
    ask(engine)
    ask(engine, lengths=[5, 1, 2], users=["cid", "bob", "bob"])
    assert len(found) == len(recordings(engine))
    for recorder in found:
        assert len(recorder.foreign) > 20 and replay.dead(recorder) == []


def test_what_is_not_captured_is_said(monkeypatch):
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    on_cpu = types.SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.undo()
    refusal = REFUSAL
    assert "one GPU" in refusal(None, on_cpu) and "one GPU" in refusal(on_cpu, on_gpu, on_gpu)
    assert "a reward guides" in refusal(None, on_gpu)
    assert "texts, which the host makes" in refusal(on_gpu, on_gpu, by_text=True)
    monkeypatch.setattr(cuda_graph, "refusal", lambda *models, by_text: "of some reason")
    policy = tiny_lm()
    for model in (None, TokenReward(tiny_lm(seed=3), None), reward_model(tiny_lm(seed=3))):
        assert Engine(policy, model).backend == "eager"
        with pytest.raises(PyargsError, match="of some reason"):
            Engine(policy, model, backend="cuda-graph")


def test_logits_that_the_host_is_to_change_are_refused_before_anything_is_computed():
    engine = captured(tiny_lm(), reward_model(tiny_lm(seed=3)))
    first = engine.submit([5, 6], "ann", reward_weight=1.0, num_candidates=3, max_new_tokens=3, stop=[])
    with pytest.raises(PyargsError, match="no place for adjust: make the engine with backend='eager'"):
        engine.submit([5, 6], "ann", reward_weight=1.0, adjust=lambda rows, logits: logits)
    while engine.busy:
        engine.step()
    assert len(engine.answer(first).tokens) == 3


REFUSAL = cuda_graph.refusal  # that of the module, not the fixture's


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_generate_on_a_gpu_replays_without_a_warning(weights, dtype):
    policy, model = shared_pair(weights, "linear", 1)
    engine = captured(policy.to("cuda", dtype), model.to("cuda", dtype), backend="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = ask(engine)
        count = len(recordings(engine))
        assert ask(engine) == one and len(recordings(engine)) == count


@cuda
def test_a_refused_capture_leaves_the_gpu_usable(monkeypatch):
    policy, model = (part.to(DEVICE) for part in (tiny_lm(), reward_model(tiny_lm(seed=3))))
    want = plain(policy, model)
    real = cuda_graph.Guided.choose
    monkeypatch.setattr(
        cuda_graph.Guided,
        "choose",
        lambda self: (real(self), torch.ones(1, device="cuda").item() if self.rows.width else 0)[0],
    )
    with pytest.raises(PyargsError, match="cannot be captured"):
        ask(captured(policy, model))
    monkeypatch.setattr(cuda_graph.Guided, "choose", real)
    torch.randn(3, device="cuda").sum().item()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert ask(captured(policy, model)) == want
