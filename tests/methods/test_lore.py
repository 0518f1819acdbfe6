"""LoRE: it finds planted mixtures, computes its formula, and moves in turn where it is asked to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from formulas import USERS, compare, leaves, some_batch
from planted import Backbone
from small import config_of

from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.methods import global_rm, lore
from pyargs.models.reward_model import RewardModel
from pyargs.training import hooks, trainer
from pyargs.types import Features


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


def check_turns(monkeypatch, train) -> None:
    """Of the passes of a training, one moves mixtures alone and the next directions alone."""
    moved, plain = [], lore.loss

    def loss(model, batch, config):
        moved.append((model.users.vectors["mixture"].detach().clone(), model.head.directions.detach().clone()))
        return plain(model, batch, config)

    monkeypatch.setattr(lore, "loss", loss)
    train()
    assert len(moved) > 2
    for number, (one, two) in enumerate(zip(moved, moved[1:], strict=False)):
        mixtures, directions = (not torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert (mixtures, directions) == ((True, False) if number % 2 == 0 else (False, True)), number


def test_lore_alt_moves_mixtures_and_directions_in_turn(planted, monkeypatch):
    fields = dict(rank=4, alternate=True, epochs=0.1, warmup=0.0)
    check_turns(monkeypatch, lambda: trained(lore, planted, **fields))


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


def test_formula_of_lore():
    torch.manual_seed(0)
    config = lore.Config(rank=3)
    model = lore.build(Backbone(), None, USERS, config)
    batch = some_batch()
    ours, p = leaves(model)
    h = batch.hidden[:, :, 0].double()
    a = p["users.vectors.mixture"][batch.user]
    margin = torch.einsum("nk,kd,nd->n", a.exp() / a.exp().sum(1, keepdim=True), p["directions"], h[:, 0] - h[:, 1]) / 100
    compare(lore.loss(model, batch, config), torch.log1p(torch.exp(-margin)).mean(), ours, p)


# -- with a language model ---------------------------------------------------------------------------------------------


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


def test_lore_alt_moves_in_turn_in_full_training(lm_folder, rows, monkeypatch):
    config = config_of("lore", lm_folder, alternate=True, epochs=0.5, warmup=0.0)
    check_turns(monkeypatch, lambda: trainer.train("lore", rows, config))
