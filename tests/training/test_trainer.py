"""Training and adaptation: on planted users the methods must find what was planted, and touch nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.methods import global_rm, lore
from pyargs.models.reward_model import RewardModel
from pyargs.scoring import features
from pyargs.training import adapt, hooks, trainer
from pyargs.types import Features


class Backbone(torch.nn.Module):
    """Stands in for a frozen model where the features are planted."""

    def __init__(self, dim: int):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=dim))

    def get_decoder(self):
        return self


def as_features(planted, keep, names) -> Features:
    n = len(planted.user)
    hidden = torch.cat([planted.chosen, planted.rejected])
    every = Features(
        hidden, torch.arange(2 * n + 1), torch.arange(n), torch.arange(n, 2 * n), [names(u) for u in planted.user.tolist()]
    )
    return every.select(keep)


def accuracy(model: RewardModel, data: Features) -> float:
    with torch.no_grad():
        chosen, rejected = model.rewards(data.batch(model.users.rows(data.users), last=True)).unbind(1)
    return (chosen > rejected).float().mean().item()


@pytest.fixture(scope="module")
def planted():
    """24 users with 120 pairs each: 16 to train on (90 pairs, 30 unseen), 8 new ones (60 support, 60 query)."""
    found = synthetic.planted_features(dim=16, users=24, pairs=120, rank=4, seed=3)
    place = torch.arange(len(found.user)) % 120
    name = lambda u: f"user{u}"  # noqa: E731
    part = lambda condition: as_features(found, condition.nonzero().flatten().tolist(), name)  # noqa: E731
    seen = found.user < 16
    return SimpleNamespace(
        train=part(seen & (place < 90)),
        unseen=part(seen & (place >= 90)),
        support=part(~seen & (place < 60)),
        query=part(~seen & (place >= 60)),
    )


def trained(recipe, planted, **fields):
    recipe = hooks.with_defaults(recipe)
    few = {"adapt_steps": 200} if recipe.adapt else {}  # as good as 500 on these pairs
    config = recipe.Config(**{"epochs": 12, "seed": 1, **few, **fields})
    torch.manual_seed(config.seed)
    model = recipe.build(Backbone(16), None, list(dict.fromkeys(planted.train.users)), config)
    trainer.train_head(recipe, model, planted.train, config)
    return model.eval(), config


@pytest.mark.parametrize("alternate", [False, True])
def test_lore_finds_planted_mixtures_and_adapts(planted, alternate):
    """The planted labels are noise-free, so the planted model itself is right on every pair."""
    model, config = trained(lore, planted, rank=4, alternate=alternate, divisor=10.0)
    shared, _ = trained(global_rm, planted, hidden=16, head_lr=1e-2)
    assert accuracy(model, planted.unseen) > 0.90
    assert accuracy(model, planted.unseen) > accuracy(shared, planted.unseen) + 0.05
    ids = list(dict.fromkeys(planted.support.users))
    uniform = {"mixture": torch.zeros(len(ids), 4)}
    found = lore.adapt(model, planted.support, ids, config)
    model.users.append(ids, **uniform)
    before = accuracy(model, planted.query)
    model.users.vectors["mixture"].data[-len(ids) :] = found["mixture"]
    after = accuracy(model, planted.query)
    assert after > 0.85
    assert after > before + 0.05 and after > accuracy(shared, planted.query) + 0.05


def test_a_new_user_does_not_depend_on_the_others(planted):
    model, config = trained(lore, planted, rank=4)
    ids = list(dict.fromkeys(planted.support.users))
    together = lore.adapt(model, planted.support, ids, config)["mixture"]
    for row, user in enumerate(ids[:3]):
        own = planted.support.select([i for i, name in enumerate(planted.support.users) if name == user])
        assert torch.equal(lore.adapt(model, own, [user], config)["mixture"][0], together[row])


def test_adaptation_moves_user_vectors_only(planted):
    model, config = trained(lore, planted, rank=4)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    lore.adapt(model, planted.support, list(dict.fromkeys(planted.support.users)), config)
    assert all(torch.equal(before[name], value) for name, value in model.head.state_dict().items())


def test_users_without_pairs_and_losses_that_are_no_numbers_raise(planted):
    model, config = trained(lore, planted, rank=4, epochs=1)
    ids = list(dict.fromkeys(planted.support.users))
    with pytest.raises(PyargsError, match="'nobody' has no support pair"):
        lore.adapt(model, planted.support, [*ids, "nobody"], config)
    one = planted.support.select([0])
    assert lore.adapt(model, one, one.users, config)["mixture"].isfinite().all()
    broken = Features(
        planted.train.hidden * float("nan"),
        planted.train.offsets,
        planted.train.chosen,
        planted.train.rejected,
        planted.train.users,
    )
    with pytest.raises(PyargsError, match="loss is nan at step 0"):
        trainer.train_head(lore, model, broken, config)


def test_lore_alt_moves_mixtures_and_directions_in_turn(planted):
    config = lore.Config(alternate=True, rank=4, epochs=1)
    model = lore.build(Backbone(16), None, list(dict.fromkeys(planted.train.users)), config)
    mixtures, rest = lore.turns(model, config)
    assert mixtures == set(model.users.parameters())
    assert rest == {model.head.directions}
    trainer._drop_others(model, mixtures)
    batch = planted.train.batch(model.users.rows(planted.train.users), last=True)
    lore.loss(model, batch, config).backward()
    trainer._drop_others(model, mixtures)
    assert model.head.directions.grad is None and model.users.vectors["mixture"].grad is not None


def test_loss_and_gradient_against_a_formula_in_float64(planted):
    config = lore.Config(rank=4)
    torch.manual_seed(0)
    model = lore.build(Backbone(16), None, list(dict.fromkeys(planted.train.users)), config)
    rows = model.users.rows(planted.train.users)
    loss = lore.loss(model, planted.train.batch(rows, last=True), config)
    loss.backward()
    v = model.head.directions.detach().double().requires_grad_()
    a = model.users.vectors["mixture"].detach().double().requires_grad_()
    gap = (planted.train.hidden[planted.train.chosen] - planted.train.hidden[planted.train.rejected]).double()
    margin = torch.einsum("nk,kd,nd->n", a[rows].exp() / a[rows].exp().sum(1, keepdim=True), v, gap) / 100
    want = torch.log1p(torch.exp(-margin)).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(model.head.directions.grad.double(), v.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model.users.vectors["mixture"].grad.double(), a.grad, atol=1e-6, rtol=1e-4)


# -- with a language model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("models") / "lm"))


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return synthetic.load(seed=0)


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


def test_training_on_features_is_training_on_text(lm_folder, pairs):
    """The cached features are what the model's own forward pass computes, padding and batch apart."""
    from pyargs.lm.tokenize import pack
    from pyargs.scoring import groups

    model = trainer.train("lore", pairs, lore.Config(backbone=lm_folder, freeze_backbone=True, epochs=1))
    rows = pairs.select(range(6))
    data = features(model.backbone, model.tokenizer, rows)
    encoded, numbers = groups(model.tokenizer, rows, 512)
    packed = pack([encoded[g][0] for g, *_ in numbers], [[encoded[g][1][c], encoded[g][1][r]] for g, c, r in numbers])
    with torch.no_grad():
        batch = model(torch.arange(0, 12, 2), torch.arange(1, 12, 2), torch.zeros(6, dtype=torch.long), **vars(packed))
    cached = data.batch(torch.zeros(6, dtype=torch.long), last=True)
    torch.testing.assert_close(cached.hidden, batch.hidden, atol=2e-5, rtol=2e-5)
    assert torch.equal(features(model.backbone, model.tokenizer, rows).hidden, data.hidden)  # this time from the cache


def test_the_query_set_cannot_reach_adaptation(lm_folder, pairs):
    model = trainer.train("lore", pairs, lore.Config(backbone=lm_folder, freeze_backbone=True, epochs=2))
    model.save_pretrained(lm_folder + "-rm")
    ids = adapt.adapt(model, pairs)
    assert ids and set(ids) <= set(model.users.ids)
    other = RewardModel.from_pretrained(lm_folder + "-rm")
    adapt.adapt(other, of_split(pairs, "train", "train_test", "support"))
    assert torch.equal(model.users.vectors["mixture"], other.users.vectors["mixture"])
    with pytest.raises(PyargsError, match="no rows with split 'support'"):
        adapt.adapt(other, of_split(pairs, "query"))
    with pytest.raises(PyargsError, match="there already"):
        adapt.adapt(other, pairs)


def test_unknown_methods_and_empty_training_sets(lm_folder, pairs):
    with pytest.raises(PyargsError, match="Did you mean: lore"):
        trainer.train("lor", pairs)
    with pytest.raises(PyargsError, match="nothing to train on"):
        trainer.train("lore", of_split(pairs, "query"), lore.Config(backbone=lm_folder))


def test_pairs_that_are_no_dataset_are_refused_by_what_they_lack(lm_folder, pairs):
    config = hooks.method("lore").Config(backbone=lm_folder, freeze_backbone=True)
    for wrong in (pairs.to_list(), "pairs.jsonl", {"train": pairs}, pairs.to_pandas(), None):
        with pytest.raises(PyargsError, match="as pyargs.data.load gives it, not a"):
            trainer.train("lore", wrong, config)
    for column in ("user_id", "prompt", "chosen", "rejected"):
        with pytest.raises(PyargsError, match=f"no column '{column}'"):
            trainer.train("lore", pairs.remove_columns(column), config)
    with pytest.raises(PyargsError, match="chosen must be text: lists of messages"):
        trainer.train("lore", pairs.map(lambda row: {"chosen": [{"role": "assistant", "content": row["chosen"]}]}), config)
    with pytest.raises(PyargsError, match="no column 'split', which is one of"):
        adapt.adapt(None, pairs.remove_columns("split"))


def test_a_method_can_be_a_file(tmp_path, lm_folder, pairs):
    file = tmp_path / "mine.py"
    file.write_text(open(global_rm.__file__).read())
    model = trainer.train(str(file), pairs, hooks.method(str(file)).Config(backbone=lm_folder, freeze_backbone=True, epochs=1))
    assert model.about["method"] == str(file)


def test_lore_alt_reads_every_minibatch_twice_in_full_training(lm_folder, pairs, monkeypatch):
    passes = []
    forward = RewardModel.forward
    monkeypatch.setattr(RewardModel, "forward", lambda self, **inputs: passes.append(1) or forward(self, **inputs))
    counts = {}
    for alternate in (False, True):
        passes.clear()
        config = lore.Config(backbone=lm_folder, epochs=0.5, batch_size=32, alternate=alternate)
        model = trainer.train("lore", pairs, config)
        counts[alternate] = len(passes)
    assert counts[True] == 2 * counts[False] > 0
    assert model.users.vectors["mixture"].isfinite().all()


def test_what_a_pair_looks_like_does_not_depend_on_other_rows(lm_folder):
    from pyargs.scoring import groups

    _, tokenizer = load_lm(lm_folder)
    row = {"user_id": "u", "prompt": "word " * 100, "chosen": "a b", "rejected": "c"}
    long = {**row, "chosen": "a longer answer than the other one " * 3}
    alone, _ = groups(tokenizer, Dataset.from_list([row]), 80)
    both, numbers = groups(tokenizer, Dataset.from_list([long, row]), 80)
    assert both[numbers[1][0]][0] == alone[0][0]
    assert all(len(prompt) + max(map(len, several)) <= 80 for prompt, several in both)


def test_impossible_settings_raise(lm_folder, pairs):
    with pytest.raises(PyargsError, match="accumulation=64"):
        trainer.train("lore", pairs, lore.Config(backbone=lm_folder, accumulation=64))
    with pytest.raises(PyargsError, match="no method file"):
        trainer.train("./nofile.py", pairs)
