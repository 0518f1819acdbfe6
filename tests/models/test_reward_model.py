"""Reward models: padding, merging, saving and loading change no number, and a folder that misses something is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyargs.data.synthetic import tiny_lm as saved_lm
from pyargs.errors import PyargsError
from pyargs.heads import linear, mlp
from pyargs.lm import lora
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import pack
from pyargs.models.reward_model import RewardModel
from pyargs.types import Batch, Features, Users


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
