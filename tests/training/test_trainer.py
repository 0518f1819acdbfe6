"""Training: what moves and what stays, steps that are counted, and checkpoints that were written to their end."""

from __future__ import annotations

import planted
import pytest
import torch
from planted import ids, trained, vectors
from small import config_of

from pyargs.data import of_split
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.methods import global_rm, lore, vpl
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, hooks, trainer


@pytest.mark.parametrize(
    "name,fields",
    [
        ("global_rm", {}),
        ("global_rm", {"pool": "mean", "hidden": 8}),
        ("global_rm", {"hidden": 0}),
        ("lore", {}),
        ("lore", {"alternate": True}),
    ],
)
def test_full_training_moves_lora_and_head(lm_folder, pairs, name, fields):
    config = hooks.method(name).Config(backbone=lm_folder, epochs=0.5, batch_size=16, lora_lr=1e-2, **fields)
    model = trainer.train(name, pairs, config)
    lora = {n: p for n, p in model.backbone.named_parameters() if "lora_B" in n}
    assert lora and all(p.abs().sum() > 0 for p in lora.values())  # lora_B starts at zero
    frozen, _ = load_lm(lm_folder)
    for n, p in frozen.get_decoder().named_parameters():
        now = model.backbone.state_dict()[
            n.replace("proj.weight", "proj.base_layer.weight") if "q_proj" in n or "v_proj" in n else n
        ]
        assert torch.equal(p, now), n
    again = trainer.train(name, pairs, config)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_accumulated_steps_equal_one_batch(lm_folder, pairs):
    small = pairs.select(range(64)) if "train" in pairs["split"][:64] else pairs
    make = lambda n: trainer.train("global_rm", small, global_rm.Config(backbone=lm_folder, epochs=1, accumulation=n))  # noqa: E731
    one, four = make(1), make(4)
    for (name, x), y in zip(one.head.state_dict().items(), four.head.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3, msg=name)


def test_unknown_methods_and_empty_training_sets(lm_folder, pairs):
    with pytest.raises(PyargsError, match="Did you mean: lore"):
        trainer.train("lor", pairs)
    with pytest.raises(PyargsError, match="nothing to train on"):
        trainer.train("lore", of_split(pairs, "query"), lore.Config(backbone=lm_folder))


def test_pairs_that_are_no_dataset_are_refused_by_what_they_lack(lm_folder, pairs):
    config = hooks.method("lore").Config(backbone=lm_folder, freeze_backbone=True)
    for wrong in (pairs.to_list(), "pairs.jsonl", {"train": pairs}, pairs.to_pandas(), None):
        with pytest.raises(PyargsError, match="as pyargs.load_pairs gives it, not a"):
            trainer.train("lore", wrong, config)
    for column in ("user_id", "prompt", "chosen", "rejected"):
        with pytest.raises(PyargsError, match=f"no column '{column}'"):
            trainer.train("lore", pairs.remove_columns(column), config)
    with pytest.raises(PyargsError, match="chosen must be text: lists of messages"):
        trainer.train("lore", pairs.map(lambda row: {"chosen": [{"role": "assistant", "content": row["chosen"]}]}), config)
    with pytest.raises(PyargsError, match="no column 'split', which is one of"):
        adapt.adapt(None, pairs.remove_columns("split"))


def test_impossible_settings_raise(lm_folder, pairs):
    with pytest.raises(PyargsError, match="accumulation=64"):
        trainer.train("lore", pairs, lore.Config(backbone=lm_folder, accumulation=64))
    with pytest.raises(PyargsError, match="no method file"):
        trainer.train("./nofile.py", pairs)


def test_training_counts_its_steps_and_adaptation_keeps_the_pool(monkeypatch):
    data = planted.pairs("types")
    steps, plain = [], vpl.loss
    monkeypatch.setattr(vpl, "loss", lambda m, b, c: steps.append(b.step) or plain(m, b, c))
    trained("vpl", type(data)(**{**vars(data), "train": data.train.select(range(64))}), latent=8, epochs=2)
    assert steps == [0, 1, 2, 3]
    pools = []
    rewards = RewardModel.rewards
    monkeypatch.setattr(RewardModel, "rewards", lambda self, batch: pools.append(self.pool) or rewards(self, batch))
    model, config = trained("mpu", data, hidden=4, epochs=0.1, pool="mean", adapt_steps=3)
    pools.clear()
    vectors("mpu", model, data.support, config)
    assert pools == ["mean"] * 3 * len(ids(data.support))


def test_half_written_checkpoints_are_passed_over(lm_folder, rows, tmp_path, monkeypatch):
    """Training goes on from the newest that is complete, by its number; others are removed. So is an older one: where a kill
    left a part of it, it was changed last, and the Trainer, which goes by that, would keep it in the newer one's place."""
    config = config_of("global_rm", lm_folder, batch_size=7, checkpoint_steps=1)
    steps, plain, stop, there = [], global_rm.loss, 10, []

    def loss(model, batch, config):
        there.append({one.name for one in tmp_path.iterdir()})
        if batch.step == stop:
            raise KeyboardInterrupt
        steps.append(batch.step)
        return plain(model, batch, config)

    monkeypatch.setattr(global_rm, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        trainer.train("global_rm", rows, config, checkpoints=tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}
    assert steps == list(range(10))
    half = tmp_path / "checkpoint-12"
    half.mkdir()
    steps.clear(), there.clear()
    stop = None
    trainer.train("global_rm", rows, config, checkpoints=tmp_path)
    assert steps == [10] and there == [{"checkpoint-10"}]
