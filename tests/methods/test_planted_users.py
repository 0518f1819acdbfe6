"""Every method finds the users that were planted for it in hidden states, and touches nothing else."""

from __future__ import annotations

import warnings

import planted
import pytest
import torch
from planted import ids, trained, vectors

from pyargs.errors import PyargsError
from pyargs.training import hooks, trainer
from pyargs.types import Features, Users

FEW = dict(adapt_steps=200)  # as good as 500 on these pairs


FAMILIES = {
    "lore": ("mixtures", "lore", dict(rank=4, divisor=10.0, epochs=12, **FEW)),
    "lore_alt": ("mixtures", "lore", dict(rank=4, divisor=10.0, epochs=12, alternate=True, **FEW)),
    "pref": ("low_rank", "pref", dict(rank=3, head_lr=1e-2, epochs=12, **FEW)),
    "pal_a": (
        "prototypes",
        "pal",
        dict(variant="A", rank=3, projector_lr=3e-3, user_lr=3e-2, prototype_lr=3e-2, epochs=30, **FEW),
    ),
    "vpl": ("types", "vpl", dict(latent=64, vae_lr=1e-3, head_lr=1e-3, min_context=8, epochs=8)),
    "mpu": ("own", "mpu", dict(hidden=32, head_lr=1e-2, adapt_lr=1e-2, epochs=6, **FEW)),
    "mpu_hidden": ("own", "mpu", dict(hidden=32, head_lr=1e-2, adapt_lr=1e-2, epochs=6, pool="hidden", **FEW)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def found(request):
    """(method's name, planted data, trained model, config, the same with new users, Global RM on the same data)."""
    family, name, fields = FAMILIES[request.param]
    data = planted.pairs(family)
    model, config = trained(name, data, **fields)
    new = vectors(name, model, data.support, config)
    shared, _ = trained("global_rm", data, hidden=16, head_lr=1e-2, epochs=12)
    return name, data, model, config, new, shared


def with_new(model, data, new):
    """The trained users' table exchanged for the new ones'."""
    head = model.head
    before, head.users = head.users, Users(ids(data.support), **new)
    return head, before


def test_planted_users_are_found(found):
    """On unseen pairs of the train users: at least 90% of what the planted model itself gets right."""
    _, data, model, _, _, _ = found
    assert planted.correct(model, data.unseen).mean() >= 0.9 * data.best_unseen


def test_adapted_users_are_above_global(found):
    """On new users: above Global RM, outside the 95% interval of the difference (bootstrap over pairs, seeded)."""
    _, data, model, _, new, shared = found
    head, before = with_new(model, data, new)
    try:
        gain = planted.correct(model, data.query) - planted.correct(shared, data.query)
    finally:
        head.users = before
    draws = torch.randint(len(gain), (1000, len(gain)), generator=torch.Generator().manual_seed(0))
    assert gain[draws].mean(1).quantile(0.025) > 0


def test_adaptation_is_worth_it(found):
    name, data, model, config, new, _ = found
    start = {
        "vpl": lambda: {"latent": torch.zeros_like(new["latent"])},
        "mpu": lambda: model.head.initial(len(ids(data.support))),
    }.get(name, lambda: {"mixture": model.users.vectors["mixture"].detach().mean(0).repeat(len(new["mixture"]), 1)})
    scores = []
    for chosen in (start(), new):
        head, before = with_new(model, data, chosen)
        scores.append(planted.correct(model, data.query).mean().item())
        head.users = before
    assert scores[1] > scores[0] + 0.05


def test_adaptation_is_seeded_and_moves_nothing_else(found):
    name, data, model, config, new, _ = found
    before = {key: value.clone() for key, value in model.state_dict().items()}
    again = vectors(name, model, data.support, config)
    assert all(torch.equal(new[key], again[key]) for key in new)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_new_user_alone_is_the_same_as_among_others(found):
    name, data, model, config, new, _ = found
    user = ids(data.support)[0]
    alone = data.support.select([i for i, other in enumerate(data.support.users) if other == user])
    found_alone = vectors(name, model, alone, config)
    assert all(torch.equal(value[0], new[key][0]) for key, value in found_alone.items())


def test_training_is_seeded(found):
    name, data, model, config, _, _ = found
    again, _ = trained(name, data, **{k: v for k, v in vars(config).items() if k != "seed"})
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_users_with_one_pair_or_none(found):
    name, data, model, config, _, _ = found
    one = data.support.select([0])
    assert all(value.isfinite().all() for value in vectors(name, model, one, config).values())
    with pytest.raises(PyargsError, match="'nobody' has no support pair"):
        hooks.method(name).adapt(model, one, [*one.users, "nobody"], config)


def test_equal_responses_teach_nothing_and_losses_that_are_no_numbers_raise(found):
    name, data, _, config, _, _ = found
    same = Features(data.train.hidden, data.train.offsets, data.train.chosen, data.train.chosen, data.train.users)
    fields = {k: v for k, v in vars(config).items() if k not in ("seed", "epochs")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # a frozen backbone's training on pairs of one and the same response: finite, and no preference comes of it
        part = same.select(range(64))
        quiet = type(data)(**{**vars(data), "train": part})
        model, _ = trained(name, quiet, **fields, epochs=1)
    chosen, rejected = model.rewards(part.batch(model.users.rows(part.users), last=not model.needs_all_tokens)).unbind(1)
    assert torch.equal(chosen, rejected) and chosen.isfinite().all()
    broken = Features(data.train.hidden * float("nan"), *list(vars(data.train).values())[1:])
    recipe = hooks.method(name)
    torch.manual_seed(0)
    model = recipe.build(planted.Backbone(), None, ids(data.train), config)
    if name == "vpl":
        recipe.start(model, data.train, config)
    with pytest.raises(PyargsError, match="loss is nan at step 0"):
        trainer.train_head(recipe, model, broken, config)


def test_a_folded_head_and_a_saved_one_give_the_same_rewards(found):
    from pyargs.ops import score_select

    _, data, model, *_ = found
    torch.manual_seed(0)
    hidden, user = torch.randn(5, 7, planted.DIM), torch.tensor([3, 0, 3, 15, 2])
    folded = model.head.fold(user)
    features, bank = folded.scored(hidden)
    with torch.no_grad():
        _, _, reward, _ = score_select(
            features,
            folded.weight,
            torch.arange(5),
            torch.ones(5),
            torch.zeros(5, 7),
            torch.arange(7).expand(5, 7),
            torch.zeros(5, dtype=torch.bool),
            bias=folded.bias,
            activation=folded.activation,
            bank=bank,
        )
        torch.testing.assert_close(reward, model.head(hidden, user.unsqueeze(1).expand(5, 7)), atol=1e-4, rtol=1e-4)
