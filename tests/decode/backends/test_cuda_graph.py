"""The captured step: on a GPU as a CUDA graph, on a CPU its operators recorded and replayed (tests/replay.py)."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import replay
import torch
from conftest import FULL_ATTENTION, reward_model, tiny_lm
from decoding import USERS, arguments, plain, prompts, requests, same, shared_pair
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import pyargs
from pyargs.decode.answer import CHUNK, Output
from pyargs.decode.backends import cuda_graph
from pyargs.decode.request import check
from pyargs.errors import PyargsError
from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.lm import lora
from pyargs.lm.tokenize import left_pad
from pyargs.types import Users

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture(autouse=True, scope="module")
def without_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(cuda_graph, "capture", replay.capture)
        yield


def recorded(policy, model, rows, users, **changes):
    ids, mask = left_pad(rows, pad_id=1)
    policy, model = policy.to(DEVICE), model.to(DEVICE)
    decoded = cuda_graph.decode(policy, model, check(policy, model, ids, mask, users, **arguments(**changes)))
    assert decoded is not None
    return decoded


@settings(max_examples=25, deadline=None)
@given(request=requests(most=6))
def test_like_the_reference(request):
    *batch, changes = request
    same(recorded(*batch, **changes), plain(*batch, **changes))


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_families_and_attention(family, attention):
    policy, model = tiny_lm(family, attention=attention), reward_model(tiny_lm(family, seed=5, attention=attention))
    rows = prompts([4, 1, 9])
    want = plain(tiny_lm(family), reward_model(tiny_lm(family, seed=5)), rows, USERS)
    same(recorded(policy, model, rows, USERS), want)
    assert policy.config._attn_implementation == attention


def test_token_averages():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3), head="mlp", pool="mean", step_reward="prefix_mean")
    changes = dict(reward_weight=20.0, eos_token_id=[])
    same(recorded(policy, model, prompts([5]), ["x"], **changes), plain(policy, model, prompts([5]), ["x"], **changes))


def test_a_recording_serves_other_prompts_users_weights_and_noise():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    asked = [
        ([4, 2, 7], USERS, dict(reward_weight=2.0, seed=1)),
        ([1, 9, 3, 3], ["cid", "cid", "ann", "bob"], dict(reward_weight=[0.0, 1.0, 2.0, 3.0], seed=2)),
        ([30, 2, 5], ["bob"] * 3, dict(reward_weight=0.5, seed=3, max_new_tokens=5)),
    ]
    for lengths, users, changes in asked:
        rows = prompts(lengths, 7)
        changes["do_sample"] = True
        same(recorded(policy, model, rows, users, **changes), plain(policy, model, rows, users, **changes))
    assert len(cuda_graph.recordings[model]) == 1


def test_recordings_are_few_and_go_with_their_model():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    for k in range(1, cuda_graph.KEPT + 3):
        recorded(policy, model, prompts([4]), ["ann"], num_candidates=k, max_new_tokens=2)
    assert len(cuda_graph.recordings[model]) == cuda_graph.KEPT
    before = len(cuda_graph.recordings)
    del model
    gc.collect()
    assert len(cuda_graph.recordings) < before


def test_a_changed_head_is_recorded_anew_and_changed_weights_are_seen():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([4, 2])
    recorded(policy, model, rows, USERS[:2])
    with torch.no_grad():
        model.head.directions.mul_(-2.0)
        policy.lm_head.weight.mul_(0.7)
    same(recorded(policy, model, rows, USERS[:2]), plain(policy, model, rows, USERS[:2]))


@pytest.mark.parametrize("head", HEADS)
def test_users_come_go_and_change_without_a_new_recording(head):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.head = HEADS[head]()
    rows, changes = prompts([4, 2]), dict(reward_weight=5.0)

    def agree(*users):
        same(recorded(policy, model, rows, users, **changes), plain(policy, model, rows, users, **changes))
        return len(cuda_graph.recordings[model]), id(next(iter(cuda_graph.recordings[model].values())))

    first = agree("ann", "bob")
    if model.users.personal:
        new = {name: torch.randn(1, *value.shape[1:]) for name, value in model.users.vectors.items()}
        model.users.append(["dan"], **new)
        assert agree("dan", "ann") == first
        model.users.remove(["ann"])
        assert agree("dan", "cid") == first
        for value in model.users.vectors.values():
            value.data.neg_()
    assert agree("dan", "cid") == first


def test_what_a_recording_keeps_of_head_and_modules_is_looked_at():
    """Numbers that were written to through `data`, and attributes that are no tensors."""
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, seen = prompts([4, 2]), []

    def agree():
        got = recorded(policy, model, rows, USERS[:2], reward_weight=2.0)
        same(got, plain(policy, model, rows, USERS[:2], reward_weight=2.0))
        seen.append(got.rewards.tolist())

    agree()
    model.head.directions.data[0, 0] += 5.0
    agree()
    model.head.divisor = 3.0
    agree()
    model.backbone.layers[0].self_attn.scaling = 2.0
    agree()
    policy.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    agree()
    assert all(one != other for one, other in zip(seen, seen[1:], strict=False))
    policy.model.layers[1].register_forward_hook(lambda *a: None)
    assert not cuda_graph.possible(policy, model)


@pytest.mark.parametrize("where", ["policy", "reward"])
def test_what_is_not_a_number_raises_and_leaves_nothing_behind(where):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, users = prompts([4, 2, 3]), USERS
    want = plain(policy, model, rows, users)
    broken = policy.lm_head if where == "policy" else model.backbone.norm
    sound = broken.weight.detach().clone()
    recorded(policy, model, rows, users)
    broken.weight.data[...] = float("nan")
    with pytest.raises(PyargsError, match=r"not numbers in row\(s\) \[0, 1, 2\]"):
        recorded(policy, model, rows, users)
    broken.weight.data[...] = sound
    same(recorded(policy, model, rows, users), want)  # in the same caches


def test_steps_after_the_last_stop_write_padding_only(monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, changes = prompts([2, 6, 4]), dict(eos_token_id=list(range(1, 40)), pad_token_id=50, max_new_tokens=40)
    want = plain(policy, model, rows, USERS, **changes)
    seen = []
    real = Output.__init__
    monkeypatch.setattr(Output, "__init__", lambda self, *a: (real(self, *a), setattr(self, "late", True))[0])
    same(recorded(policy, model, rows, USERS, **changes, token_callback=lambda t: seen.append(t.tolist())), want)
    last = int(want.lengths.max())  # index of the last stop token
    assert last + 1 < len(seen) <= last + 1 + 2 * CHUNK
    assert all(tokens == [50, 50, 50] for tokens in seen[last + 1 :])


def test_a_step_that_cannot_be_captured_falls_back_with_one_warning(monkeypatch):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    ids, mask = left_pad(prompts([4, 2]), pad_id=1)

    def forbidden(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "capture", forbidden)
    monkeypatch.setattr(cuda_graph, "possible", lambda policy, model: model not in cuda_graph.refused)
    with pytest.warns(UserWarning, match="cannot be captured.*not permitted") as caught:
        got = pyargs.generate(policy, model, ids, mask, USERS[:2], **arguments())
    assert len(caught) == 1
    same(got, plain(policy, model, prompts([4, 2]), USERS[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(pyargs.generate(policy, model, ids, mask, USERS[:2], **arguments()), got)


class Launches(TorchDispatchMode):
    """Counts operators that work (views do not); the norm, which a CPU has no single operator for, as one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        views = ("view", "_unsafe_view", "expand", "transpose", "slice", "unsqueeze", "squeeze", "select", "split", "t")
        self.count += name not in (*views, "split_with_sizes", "alias", "detach")
        self.count -= 5 * (name == "rsqrt")  # x, squared, its mean, plus epsilon, 1 / root, times x, times weight
        return function(*args, **(kwargs or {}))


def launches(layers: int, monkeypatch) -> int:
    """Operators of a step of one pass."""
    policy = tiny_lm("qwen2", layers=layers, dtype=torch.float32)
    counted = Launches()

    def counting(step, device):
        with counted:
            step()
        return step

    monkeypatch.setattr(cuda_graph, "capture", counting)
    recorded(policy, reward_model(policy), prompts([4, 1]), USERS[:2])
    return counted.count


def test_a_layer_takes_few_launches(monkeypatch):
    few = (launches(6, monkeypatch) - launches(2, monkeypatch)) / 4
    monkeypatch.setattr(cuda_graph, "few_launches", lambda *models: contextlib.nullcontext())
    many = (launches(6, monkeypatch) - launches(2, monkeypatch)) / 4
    assert few <= 21 < 30 <= many


def test_models_are_as_before_a_recording():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    x = torch.tensor([[3, 4, 5]], device=DEVICE)
    before = policy.to(DEVICE)(x).logits
    recorded(policy, model, prompts([4]), ["ann"])
    assert torch.equal(policy(x).logits, before) and "forward" not in vars(policy.model.norm)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
def test_a_graph_reads_no_memory_that_was_freed(head, weights, monkeypatch):
    policy, model = shared_pair(weights, "linear", 1)
    model.head = HEADS[head]()
    found: list[replay.Recorder] = []
    monkeypatch.setattr(cuda_graph, "capture", lambda step, device: replay.freed(step, device, found))
    cuda_graph.decode(policy, model, request_for(policy, model))
    assert len(found[0].foreign) > 20 and replay.dead(found[0]) == []


def request_for(policy, model, **changes):
    ids, mask = left_pad(prompts([4, 2, 3]), pad_id=1)
    return check(policy, model, ids, mask, USERS, **arguments(**changes))


def test_threads_do_not_share_a_recording():
    policy, model = (part.to(DEVICE) for part in (tiny_lm(), reward_model(tiny_lm(seed=3))))
    asked = [(prompts([n, 3], n), [USERS[n % 3], "ann"]) for n in range(1, 9)]
    wanted = [plain(policy, model, *one).tokens.tolist() for one in asked]
    if DEVICE == "cuda":
        pytest.skip("a capture in one thread forbids synchronous calls in others")
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda one: recorded(policy, model, *one).tokens.tolist(), asked * 3))
    assert got == wanted * 3


def test_a_callback_may_decode_with_the_same_model():
    policy, model = (part.to(DEVICE) for part in (tiny_lm(), reward_model(tiny_lm(seed=3))))
    rows, inner = prompts([4, 2]), []
    want, other = plain(policy, model, rows, USERS[:2]), plain(policy, model, prompts([5, 5]), USERS[1:])
    callback = lambda _: inner.append(recorded(policy, model, prompts([5, 5]), USERS[1:]))  # noqa: E731
    same(recorded(policy, model, rows, USERS[:2], token_callback=callback), want)
    for one in inner:
        same(one, other)


def test_what_a_recording_is_for():
    """Whatever changes the tokens and is not in the buffers makes another recording."""
    policy, model = shared_pair("shared lora", "linear", 0)
    rows = prompts([4, 2])

    def agree(policy=policy, **changes):
        got = recorded(policy, model, rows, USERS[:2], **changes)
        same(got, plain(policy, model, rows, USERS[:2], **changes))
        return got.tokens.tolist()

    first = agree(num_candidates=3)
    assert agree(num_candidates=3, pad_token_id=50, eos_token_id=list(range(1, 40))) != first
    assert agree(num_candidates=3, eos_reward="state", eos_token_id=list(range(1, 40)))
    one, two = (agree(num_candidates=3, do_sample=True, temperature=t) for t in (0.1, 50.0))
    assert one != two
    with lora.disabled(model.backbone):
        agree(num_candidates=3)
    for layer in lora.layers_of(model.backbone):
        layer.scaling["default"] *= -3.0
    agree(num_candidates=3)
    other = tiny_lm("llama", seed=0).to(DEVICE)  # shares its weights with the first, but turns its keys otherwise
    for name, parameter in policy.named_parameters():
        other.get_parameter(name).data = parameter.data
    other.model.rotary_emb.inv_freq = other.model.rotary_emb.inv_freq * 0.1
    agree(other, num_candidates=3)


def test_a_recording_ends_with_its_policy():
    model, rows = reward_model(tiny_lm(seed=3)), prompts([4, 2])
    for seed in (7, 8):
        policy = tiny_lm(seed=seed)
        same(recorded(policy, model, rows, USERS[:2]), plain(policy, model, rows, USERS[:2]))
        alive = weakref.ref(policy)
        del policy
        gc.collect()
        if DEVICE == "cuda":
            assert alive() is None


def test_the_recording_used_last_is_kept():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    run = lambda k: recorded(policy, model, prompts([4]), ["ann"], num_candidates=k, max_new_tokens=2)  # noqa: E731
    run(1)
    hot = next(iter(cuda_graph.recordings[model].values()))
    for k in range(2, cuda_graph.KEPT + 4):
        run(k)
        run(1)
    assert any(one is hot for one in cuda_graph.recordings[model].values())


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
def test_generate_on_a_gpu_replays_without_a_warning(weights, dtype):
    policy, model = shared_pair(weights, "linear", 1)
    policy, model = policy.to("cuda", dtype), model.to("cuda", dtype)
    ids, mask = left_pad(prompts([4, 1, 9]), pad_id=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (pyargs.generate(policy, model, ids.cuda(), mask.cuda(), USERS, **arguments()) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens) and len(cuda_graph.recordings[model]) == 1


@cuda
def test_a_refused_capture_leaves_the_gpu_usable(monkeypatch):
    policy, model = (part.to(DEVICE) for part in (tiny_lm(), reward_model(tiny_lm(seed=3))))
    real = cuda_graph.choose
    monkeypatch.setattr(cuda_graph, "choose", lambda *a: (real(*a), torch.ones(1, device="cuda").item())[0])
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert cuda_graph.decode(policy, model, request_for(policy, model)) is None
    monkeypatch.setattr(cuda_graph, "choose", real)
    torch.randn(3, device="cuda").sum().item()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    cuda_graph.refused.clear()
    same(recorded(policy, model, prompts([4]), ["ann"]), plain(policy, model, prompts([4]), ["ann"]))
