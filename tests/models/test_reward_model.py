"""Heads, users and reward models: what is folded, saved and padded must not change a number."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, reward_model, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyargs.data.synthetic import tiny_lm as saved_lm
from pyargs.errors import PyargsError, UnknownUser
from pyargs.heads import linear, mlp
from pyargs.lm import lora
from pyargs.lm.cache import cache_name, can_branch
from pyargs.lm.forward import packed_states, spans
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, encode_response, pack
from pyargs.models.reward_model import RewardModel
from pyargs.ops import score_select
from pyargs.scoring import response_logprobs, response_states
from pyargs.types import Batch, Features, Users

HEADS = ("linear", "mlp", "personal mlp")


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), k=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_folded_head_gives_the_same_rewards(kind, rows, k, seed):
    head = reward_model(tiny_lm(), head=kind).head
    torch.manual_seed(seed)
    hidden, user = torch.randn(rows, k, 32), torch.randint(0, 3, (rows,))
    folded = head.fold()
    _, _, reward, _ = score_select(
        folded.features(hidden, user),
        folded.weight,
        user,
        torch.ones(rows),
        torch.zeros(rows, k),
        torch.arange(k).expand(rows, k),
        torch.zeros(rows, dtype=torch.bool),
        bias=folded.bias,
        activation=folded.activation,
    )
    torch.testing.assert_close(reward, head(hidden, user.unsqueeze(1).expand(rows, k)), atol=2e-5, rtol=2e-5)


def test_no_head_has_an_output_bias():
    """A constant has no gradient under Bradley-Terry, so its random start value would stay and count once per token."""
    for head in (linear.Head(4, 1, Users()), mlp.Head(4, 3, Users()), mlp.Head(4, 3, Users(), second=2)):
        assert head(torch.zeros(1, 4), torch.tensor([0])).isfinite()
        assert not any(name.startswith("last.bias") for name, _ in head.named_parameters())
    assert linear.Head(4, 1, Users())(torch.zeros(1, 4), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("pool", ["last", "mean", "hidden"])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_only_tokens_reach_a_head(pool, lengths, seed):
    """Values and gradients are those of each pair alone, without padding; what stands in the padding is never seen."""
    torch.manual_seed(seed)
    count = torch.tensor(lengths)
    features = Features(
        torch.randn(int(count.sum()), 32),
        torch.cat([torch.zeros(1, dtype=torch.long), count.flatten().cumsum(0)]),
        torch.arange(len(count)) * 2,
        torch.arange(len(count)) * 2 + 1,
        ["x"] * len(count),
    )
    user, seen = torch.randint(0, 3, (len(count),)), []
    model = reward_model(tiny_lm(), head="personal mlp", pool=pool)
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    batch = features.batch(user, last=False)
    assert torch.equal(batch.mask.sum(-1), count) and torch.equal(batch.hidden[batch.mask], features.hidden)
    batch.hidden[~batch.mask] = float("nan") if pool != "hidden" else 1e9
    values = model.rewards(batch)
    assert seen == [(count.sum() if pool == "mean" else count.numel(), 32)]
    (gradient,) = torch.autograd.grad(values.diff().sum(), model.head.first.weight)
    alone = [model.rewards(features.batch(user, torch.tensor([i]), last=False)) for i in range(len(count))]
    torch.testing.assert_close(values, torch.cat(alone))
    (expected,) = torch.autograd.grad(torch.cat(alone).diff().sum(), model.head.first.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(PyargsError, match="without a token"):
        model.rewards(Batch(batch.hidden, torch.zeros_like(batch.mask), user))


def test_a_constant_moves_the_papers_policy_accuracy_only():
    from pyargs.metrics.policy_accuracy import PairScores, policy_accuracy
    from pyargs.metrics.rm_accuracy import rm_accuracy

    torch.manual_seed(0)
    length = torch.randint(1, 30, (200, 2))
    base = PairScores(torch.randn(200, 2).double() * 5, torch.randn(200, 2).double(), length, torch.randn(200, 2), ["u"] * 200)
    c, w = 3.0, 0.7
    moved = PairScores(base.logprob, base.step_reward + c * length, length, base.reward + c, base.users)
    before = policy_accuracy(base, w, centre=base.mean_step_reward())
    after = policy_accuracy(moved, w, centre=moved.mean_step_reward())
    assert rm_accuracy(base.reward, base.users) == rm_accuracy(moved.reward, moved.users)
    assert before["all"] == after["all"]
    assert before["paper"] != after["paper"]
    assert before["centred"]["accuracy"] == pytest.approx(after["centred"]["accuracy"], abs=0.51)


def test_users():
    users = Users(["ann", "bob"], mixture=torch.zeros(2, 3))
    assert users.rows(["bob", "ann", "bob"]).tolist() == [1, 0, 1]
    with pytest.raises(UnknownUser, match="Did you mean: ann"):
        users.rows(["anna"])
    users.append(["cid"], mixture=torch.ones(1, 3))
    assert users.rows(["cid"]).tolist() == [2] and users.vectors["mixture"][2].tolist() == [1, 1, 1]
    for ids, vectors in [
        (["ann"], {"mixture": torch.zeros(1, 3)}),
        (["d", "d"], {"mixture": torch.zeros(2, 3)}),
        (["d"], {"mixture": torch.zeros(1, 4)}),
        (["d"], {"other": torch.zeros(1, 3)}),
    ]:
        with pytest.raises(PyargsError):
            users.append(ids, **vectors)
    with pytest.raises(PyargsError):
        Users(["a", "a"], mixture=torch.zeros(2, 3))
    assert Users().rows(["anyone"]).tolist() == [0]


@pytest.mark.parametrize("family", FULL_ATTENTION)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_a_packed_pass_equals_one_pass_per_response(family, lengths, seed):
    lm = tiny_lm(family)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 61, (n,), generator=generator).tolist()  # noqa: E731
    groups = [(draw(3 + len(several)), [draw(n) for n in several]) for several in lengths]
    states, logprobs = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups, max_tokens=24)
    for (prompt, several), ours, logs in zip(groups, states, logprobs, strict=True):
        for response, state, log in zip(several, ours, logs, strict=True):
            ids = torch.tensor([prompt + response])
            full = lm.get_decoder()(ids).last_hidden_state[0]
            torch.testing.assert_close(state, full[len(prompt) :].float(), atol=2e-5, rtol=2e-5)
            want = lm(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1))
            torch.testing.assert_close(log, want.squeeze(1).float(), atol=2e-5, rtol=2e-5)


def test_models_that_cannot_branch_get_a_row_for_each_response():
    for family in ("mistral", "mamba"):
        lm = tiny_lm(family)
        groups = [([5, 6, 7, 8, 9, 10, 11], [[3, 4], [9, 9, 9]]), ([4], [[8]])]
        for (prompt, several), ours in zip(groups, response_states(lm.get_decoder(), groups), strict=True):
            for response, state in zip(several, ours, strict=True):
                full = lm.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0]
                torch.testing.assert_close(state, full[len(prompt) :].float(), atol=1e-5, rtol=1e-5)


class Takes:
    """Models by what their `forward` calls a cache."""

    class Today:
        def forward(self, input_ids, cache=None, past_key_values=None): ...

    class Before:
        def forward(self, input_ids, past_key_values=None): ...

    class StateSpace:
        def forward(self, input_ids, cache_params=None): ...

    class Wrapped:
        def forward(self, *args, **kwargs): ...


def test_a_cache_goes_by_the_name_that_the_model_has_for_it():
    names = {Takes.Today: "cache", Takes.Before: "past_key_values", Takes.StateSpace: "cache_params"}
    assert {kind: cache_name(kind()) for kind in names} == names
    with pytest.raises(PyargsError, match=r"Wrapped.forward takes no cache"):
        cache_name(Takes.Wrapped())
    # What transformers has today: without its name the cache would be left out, and every token would be read alone.
    assert all(can_branch(tiny_lm(family)) for family in FULL_ATTENTION)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_pooling_reads_response_tokens_only(pool):
    lm = tiny_lm()
    model = reward_model(lm, head="mlp", pool=pool)
    packed = pack([[5, 6, 7]], [[[8, 9, 1], [4]]])  # 1 is the pad id too: masks never come from ids
    batch = model(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), **vars(packed))
    got = model.rewards(batch)[0].tolist()
    for response, value in zip([[8, 9, 1], [4]], got, strict=True):
        states = model.backbone(torch.tensor([[5, 6, 7, *response]])).last_hidden_state[0, 3:]
        rewards = model.head(states, torch.zeros(len(response), dtype=torch.long))
        want = rewards[-1] if pool == "last" else rewards.mean()
        assert value == pytest.approx(want.item(), abs=1e-5)


@pytest.fixture
def on_disk(tmp_path):
    folder = saved_lm(tmp_path / "lm", seed=1)
    lm, tokenizer = load_lm(str(folder))
    return str(folder), lm, tokenizer


def make(folder, lm, tokenizer, kind="linear", with_lora=True):
    from pyargs.lm.loading import fingerprint

    backbone, dim = lm.get_decoder(), lm.config.hidden_size
    torch.manual_seed(0)
    users = Users(["ann", "bob"], mixture=torch.randn(2, 3)) if kind == "linear" else Users()
    head = linear.Head(dim, 3, users, softmax=True, divisor=100.0) if kind == "linear" else mlp.Head(dim, 6, users, second=4)
    config = {"method": "lore", "backbone": folder, "dtype": "float32", "fingerprint": fingerprint(backbone), "fields": {}}
    model = RewardModel(backbone, tokenizer, head, pool="last" if kind == "linear" else "mean", about=config)
    if with_lora:
        lora.add(backbone, rank=4, alpha=8, rslora=True, target_modules=None)
        for name, parameter in backbone.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def some_batch(model) -> Batch:
    packed = pack([[5, 6, 7], [9, 9]], [[[8, 9, 1], [4]], [[3], [3, 4]]])
    with torch.no_grad():
        return model(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0, 0]), **vars(packed))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_save_and_load_give_the_same_rewards(on_disk, tmp_path, kind, with_lora):
    model = make(*on_disk, kind=kind, with_lora=with_lora)
    model.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm")
    one, two = some_batch(model), some_batch(again)
    assert torch.equal(model.rewards(one), again.rewards(two)) and one.hidden.abs().sum() > 0
    assert again.about == model.about and again.pool == model.pool and again.users.ids == model.users.ids
    assert (tmp_path / "rm/README.md").read_text().startswith("---\nlibrary_name: pyargs")
    assert not list((tmp_path / "rm").glob("*.bin")) and not list((tmp_path / "rm").glob("*.pt"))
    lm, tokenizer = load_lm(on_disk[0])
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    shared = RewardModel.from_pretrained(tmp_path / "rm", backbone=lm.get_decoder(), tokenizer=tokenizer)
    assert torch.equal(shared.rewards(some_batch(shared)), model.rewards(one))
    memory = {p.data_ptr() for p in shared.backbone.parameters()}
    assert {p.data_ptr() for p in lm.get_decoder().parameters()} <= memory
    shared.merge()
    assert lm.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@pytest.mark.parametrize("file", ["shared.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_missing_or_unexpected_key_raises(on_disk, tmp_path, file, change):
    make(*on_disk).save_pretrained(tmp_path / "rm")
    values = load_file(tmp_path / "rm" / file)
    if change == "missing":
        values.pop(next(iter(values)))
    else:
        values["extra"] = torch.zeros(1)
    save_file(values, tmp_path / "rm" / file)
    with pytest.raises(PyargsError, match=change):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_another_backbone_is_refused(on_disk, tmp_path):
    make(*on_disk).save_pretrained(tmp_path / "rm")
    saved_lm(tmp_path / "lm", seed=2)  # same place and shape, other weights
    with pytest.raises(PyargsError, match="not those that this model was trained on"):
        RewardModel.from_pretrained(tmp_path / "rm")
    with pytest.raises(PyargsError, match="neither a local folder"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


def test_prompts_are_cut_in_their_content_only(on_disk):
    _, _, tokenizer = on_disk
    text = " ".join(["word"] * 200)
    full = encode_prompt(tokenizer, text)
    cut = encode_prompt(tokenizer, text, 60)
    assert len(cut) <= 60 < len(full)
    frame = encode_prompt(tokenizer, "word")
    assert cut[:5] == frame[:5] and cut[-5:] == frame[-5:]  # the template is whole
    with pytest.raises(PyargsError, match="no room"):
        encode_prompt(tokenizer, text, 3)
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "old " * 40},
        {"role": "assistant", "content": "reply " * 40},
        {"role": "user", "content": "the question"},
    ]
    short = tokenizer.decode(encode_prompt(tokenizer, chat, 120))
    assert "be kind" in short and "the question" in short and "old" not in short and "reply" not in short


def test_content_must_be_text(on_disk):
    _, _, tokenizer = on_disk
    with pytest.raises(PyargsError, match="must be a str, got list"):
        encode_prompt(tokenizer, [{"role": "user", "content": ["a", "b"]}])
    with pytest.raises(PyargsError, match="must be a str, got list"):
        encode_response(tokenizer, ["a"])
    with pytest.raises(PyargsError, match="no tokens"):
        encode_response(tokenizer, "")


def test_spans_of_predicting_states():
    lm = tiny_lm()
    packed = pack([[5, 6, 7]], [[[8, 9], [4, 3, 2]]])
    states = packed_states(lm.get_decoder(), packed)
    predicting, mask = spans(states, packed, predicting=True)
    assert mask.sum(1).tolist() == [2, 3]
    assert torch.equal(predicting[0, 0], states[0, 2]) and torch.equal(predicting[1, 0], states[0, 2])
    assert torch.equal(predicting[1, 2], states[0, 6])


def test_names_on_the_hub(on_disk, tmp_path, monkeypatch):
    """No hub is needed for the test: its download is a folder."""
    import huggingface_hub

    make(*on_disk).save_pretrained(tmp_path / "rm")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(tmp_path / "rm"))
    model = RewardModel.from_pretrained("someone/their-model")
    assert asked == ["someone/their-model"] and list(model.users.ids) == ["ann", "bob"]
    with pytest.raises(PyargsError, match="cannot load the model 'someone/no-such-model'"):
        load_lm("someone/no-such-model")


def test_lora_beside_a_bfloat16_backbone_survives_saving(on_disk, tmp_path):
    folder, *_ = on_disk
    lm, tokenizer = load_lm(folder, dtype="bfloat16")
    model = make(folder, lm, tokenizer)
    model.about["dtype"] = "bfloat16"
    model.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm")
    assert torch.equal(some_batch(model).hidden, some_batch(again).hidden)
    assert all(p.dtype == torch.float32 for name, p in again.backbone.named_parameters() if "lora_" in name)


def test_user_vectors_must_fit_the_head(on_disk, tmp_path):
    make(*on_disk, with_lora=False).save_pretrained(tmp_path / "rm")
    file = tmp_path / "rm/users.safetensors"
    for broken in (
        {"mixture": torch.zeros(2, 4)},
        {"other": torch.zeros(2, 3)},
        {"mixture": torch.zeros(2, 3), "x": torch.zeros(2, 1)},
    ):
        save_file(broken, file)
        with pytest.raises(PyargsError, match="does not fit"):
            RewardModel.from_pretrained(tmp_path / "rm")
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(PyargsError, match="missing or damaged"):
        RewardModel.from_pretrained(tmp_path / "rm")
    file.unlink()
    with pytest.raises(PyargsError, match="missing or damaged"):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_merged_lora_gives_the_same_rewards_and_can_still_be_saved(on_disk, tmp_path):
    model = make(*on_disk)
    before = some_batch(model).hidden
    after = some_batch(model.merge()).hidden
    torch.testing.assert_close(before, after, atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm")
    torch.testing.assert_close(some_batch(again).hidden, before, atol=2e-5, rtol=2e-5)


def test_many_responses_to_one_prompt_go_to_several_rows(monkeypatch):
    """The prompt is repeated where a row would get too long, pairs stay together, and nothing changes."""
    from pyargs.lm import forward

    lm = tiny_lm()
    groups = [([5, 6, 7], [[n, n + 1, 3] for n in range(8)]), ([9] * 20, [[4, 4], [5]]), ([], [[1, 2], [3]])]
    whole, logs = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups[:2])
    monkeypatch.setattr(forward, "ROW", 12)
    rows = [len(packed.input_ids) for _, packed in forward.batches(groups, lm.get_decoder(), 1, "rows")]
    assert rows == [1] * 5  # 8 responses of 3 tokens in rows of three, behind a prompt of 3; each of the others in one
    for one, two in zip(whole, response_states(lm.get_decoder(), groups), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    for one, two in zip(logs, response_logprobs(lm, groups[:2]), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
