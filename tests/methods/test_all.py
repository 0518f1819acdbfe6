"""Every method of the folder: it finds the users that were planted for it, touches nothing else, and computes its formula."""

from __future__ import annotations

import math
import pkgutil
import re
import warnings

import planted
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pyargs import load_model, methods
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError, UnknownUser
from pyargs.heads import latent
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, left_pad
from pyargs.methods import genarm, icl, lore, mpu, pal, pdpo, pref, vpl
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, hooks, optimizers, trainer
from pyargs.types import Batch, Features, LogProbs, Users

METHODS = [module.name for module in pkgutil.iter_modules(methods.__path__)]

# -- planted users: hidden states without a language model -------------------------------------------------------------

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


def ids(data: Features) -> list[str]:
    return list(dict.fromkeys(data.users))


def trained(name: str, data, **fields):
    """A method trained on planted features, as `trainer.train` does it with a frozen backbone."""
    recipe = hooks.method(name)
    config = recipe.Config(seed=1, **fields)
    torch.manual_seed(config.seed)
    model = recipe.build(planted.Backbone(), None, ids(data.train), config)
    if hasattr(recipe, "start"):
        recipe.start(model, data.train, config)
    trainer.train_head(recipe, model, data.train, config)
    recipe.finish(model, config)
    return model.eval(), config


def vectors(name: str, model, data: Features, config) -> dict:
    torch.manual_seed(config.seed)
    return hooks.method(name).adapt(model, data, ids(data), config)


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
    chosen, rejected = model.rewards(part.batch(model.users.rows(part.users), last=not model.whole)).unbind(1)
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
    folded = model.head.fold()
    with torch.no_grad():
        _, _, reward, _ = score_select(
            folded.features(hidden, user),
            folded.weight,
            user,
            torch.ones(5),
            torch.zeros(5, 7),
            torch.arange(7).expand(5, 7),
            torch.zeros(5, dtype=torch.bool),
            bias=folded.bias,
            activation=folded.activation,
        )
        torch.testing.assert_close(reward, model.head(hidden, user.unsqueeze(1).expand(5, 7)), atol=1e-4, rtol=1e-4)


# -- what single methods promise ---------------------------------------------------------------------------------------


def test_absent_users_do_not_move():
    """SparseAdam: a minibatch moves its own users only, even when others have momentum."""
    data = planted.pairs("own")
    config = mpu.Config(hidden=8)
    model = mpu.build(planted.Backbone(), None, ids(data.train), config)
    model.head.train()
    optimizer = optimizers.make(mpu, model, config)
    rows = model.users.rows(data.train.users)
    first, second = (rows == 0).nonzero().flatten()[:8], (rows == 5).nonzero().flatten()[:8]
    for index in (first, second):
        before = {name: value.detach().clone() for name, value in model.users.vectors.items()}
        optimizer.zero_grad()
        mpu.loss(model, data.train.batch(rows, index, last=True), config).backward()
        optimizer.step()
        user = int(rows[index[0]])
        for name, value in model.users.vectors.items():
            moved = (value != before[name]).flatten(1).any(1)
            assert moved[user] and not moved[torch.arange(len(moved)) != user].any(), name


def test_pref_starts_with_the_signs_of_preferences_and_warns_of_sparse_data():
    dense = planted.pairs("low_rank", noise=0.01)
    config = pref.Config(rank=3)
    model = pref.build(planted.Backbone(), None, ids(dense.train), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pref.start(model, dense.train, config)
    assert planted.correct(model, dense.train).mean() > 0.85  # before any training
    assert model.about["warm_start"]["zero_users"] == 0 and model.about["warm_start"]["raters_per_pair"] > 5
    sparse = planted.pairs("mixtures")
    model = pref.build(planted.Backbone(), None, ids(sparse.train), config)
    with pytest.warns(UserWarning, match="13 of 16 users at 0"):  # one rater a pair: only the K = 3 largest users are seen
        pref.start(model, sparse.train, config)
    assert model.about["warm_start"]["zero_users"] == 13 / 16
    assert (model.users.vectors["mixture"].norm(dim=1) > 1e-3).all()


def test_pref_orientation_does_not_depend_on_the_label():
    dense = planted.pairs("low_rank")
    config = pref.Config(rank=3)
    swapped = Features(dense.train.hidden, dense.train.offsets, dense.train.rejected, dense.train.chosen, dense.train.users)
    starts = []
    for data in (dense.train, swapped):
        model = pref.build(planted.Backbone(), None, ids(data), config)
        pref.start(model, data, config)
        starts.append(model.users.vectors["mixture"].detach() @ model.head.directions.detach())
    torch.testing.assert_close(starts[0], -starts[1], atol=1e-4, rtol=1e-3)  # all labels turned: all heads turned


def test_vpl_contexts_are_other_pairs_of_the_same_user():
    data = planted.pairs("types")
    config = vpl.Config(latent=8)
    model = vpl.build(planted.Backbone(), None, ids(data.train), config)
    vpl.start(model, data.train, config)
    rows = model.users.rows(data.train.users)
    index = torch.arange(0, len(rows), 7)
    batch = data.train.batch(rows, index, last=True)
    states, mask = vpl.draw_context(model.context, batch, config)
    assert 2 <= mask.sum(1).min() and mask.sum(1).max() <= 8 and len(mask.sum(1).unique()) == 7
    everything = data.train.last()
    for n, pair in enumerate(index.tolist()):
        for state in states[n][mask[n]]:
            (source,) = (everything == state).flatten(1).all(1).nonzero().flatten().tolist()
            assert source != pair and rows[source] == rows[pair]
    one = data.train.select([0])
    vpl.start(model, one, config)
    _, mask = vpl.draw_context(model.context, one.batch(model.users.rows(one.users), last=True), config)
    assert not mask.any()  # a single pair has no other: nothing is shown, and the loss is a number all the same
    assert vpl.loss(model, one.batch(model.users.rows(one.users), last=True), config).isfinite()


def test_the_order_within_a_pair_is_its_label():
    encoder = latent.Encoder(planted.DIM, 8)
    pairs = torch.randn(1, 4, 2, planted.DIM)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert not torch.allclose(encoder(pairs, mask)[0], encoder(pairs.flip(2), mask)[0])
    longer = torch.cat([pairs, torch.randn(1, 3, 2, planted.DIM)], dim=1)  # masked pairs change nothing
    partly = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(encoder(pairs, mask), encoder(longer, partly))


def test_annealing():
    assert vpl.annealing(0, 100) == pytest.approx(0.1) and vpl.annealing(50, 100) == pytest.approx(0.55)
    assert vpl.annealing(100, 100) == pytest.approx(0.1) and vpl.annealing(99, 100) > 0.99


# What methods.md and the paper say, held apart from the code.
DEFAULTS = {
    "global_rm": dict(hidden=64, head_lr=1e-4, lora_lr=5e-5, lora_rank=8, lora_alpha=16, rslora=True, pool="last",
                      step_reward="token", dtype="float32", max_length=512, batch_size=32, warmup=0.03, lora_dropout=0.0),
    "lore": dict(rank=8, head_lr=0.5, divisor=100, adapt_lr=0.1, adapt_steps=500, adapt_init="zeros", pool="last"),
    "pref": dict(rank=8, head_lr=1e-3, strength=0.02, reg="weight_decay", svd_rounds=10, svd_noise=0.1, adapt_lr=1e-2,
                 adapt_steps=500, adapt_l2=0.02, adapt_init="mean", init="svd", votes="signed"),
    "pal": dict(variant="B", rank=8, width=0, weighting="cumulative", projector_lr=1e-4, projector_decay=0.01, user_lr=5e-3,
                prototype_lr=5e-3, scale_lr=0.1),
    "vpl": dict(latent=512, vae_lr=1e-4, head_lr=1e-4, head_decay=1e-3, kl=3e-6, kl_period=10_000, min_context=2,
                max_context=8, eval_z="normalized", adapt_pairs="chunks"),
    "mpu": dict(hidden=64, head_lr=1e-3, pool="last", adapt_lr=1e-3, adapt_l2=0.01, adapt_steps=500, adapt_init="initial"),
    "genarm": dict(beta=0.05, gamma=0.0, lora_lr=5e-4),
    "pdpo": dict(soft_tokens=8, clusters=0, beta=0.5, alpha=0.5, soft_lr=1e-3, lora_lr=5e-5, init="words", adapt_lr=1e-3,
                 adapt_steps=200),
    "icl": dict(shots=8, retrieve="random", show="pair", content_tokens=200, max_length=512, demonstration_tokens=1536),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_papers_or_those_of_its_sources(name):
    config = hooks.method(name).Config()
    assert {key: getattr(config, key) for key in DEFAULTS[name]} == DEFAULTS[name]


GROUPS = {  # (learning rate, weight decay, sparse) of every trained part; LoRA apart
    "global_rm": {"first": (1e-4, 0, False), "last": (1e-4, 0, False)},
    "lore": {"directions": (0.5, 0, False), "users": (0.5, 0, False)},
    "pref": {"directions": (1e-3, 0.02, False), "users": (1e-3, 0.02, False)},
    "pal": {
        "project": (1e-4, 0.01, False),
        "queries": (1e-4, 0.01, False),
        "logit_scale": (0.1, 0, False),
        "users": (5e-3, 0, False),
    },
    "vpl": {
        "encoder": (1e-4, 0, False),
        "score": (1e-4, 1e-3, False),
        "first": (1e-4, 1e-3, False),
        "second": (1e-4, 1e-3, False),
        "last": (1e-4, 1e-3, False),
        "users": None,
    },
    "mpu": {"users": (1e-3, 0, True)},
}


def optimized(model, name: str, config) -> dict:
    optimizer = optimizers.make(hooks.method(name), model, config)
    return {
        parameter: (group["lr"], group.get("weight_decay", 0), isinstance(one, torch.optim.SparseAdam))
        for one in getattr(optimizer, "optimizers", [optimizer])
        for group in one.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", GROUPS)
def test_every_part_has_its_learning_rate_and_decay(name):
    config = hooks.method(name).Config()
    model = hooks.method(name).build(planted.Backbone(), None, USERS, config)
    found = optimized(model, name, config)
    for key, parameter in model.head.named_parameters():
        assert found.get(parameter) == GROUPS[name][key.split(".")[0]], key


def test_pal_a_has_a_rate_for_prototypes():
    config = pal.Config(variant="A", prototype_lr=7e-3)
    model = pal.build(planted.Backbone(), None, USERS, config)
    assert optimized(model, "pal", config)[model.head.prototypes] == (7e-3, 0, False)
    assert optimized(model, "pal", config)[model.head.project.first.weight] == (1e-4, 0.01, False)


def test_settings_out_of_range_raise():
    for make in (
        lambda: mpu.Config(hidden=0),
        lambda: vpl.Config(max_context=0),
        lambda: lore.Config(rank=0),
        lambda: icl.Config(show="both"),
        lambda: pref.Config(adapt_steps=-3),
        lambda: pal.Config(variant="C"),
        lambda: genarm.Config(batch_size=0),
    ):
        with pytest.raises(PyargsError, match="must be at least|is one of"):
            make()
    with pytest.raises(PyargsError, match="above max_context"):
        vpl.build(planted.Backbone(), None, USERS, vpl.Config(min_context=9))


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_vpl_infers_users_from_chunks_of_nearly_the_same_size(count, monkeypatch):
    model = vpl.build(planted.Backbone(), None, ["a"], vpl.Config(latent=6))
    sizes = []
    forward = latent.Encoder.forward
    monkeypatch.setattr(latent.Encoder, "forward", lambda s, p, m: sizes.append(p.shape[1]) or forward(s, p, m))
    context = vpl.Context(torch.randn(count, 2, planted.DIM), torch.arange(count).unsqueeze(0))
    found = vpl.infer(model, context, vpl.Config(latent=6))
    assert sum(sizes) == count and len(sizes) == math.ceil(count / 8) and max(sizes) - min(sizes) <= 1
    whole = vpl.infer(model, context, vpl.Config(latent=6, adapt_pairs="all"))
    assert sizes[-1] == count and (torch.equal(found, whole) == (count <= 8))


def test_vpl_latents_have_the_length_of_the_trainings():
    for normalized in (True, False):
        users = Users(["a", "b"], latent=torch.randn(2, 6))
        head = latent.Head(planted.DIM, 6, users, normalized=normalized)
        length = head.user_latents().norm(dim=-1)
        assert torch.allclose(length, torch.full((2,), math.sqrt(6))) == normalized
        assert torch.equal(head.user_latents(), users.vectors["latent"]) == (not normalized)


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


def test_fewer_users_than_features_leave_none_dead():
    data = planted.pairs("low_rank")
    few = data.train.select([i for i, user in enumerate(data.train.users) if user in ("user0", "user1")])
    model, _ = trained("pref", type(data)(**{**vars(data), "train": few}), rank=6, epochs=2)
    assert model.about["warm_start"]["empty_features"] == 4
    assert (model.head.directions.norm(dim=1) > 0).all() and (model.users.vectors["mixture"].norm(dim=0) > 0).all()


# -- loss and gradient against formulas in float64 ---------------------------------------------------------------------


def some_batch(tokens: int = 1, pairs: int = 6, prompt: bool = False) -> Batch:
    torch.manual_seed(5)
    length = torch.randint(1, tokens + 1, (pairs, 2))
    mask = torch.arange(tokens) < length.unsqueeze(-1)
    hidden = torch.randn(pairs, 2, tokens, planted.DIM) * mask.unsqueeze(-1)
    user, state = torch.randint(0, 4, (pairs,)), torch.randn(pairs, planted.DIM)
    return Batch(hidden, mask, user, torch.arange(pairs), state if prompt else None)


def compare(loss, want, ours: dict, theirs: dict) -> None:
    """Loss and all gradients of ours against a formula on float64 leaves of the same names."""
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, leaf in theirs.items():
        grad = ours[name].grad
        grad = grad.to_dense() if grad is not None and grad.is_sparse else grad
        torch.testing.assert_close(grad.double(), leaf.grad, atol=2e-6, rtol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def leaves(model) -> tuple[dict, dict]:
    ours = dict(model.head.named_parameters())
    return ours, {name: value.detach().double().requires_grad_() for name, value in ours.items()}


USERS = ["a", "b", "c", "d"]


def test_formula_of_lore():
    torch.manual_seed(0)
    config = lore.Config(rank=3)
    model = lore.build(planted.Backbone(), None, USERS, config)
    batch = some_batch()
    ours, p = leaves(model)
    h = batch.hidden[:, :, 0].double()
    a = p["users.vectors.mixture"][batch.user]
    margin = torch.einsum("nk,kd,nd->n", a.exp() / a.exp().sum(1, keepdim=True), p["directions"], h[:, 0] - h[:, 1]) / 100
    compare(lore.loss(model, batch, config), torch.log1p(torch.exp(-margin)).mean(), ours, p)


@pytest.mark.parametrize("reg", ["weight_decay", "feature_l2"])
def test_formula_of_pref(reg):
    torch.manual_seed(0)
    config = pref.Config(rank=3, reg=reg)
    model = pref.build(planted.Backbone(), None, USERS, config)
    batch = some_batch()
    ours, p = leaves(model)
    change = (batch.hidden[:, 0, 0] - batch.hidden[:, 1, 0]).double() @ p["directions"].T
    margin = (p["users.vectors.mixture"][batch.user] * change).sum(1)
    want = torch.log1p(torch.exp(-margin)).mean()
    if reg == "feature_l2":
        want = want + 0.02 * change.square().sum(1).sqrt().mean()
    compare(pref.loss(model, batch, config), want, ours, p)


@pytest.mark.parametrize("weighting", ["cumulative", "mean", "last"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_formula_of_pal(variant, weighting):
    torch.manual_seed(0)
    config = pal.Config(variant=variant, rank=3, width=0 if variant == "A" else 6, weighting=weighting)
    model = pal.build(planted.Backbone(), None, USERS, config)
    batch = some_batch(tokens=5, prompt=variant == "B")
    batch.hidden[0, 1, 0] = batch.hidden[0, 0, 0]  # the first tokens of pair 0 are the same
    ours, p = leaves(model)

    def project(x, prefix):
        act = F.relu if variant == "A" else lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        one = act(x @ p[f"{prefix}.first.weight"].T + p[f"{prefix}.first.bias"])
        two = act(one @ p[f"{prefix}.second.weight"].T + p[f"{prefix}.second.bias"])
        three = two @ p[f"{prefix}.third.weight"].T + p[f"{prefix}.third.bias"]
        return x + three if variant == "A" else three

    total = 0.0
    for n in range(len(batch)):
        mixture = p["users.vectors.mixture"][batch.user[n]]
        mixture = mixture.exp() / mixture.exp().sum()
        if variant == "A":
            query = project(mixture @ p["prototypes"], "project")
        else:
            query = sum(mixture[j] * project(batch.prompt[n].double(), f"queries.{j}") for j in range(3))
        length = batch.mask[n].sum(-1).tolist()
        first = 1 if n == 0 and max(length) > 1 else 0
        positions = range(first, max(length))
        weights = {
            "cumulative": [i + 1 for i, _ in enumerate(positions)],
            "mean": [1 for _ in positions],
            "last": [int(t == max(length) - 1) for t in positions],
        }[weighting]
        for t, weight in zip(positions, weights, strict=True):
            r = []
            for side in (0, 1):
                f = project(batch.hidden[n, side, min(t, length[side] - 1)].double(), "project")
                if variant == "A":
                    r.append(-(f - query).square().sum().sqrt())
                else:
                    r.append(p["logit_scale"].exp() * (f @ query) / (f.norm() * query.norm()))
            each = torch.relu(1 - (r[0] - r[1])) if variant == "A" else torch.log1p(torch.exp(-(r[0] - r[1])))
            total = total + each * weight / sum(weights)
    compare(pal.loss(model, batch, config), total / len(batch), ours, p)


@pytest.mark.parametrize("variant, rank", [("A", 3), ("B", 3), ("B", 9)])
def test_pal_fits_new_users_by_its_loss(variant, rank):
    """With its short cuts (tokens projected once, B into the span of a prompt's K projections, even if K > P) and without."""
    torch.manual_seed(0)
    config = pal.Config(variant=variant, rank=rank, width=0 if variant == "A" else 6, adapt_steps=100)
    model = pal.build(planted.Backbone(), None, USERS, config)
    offsets = torch.randint(1, 5, (30,)).cumsum(0)
    offsets = torch.cat([offsets.new_zeros(1), offsets])
    number = torch.arange(10)
    support = Features(
        torch.randn(int(offsets[-1]), planted.DIM),
        offsets,
        number,
        number + 10,
        ["new"] * 6 + ["other"] * 4,
        number + 20 if variant == "B" else None,
    )

    def plain(probe, batch):
        return lambda: torch.stack([pal.loss(probe, pair, config) for pair in apart(batch)])

    def apart(batch):
        return [
            Batch(
                batch.hidden[n : n + 1],
                batch.mask[n : n + 1],
                batch.user[n : n + 1],
                batch.pair[n : n + 1],
                None if batch.prompt is None else batch.prompt[n : n + 1],
            )
            for n in range(len(batch))
        ]

    ids = ["new", "other"]
    start = adapt.randn_rows(ids, rank, seed=0)
    initial = {"mixture": start.clone()}
    want = adapt.fit_users(model, support, ids, initial, steps=100, lr=config.user_lr, objective=plain)["mixture"]
    assert (want - start).abs().max() > 0.1
    torch.testing.assert_close(pal.adapt(model, support, ids, config)["mixture"], want, atol=1e-4, rtol=1e-4)


def test_formula_of_vpl(monkeypatch):
    torch.manual_seed(0)
    config = vpl.Config(latent=6, kl=0.3, kl_period=100)
    model = vpl.build(planted.Backbone(), None, USERS, config)
    model.head.score.weight.data *= 100
    batch = some_batch()
    batch.step = 40
    context, mask = torch.randn(6, 3, 2, planted.DIM), torch.tensor([[1, 1, 0]] * 5 + [[1, 1, 1]]).bool()
    noise = torch.randn(6, 6)
    model.context = None
    monkeypatch.setattr(vpl, "draw_context", lambda *_: (context, mask))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x))
    ours, p = leaves(model)
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)  # noqa: E731
    leaky = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    likelihood, kl = 0.0, 0.0
    for n in range(6):
        codes = context[n][mask[n]].double().flatten(1)
        codes = linear(leaky(linear(leaky(linear(codes, "encoder.pair.0")), "encoder.pair.2")), "encoder.pair.4")
        score = linear(codes, "encoder.query") @ linear(codes, "encoder.key").T / math.sqrt(6)
        code = (score.softmax(-1) @ linear(codes, "encoder.value")).mean(0)
        mean, logvar = linear(code, "encoder.mean").clamp(-1, 1), linear(code, "encoder.logvar").clamp(-1, 1)
        z = mean + (logvar / 2).exp() * noise[n].double()
        z = math.sqrt(6) * z / z.norm()
        r = []
        for side in (0, 1):
            x = torch.cat([linear(batch.hidden[n, side, 0].double(), "score"), z])
            r.append(linear(leaky(linear(leaky(linear(x, "first")), "second")), "last")[0])
        likelihood = likelihood + torch.log1p(torch.exp(-(r[0] - r[1])))
        kl = kl - 0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
    anneal = 0.1 + 0.9 * (1 - math.cos(math.pi * 0.4)) / 2
    p.pop("users.vectors.latent")  # inferred, never trained
    compare(vpl.loss(model, batch, config), likelihood / 6 + 0.3 * anneal * kl / 6, ours, p)
    assert ours["users.vectors.latent"].grad is None


def test_formula_of_mpu():
    torch.manual_seed(0)
    config = mpu.Config(hidden=5, pool="mean")
    model = mpu.build(planted.Backbone(), None, USERS, config).train()
    for value in model.users.vectors.values():
        value.data += 0.1 * torch.randn_like(value)
    batch = some_batch(tokens=4)
    ours, p = leaves(model)
    total = 0.0
    for n, u in enumerate(batch.user.tolist()):
        r = []
        for side in (0, 1):
            h = batch.hidden[n, side][batch.mask[n, side]].double()
            x = torch.relu(h @ p["users.vectors.first"][u].view(5, -1).T + p["users.vectors.bias"][u])
            r.append((x @ p["users.vectors.last"][u]).mean())
        total = total + torch.log1p(torch.exp(-(r[0] - r[1])))
    compare(mpu.loss(model, batch, config), total / len(batch), ours, p)


def test_formulas_of_genarm_and_dpo():
    torch.manual_seed(0)
    values = (-20 + 5 * torch.randn(7, 2)).requires_grad_()
    exact = values.detach().double().requires_grad_()
    loss = genarm.loss(None, LogProbs(values, None, None, None), genarm.Config(gamma=0.2))
    want = torch.log1p(torch.exp(-(0.05 * (exact[:, 0] - exact[:, 1]) - 0.2))).mean()
    compare(loss, want, {"logprobs": values}, {"logprobs": exact})

    reference, pair = -20 + 5 * torch.randn(9, 2), torch.tensor([3, 0, 8, 1, 2, 2, 5])
    own, generic = ((-20 + 5 * torch.randn(7, 2)).requires_grad_() for _ in range(2))
    leaf = {name: value.detach().double().requires_grad_() for name, value in (("own", own), ("generic", generic))}
    model = type("Model", (), {"reference": reference})()
    margin = {n: 0.5 * ((v - reference[pair].double()) @ torch.tensor([1.0, -1.0]).double()) for n, v in leaf.items()}
    want = (0.3 * torch.log1p(torch.exp(-margin["own"])) + 0.7 * torch.log1p(torch.exp(-margin["generic"]))).mean()
    loss = pdpo.loss(model, LogProbs(own, generic, None, pair), pdpo.Config(alpha=0.3))
    compare(loss, want, {"own": own, "generic": generic}, leaf)


# -- with a language model, for every method of the folder -------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("models") / "lm"))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return synthetic.load(users=4, pairs=24, new_users=3, support=8, query=8)


SMALL = {
    "lore": dict(rank=3),
    "pref": dict(rank=3),
    "pal": dict(variant="A", rank=2),
    "vpl": dict(latent=16),
    "mpu": dict(hidden=8),
    "pdpo": dict(soft_tokens=3, adapt_steps=5, adapt_lr=1e-2),
    "icl": dict(shots=3, max_length=768),
}
VARIANTS = [(name, {}) for name in METHODS] + [
    ("pal", {"variant": "B"}),
    ("mpu", {"pool": "mean"}),
    ("global_rm", {"pool": "mean", "step_reward": "prefix_mean"}),
    ("lore", {"alternate": True}),
    ("pdpo", {"clusters": 2}),
    ("icl", {"shots": 0}),
    ("icl", {"show": "chosen"}),
]


def config_of(name: str, folder: str, **more):
    recipe = hooks.method(name)
    fields = {"backbone": folder, **SMALL.get(name, {}), **more}
    if recipe.loss:
        fields = {"epochs": 1, "batch_size": 16, "lora_lr": 1e-2, **fields}
    return recipe.Config(**{"adapt_steps": 20, **fields} if hasattr(recipe.Config, "adapt_steps") else fields)


def scores(model, data) -> torch.Tensor:
    """What ranks a dataset's pairs under any kind of model, [N, 2]."""
    return model.pair_scores(data)[1] if hasattr(model, "pair_scores") else model.pair_logprobs(data)[0]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def tuned(request, lm_folder, rows, tmp_path_factory):
    """(name, config, model after full training, its folder before new users, the same with new users)."""
    name, more = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PReF on sparse data
        config = config_of(name, lm_folder, **more)
        model = trainer.train(name, rows, config)
        folder = tmp_path_factory.mktemp("trained") / "model"
        model.save_pretrained(folder)
        adapt.adapt(model, rows)
    return name, config, model, folder


def test_saved_and_loaded_models_score_the_same(tuned, rows, tmp_path):
    _, _, model, _ = tuned
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    query = of_split(rows, "query")
    assert torch.equal(scores(model, query), scores(again, query))
    assert scores(again, query).isfinite().all() and again.about == model.about


def test_full_training_is_seeded_and_leaves_the_base_alone(tuned, rows, lm_folder):
    name, config, model, folder = tuned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = trainer.train(name, rows, config)
    saved = load_model(folder)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    base, _ = load_lm(lm_folder)
    now = {key.replace(".base_layer", ""): value for key, value in model.backbone.state_dict().items()}
    assert all(torch.equal(value, now[key]) for key, value in base.get_decoder().state_dict().items())
    if hooks.method(name).loss:
        moved = [value for key, value in model.backbone.state_dict().items() if "lora_B" in key]
        assert moved and all(value.abs().sum() > 0 for value in moved)  # LoRA's B starts at zero


def test_the_query_set_cannot_reach_adaptation(tuned, rows):
    name, _, model, folder = tuned
    other = load_model(folder)
    new = adapt.adapt(other, of_split(rows, "support"))
    assert new == ["new_00", "new_01", "new_02"]
    query = of_split(rows, "query")
    assert torch.equal(scores(model, query), scores(other, query))
    with pytest.raises(PyargsError, match="no rows with split 'support'"):
        adapt.adapt(other, query)


def test_each_user_is_adapted_as_if_alone(tuned, rows):
    name, _, model, folder = tuned
    other = load_model(folder)
    keep = [
        i
        for i, (user, split) in enumerate(zip(rows["user_id"], rows["split"], strict=True))
        if user == "new_00" and split == "support"
    ]
    adapt.adapt(other, rows.select(keep))
    for kind, table in other.users.vectors.items():
        assert torch.equal(table[other.users.ids["new_00"]], model.users.vectors[kind][model.users.ids["new_00"]])
    mine = of_split(rows, "query").filter(lambda row: row["user_id"] == "new_00")
    torch.testing.assert_close(scores(model, mine).double(), scores(other, mine).double(), atol=2e-3, rtol=2e-3)


def test_unknown_users_raise(tuned, rows):
    name, config, model, _ = tuned
    stranger = of_split(rows, "query").select(range(2)).map(lambda row: {**row, "user_id": "new_07"})
    if model.users.personal or getattr(model, "demonstrations", None):
        with pytest.raises(UnknownUser, match="new_0"):
            scores(model, stranger)
    else:
        assert scores(model, stranger).isfinite().all()


def answers(policy, model, prompts, users, **more):
    from pyargs.decode.prompts import decode_prompts

    found = {}
    for numbers, _, decoded in decode_prompts(policy, model, prompts, users, max_new_tokens=6, **more):
        found |= dict(zip(numbers, decoded.answers(), strict=True))
    return [found[i] for i in range(len(prompts))]


def test_every_kind_of_model_decodes_and_a_row_does_not_depend_on_its_batch(tuned, rows, lm_folder):
    """Prompts of several lengths (left padding), users and weights in one batch, and each of them alone."""
    name, config, model, _ = tuned
    policy, _ = load_lm(lm_folder)
    query = of_split(rows, "query").select([0, 9, 17, 3])
    prompts = [row["prompt"] + " please" * i for i, row in enumerate(query)]
    users, weights = list(query["user_id"]), [0.0, 0.5, 5.0, 1.0]
    if hasattr(model, "head") and model.apart:
        with pytest.raises(PyargsError, match="PAL-B"):
            answers(policy, model, prompts, users, reward_weight=weights)
        assert len(answers(policy, model, prompts, users, best_of=3)) == 4
        return
    together = answers(policy, model, prompts, users, reward_weight=weights, batch_size=4)
    alone = [answers(policy, model, [p], [u], reward_weight=w)[0] for p, u, w in zip(prompts, users, weights, strict=True)]
    assert together == alone
    if hasattr(model, "pair_scores"):  # weight 0 is the policy's own greedy answer
        plain = policy.generate(
            **dict(zip(("input_ids", "attention_mask"), left_pad_prompt(model, prompts[0]), strict=True)),
            max_new_tokens=6,
            do_sample=False,
        )
        ids = plain[0, -len(together[0]) :].tolist() if together[0] else []
        assert together[0] == ids or together[0] == plain[0][left_pad_prompt(model, prompts[0])[0].shape[1] :].tolist()


def left_pad_prompt(model, prompt):
    return left_pad([encode_prompt(model.tokenizer, prompt)], 0)


@pytest.mark.parametrize("name", [name for name in METHODS if hooks.method(name).loss])
def test_a_killed_training_goes_on_where_it_was(name, rows, lm_folder, tmp_path, monkeypatch):
    """Stopped in the fifth step, with a checkpoint after every second one: the result is that of an undisturbed run."""
    config = config_of(name, lm_folder, checkpoint_steps=2, batch_size=12)
    recipe, folder = hooks.method(name), tmp_path / "checkpoints"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = trainer.train(name, rows, config)
        plain, calls = recipe.loss, []

        def stops(model, batch, config):
            calls.append(batch.step)
            if batch.step == 5:
                raise KeyboardInterrupt
            return plain(model, batch, config)

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "loss", stops)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(name, rows, config, checkpoints=folder)
        assert any(folder.iterdir())
        steps = []
        with monkeypatch.context() as patch:
            patch.setattr(recipe, "loss", lambda m, b, c: steps.append(b.step) or plain(m, b, c))
            again = trainer.train(name, rows, config, checkpoints=folder)
    assert steps[0] == 4
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", [name for name in METHODS if hooks.method(name).loss])
def test_bfloat16_backbones_have_float32_heads_and_losses(name, rows, lm_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(name, lm_folder, dtype="bfloat16", gradient_checkpointing=True, epochs=0.5)
        recipe, seen = hooks.method(name), []
        plain = recipe.loss
        recipe.loss = lambda *args: seen.append(plain(*args)) or seen[-1]
        try:
            model = trainer.train(name, rows, config)
        finally:
            recipe.loss = plain
    assert seen and all(value.dtype == torch.float32 and value.isfinite() for value in seen)
    for key, p in model.named_parameters():
        own = "lora_" in key or not key.startswith(("backbone.", "lm."))
        assert p.dtype == (torch.float32 if own else torch.bfloat16), key
    assert scores(model, of_split(rows, "train").select(range(4))).dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(hooks.method(name).Config, "freeze_backbone")])
def test_a_frozen_backbone_gives_what_the_text_gives(name, rows, lm_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for more in ({}, {"variant": "B"}) if name == "pal" else ({},):
            model = trainer.train(name, rows, config_of(name, lm_folder, freeze_backbone=True, **more))
            assert not any("lora" in key for key in model.state_dict())
            query = of_split(rows, "train").select(range(6))
            examples = fit_examples(model, query)
            with torch.no_grad():
                batch = model(**trainer._collate(examples, share=True))
                torch.testing.assert_close(model.rewards(batch), model.pair_scores(query)[1], atol=2e-5, rtol=2e-5)


def fit_examples(model, data) -> list[dict]:
    encoded, pairs = model.encode(data)
    several = lambda c, r: (0, c, r) if getattr(model, "apart", False) else (c, r)  # noqa: E731
    users = model.users.rows(data["user_id"]).tolist()
    return [
        {"prompt": encoded[g][0], "responses": [encoded[g][1][i] for i in several(c, r)], "user": u, "pair": n}
        for n, ((g, c, r), u) in enumerate(zip(pairs, users, strict=True))
    ]


def test_one_packed_pass_is_two_passes(tuned, rows):
    """A pair's responses behind one copy of their prompt, and each behind its own: the same within float32 rounding."""
    _, _, model, _ = tuned
    if not hasattr(model, "forward") or not hooks.method(model.about["method"]).loss:
        return
    examples = fit_examples(model, of_split(rows, "query").select(range(5)))
    with torch.no_grad():
        one, two = (model(**trainer._collate(examples, share=share)) for share in (True, False))
    if isinstance(model, RewardModel):
        torch.testing.assert_close(one.hidden, two.hidden, atol=5e-5, rtol=5e-5)
    else:
        torch.testing.assert_close(one.own, two.own, atol=5e-5, rtol=5e-5)


# -- language-model methods on planted users ---------------------------------------------------------------------------


def test_genarm_finds_a_global_rule(tmp_path):
    folder = str(synthetic.tiny_lm(tmp_path / "lm", tie=True))
    rows = synthetic.load(users=1, pairs=240, new_users=1, support=1, query=60, rank=1, train_test=0.0)
    config = genarm.Config(backbone=folder, lora_lr=2e-2, beta=0.5, epochs=6, target_modules=["q_proj", "v_proj", "o_proj"])
    model = trainer.train("genarm", rows, config)
    chosen, rejected = model.pair_scores(of_split(rows, "query"))[1].unbind(1)
    assert (chosen > rejected).float().mean() >= 0.9


def test_pdpo_finds_planted_users(tmp_path):
    """Users who want the opposite of each other: the adapted soft prompt must beat the generic one by 10 points."""
    folder = str(synthetic.tiny_lm(tmp_path / "lm", tie=True))
    rows = synthetic.load(users=4, pairs=100, new_users=2, support=40, query=50, rank=1, train_test=0.0)
    config = pdpo.Config(backbone=folder, lora_lr=1e-2, soft_lr=5e-2, epochs=6, adapt_lr=5e-2, adapt_steps=60)
    model = trainer.train("pdpo", rows, config)
    adapt.adapt(model, rows)
    query = of_split(rows, "query")
    ranked = lambda values: (values[:, 0] > values[:, 1]).float().mean().item()  # noqa: E731
    own = ranked(model.pair_logprobs(query)[0])
    new = torch.arange(len(model.users))[-2:]
    model.users.vectors["offset"].data[new] = 0  # the generic prompt alone
    generic = ranked(model.pair_logprobs(query)[0])
    assert own >= generic + 0.10


def test_p_dpo_and_genarm_learn_to_stop(lm_folder, rows):
    """The end token is in what they train on, and in no reported score."""
    for name in ("genarm", "pdpo"):
        model = trainer.train(name, rows, config_of(name, lm_folder, epochs=0.2))
        data = of_split(rows, "train").select(range(2))
        encoded, _ = model.encode(data)
        stop = model.tokenizer.eos_token_id
        assert all(response[-1] == stop and stop not in response[:-1] for _, several in encoded for response in several)
        lengths = [len(model.tokenizer(row[side])["input_ids"]) for row in data for side in ("chosen", "rejected")]
        if name == "pdpo":
            assert model.pair_logprobs(data)[1].flatten().tolist() == lengths


# -- demonstrations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(lm_folder, rows):
    def make(**more):
        model = trainer.train("icl", rows, config_of("icl", lm_folder, **more))
        adapt.adapt(model, rows)
        return model

    return make


def test_demonstrations_are_the_users_own_support_pairs(shown, rows):
    model = shown()
    support = of_split(rows, "support")
    row = of_split(rows, "query")[0]
    text = model.tokenizer.decode(model.prompt_ids(row["prompt"], row["user_id"]))
    own = [r for r in support if r["user_id"] == row["user_id"]]
    inside = [r for r in own if f"Preferred: {r['chosen']}\nNot preferred: {r['rejected']}" in text]
    assert len(inside) == 3 and text.count("Example") == 3
    assert text.rstrip().endswith("assistant") and f"Prompt: {row['prompt']}\nPreferred:<|im_end|>" in text
    assert not any(r["chosen"] in text for r in support if r["user_id"] != row["user_id"])
    assert row["chosen"] not in text and row["rejected"] not in text
    assert "Not preferred" not in shown(show="chosen").tokenizer.decode(shown(show="chosen").prompt_ids("tell me", "new_00"))
    again, other = shown().prompt_ids("tell me", "new_00"), shown(seed=1).prompt_ids("tell me", "new_00")
    assert model.prompt_ids("tell me", "new_00") == again != other  # seeded, and drawn anew for another seed


def test_what_is_scored_is_what_is_generated_from(shown, rows):
    """The ids before a scored response are the ids that generation starts with."""
    model = shown()
    query = of_split(rows, "query").select(range(3))
    encoded, pairs = model.encode(query, stop=False)
    for row, (group, chosen, _) in zip(query, pairs, strict=True):
        assert encoded[group][0] == model.prompt_ids(row["prompt"], row["user_id"])
        ids = torch.tensor([encoded[group][0] + encoded[group][1][chosen]])
        with torch.no_grad():
            logs = model.lm(ids).logits[0].log_softmax(-1)
        n = len(encoded[group][0])
        want = logs[n - 1 : -1].gather(1, ids[0, n:].unsqueeze(1)).sum().item()
        place = list(query["pair_id"]).index(row["pair_id"])
        assert model.pair_logprobs(query)[0][place, 0].item() == pytest.approx(want, abs=1e-3)


def test_too_long_prompts_lose_the_farthest_demonstrations_first(shown):
    model = shown()
    full = model.prompt_ids("tell me about the old one", "new_00")
    examples = lambda ids: re.sub(r"Example \d+\n", "", model.tokenizer.decode(ids))  # noqa: E731
    text = examples(full)
    alone = len(encode_prompt(model.tokenizer, "tell me about the old one"))
    for room in range(len(full) - alone - 1, -1, -7):
        model.demonstrations.demonstration_tokens = room
        cut = model.prompt_ids("tell me about the old one", "new_00")
        left = examples(cut)
        assert alone <= len(cut) <= alone + room and "tell me about" in left
        if "Prompt:" in left:  # the last demonstrations, in order, are those that stay
            assert left[left.index("Prompt:") :] in text
    with pytest.raises(PyargsError, match="no room"):
        model.prompt_ids("tell me about the old one", "new_00", 4)
    model.demonstrations.instruction = "tell me about the "
    room = len(encode_prompt(model.tokenizer, "tell me about the"))
    with pytest.raises(PyargsError, match="no room behind the instruction"):
        model.prompt_ids("tell me about the old one " + "old " * 20, "new_00", room)


def test_contents_are_cut_and_the_instruction_is_said_once(shown):
    model = shown(content_tokens=2, instruction="tell me ")
    model.demonstrations.of_user["new_00"] = [{"prompt": "tell me one two old new", "chosen": "cat", "rejected": "saw"}]
    text = model.tokenizer.decode(model.prompt_ids("tell me about it", "new_00"))
    assert "Prompt: one two\nPreferred: cat" in text and "Prompt: about it\n" in text and text.count("tell me") == 1


def test_conversations_lose_their_oldest_turns_and_contents_must_be_text(shown):
    model = shown()
    turns = [{"role": role, "content": f"old {n} please " * 5} for n in range(20) for role in ("user", "assistant")]
    prompt = [*turns, {"role": "user", "content": "tell me"}]
    cut = model.tokenizer.decode(model.prompt_ids(prompt, "new_00", 200))
    assert "tell me" in cut and "old 0 " not in cut
    with pytest.raises(PyargsError, match="must be a str"):
        model.prompt_ids([{"role": "user", "content": ["tell me"]}], "new_00")


def test_a_cut_prompt_is_the_same_for_every_response(shown, rows):
    """However long the response to be scored is: the demonstrations that fit do not depend on it."""
    model = shown()
    whole = len(model.prompt_ids("tell me", "new_00"))
    model.demonstrations.demonstration_tokens = whole - len(encode_prompt(model.tokenizer, "tell me")) - 5
    query = of_split(rows, "query").select(range(2)).map(lambda row: {"prompt": "tell me", "user_id": "new_00"})
    long = query.map(lambda row: {"chosen": row["chosen"] * 30})
    (one, _), (two, _) = model.encode(query), model.encode(long)
    assert one[0][0] == two[0][0] == model.prompt_ids("tell me", "new_00") and len(one[0][0]) <= whole - 5


def test_retrieval_puts_the_most_similar_last(shown, monkeypatch):
    from pyargs.models import demonstrations

    vectors = {"tell me": [1.0, 0.0]}
    monkeypatch.setattr(demonstrations, "embed", lambda name, texts: torch.tensor([vectors.get(t, [0.0, 1.0]) for t in texts]))
    model = shown(retrieve="minilm", shots=2)
    pairs = model.demonstrations.of_user["new_00"]
    vectors |= {pairs[2]["prompt"]: [0.9, 0.1], pairs[5]["prompt"]: [0.5, 0.5]}
    assert model.demonstrations.choose("tell me", "new_00") == [pairs[5], pairs[2]]


def test_retrieval_by_words_and_without_the_instruction(shown):
    """BM25 over contents: the instruction, which all prompts begin with, says nothing about what is similar."""
    model = shown(retrieve="bm25", shots=2, instruction="cat cat cat cat: ")
    texts = ["red dog near hill", "cat", "blue fox", "blue fox near hill", "rain"]
    pairs = [{"prompt": f"cat cat cat cat: {text}", "chosen": "a", "rejected": "b"} for text in texts]
    model.demonstrations.of_user["new_00"] = pairs
    assert model.demonstrations.choose("cat cat cat cat: fox on a hill blue", "new_00") == [pairs[2], pairs[3]]
    # Nothing in common: the user's first pairs, not an error.
    assert model.demonstrations.choose("cat cat cat cat: zzz", "new_00") == [pairs[1], pairs[0]]


def test_retrieval_by_any_sentence_encoder(shown, lm_folder, rows):
    model = shown(retrieve=str(lm_folder), shots=3)
    row = of_split(rows, "query")[0]
    chosen = model.demonstrations.choose(row["prompt"], row["user_id"])
    own = model.demonstrations.of_user[row["user_id"]]
    from pyargs.lm.embed import embed

    query, *vectors = embed(str(lm_folder), [row["prompt"], *(pair["prompt"] for pair in own)])
    order = sorted(range(len(own)), key=lambda i: vectors[i] @ query)[-3:]
    assert chosen == [own[i] for i in order]


def test_fields_are_called_as_the_data_call_them(shown):
    model = shown(shots=1, prompt_name="Abstract", response_name="title", instruction="tell me ")
    model.demonstrations.of_user["new_00"] = [{"prompt": "tell me one", "chosen": "cat", "rejected": "saw"}]
    text = model.tokenizer.decode(model.prompt_ids("tell me two", "new_00"))
    assert "Abstract: one\nPreferred title: cat\nNot preferred title: saw\n\nAbstract: two\nPreferred title:<|im_end|>" in text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(30, 400), st.integers(1, 80), st.integers(0, 6), st.sampled_from(["random", "bm25"]))
def test_template_and_instruction_are_never_cut(shown, room, length, count, retrieve):
    model = shown(instruction="say that: ", shots=5, retrieve=retrieve)
    words = "old new one two red blue".split()
    model.demonstrations.of_user["new_00"] = [
        {"prompt": f"say that: {words[i % 6]} hill " + "lake " * i, "chosen": "cat", "rejected": "saw"} for i in range(count)
    ]
    model.demonstrations.demonstration_tokens = room
    ids = model.prompt_ids("say that: " + " ".join(words[i % 6] for i in range(length)), "new_00", 40)
    text = model.tokenizer.decode(ids)
    assert len(ids) <= 40 + room and text.count("say that:") == 1
    assert text.startswith("<|im_start|>user\nsay that:") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    shown_now = text.count("Example ")
    assert shown_now <= min(5, count) and ("old" in text.split("Example")[-1] or length == 0)


def test_zero_shots_is_the_policy_as_it_is(shown, lm_folder):
    model = shown(shots=0)
    assert model.prompt_ids("tell me", "anybody") == encode_prompt(model.tokenizer, "tell me")


# -- decoders ----------------------------------------------------------------------------------------------------------


def test_plain_decoding_ignores_the_checkpoints_own_settings(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = unguided.generate(policy, prompts, max_new_tokens=8)
    policy.generation_config.repetition_penalty, policy.generation_config.do_sample = 5.0, True
    assert torch.equal(unguided.generate(policy, prompts, max_new_tokens=8).tokens, before.tokens)
    ids = torch.tensor([prompts[0]])
    for token in before.answers()[0]:
        assert policy(ids).logits[0, -1].argmax().item() == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    one, two = (unguided.generate(policy, prompts, max_new_tokens=8, do_sample=True, seed=s).tokens for s in (1, 1))
    assert torch.equal(one, two)
    assert unguided.generate(policy, [], max_new_tokens=8).tokens.shape[0] == 0


def test_a_soft_prompt_is_embeddings_before_the_prompt(lm_folder, rows):
    model = trainer.train("pdpo", rows, config_of("pdpo", lm_folder, epochs=0.5))
    from pyargs.decode import unguided

    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_01", "user_00"]
    found = unguided.generate(model, prompts, users, max_new_tokens=5).answers()
    for prompt, user, answer in zip(prompts, users, found, strict=True):
        soft = model.soft(model.users.rows([user]))
        for n in range(len(answer)):
            embeds = torch.cat([soft, model.lm.get_input_embeddings()(torch.tensor([prompt + answer[:n]]))], dim=1)
            assert model.lm(inputs_embeds=embeds).logits[0, -1].argmax().item() == answer[n]


def test_p_dpo_scores_against_plain_passes(lm_folder, rows):
    """Soft prompt, prompt and response as one causal sequence: the same log-probs; the reference is the base model."""
    model = trainer.train("pdpo", rows, config_of("pdpo", lm_folder, epochs=0.5))
    base, _ = load_lm(lm_folder)
    query = of_split(rows, "train").select(range(3))
    total, _ = model.pair_logprobs(query)
    untrained = model.untrained(query, stop=False)
    words = model.lm.get_input_embeddings()
    for n, row in enumerate(query):
        prompt = model.prompt_ids(row["prompt"], row["user_id"])
        soft = model.soft(model.users.rows([row["user_id"]]))
        for side, text in enumerate((row["chosen"], row["rejected"])):
            response = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + response])
            picked = torch.tensor(response).unsqueeze(1)
            with torch.no_grad():
                logs = model.lm(inputs_embeds=torch.cat([soft, words(ids)], dim=1)).logits[0].log_softmax(-1)
                plain = base(ids).logits[0].log_softmax(-1)
            start = soft.shape[1] + len(prompt) - 1
            assert total[n, side].item() == pytest.approx(logs[start:-1].gather(1, picked).sum().item(), abs=1e-3)
            assert untrained[n, side].item() == pytest.approx(
                plain[len(prompt) - 1 : -1].gather(1, picked).sum().item(), abs=1e-3
            )


def test_p_dpo_scores_with_a_model_that_cannot_branch(rows):
    """Layers that follow no mask get a row for each response: the second one must not see the first."""
    from conftest import tiny_lm

    from pyargs.models.user_policy import SoftPrompt, UserPolicy

    tokenizer = synthetic.tiny_tokenizer()
    lm = tiny_lm("mistral", vocab=len(tokenizer), dtype=torch.float32)
    model = UserPolicy(lm, tokenizer, soft=SoftPrompt(torch.randn(1, 3, 32), Users(["user_00"], offset=torch.randn(1, 3, 32))))
    query = of_split(rows, "train").filter(lambda row: row["user_id"] == "user_00").select(range(3))
    swapped = query.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    torch.testing.assert_close(model.pair_logprobs(query)[0], model.pair_logprobs(swapped)[0].flip(1))


def test_p_dpo_starts_from_embeddings_of_tokens(lm_folder, rows):
    lm, tokenizer = load_lm(lm_folder)
    model = pdpo.build(lm, tokenizer, USERS, pdpo.Config())
    table = lm.get_input_embeddings().weight.detach()
    for start in (*model.users.vectors["offset"], model.soft.centres[0]):
        assert all((table == token).all(1).any() for token in start.detach())
    user = torch.tensor([0, 2, -1])
    want = model.soft.centres + torch.stack([*model.users.vectors["offset"][[0, 2]], torch.zeros(8, table.shape[1])])
    torch.testing.assert_close(model.soft(user), want)
    same = of_split(rows, "train").select([0]).map(lambda row: {"rejected": row["chosen"], "user_id": "a"})
    total, _ = model.pair_logprobs(same)
    assert total[0, 0] == total[0, 1]  # one text twice is a tie


def test_vpl_adapts_on_states_of_the_untrained_backbone(lm_folder, rows):
    model = trainer.train("vpl", rows, config_of("vpl", lm_folder))
    base = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    support = of_split(rows, "support")
    torch.testing.assert_close(vpl.support(model, support).hidden, base.read(support).hidden, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(model.read(support).hidden, base.read(support).hidden, atol=1e-3)


def test_lore_alt_moves_in_turn_in_full_training(lm_folder, rows, monkeypatch):
    moved = []
    plain = lore.loss

    def loss(model, batch, config):
        moved.append((model.users.vectors["mixture"].detach().clone(), model.head.directions.detach().clone()))
        return plain(model, batch, config)

    monkeypatch.setattr(lore, "loss", loss)
    trainer.train("lore", rows, config_of("lore", lm_folder, alternate=True, epochs=0.5, warmup=0.0))
    for number, (one, two) in enumerate(zip(moved, moved[1:], strict=False)):
        mixtures, directions = (not torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert (mixtures, directions) == ((True, False) if number % 2 == 0 else (False, True)), number


@pytest.mark.parametrize("name, rate", [("lore", 5e-5), ("genarm", 5e-4), ("pdpo", 5e-5)])
def test_lora_has_its_own_learning_rate(name, rate, lm_folder):
    from pyargs.lm import lora

    lm, tokenizer = load_lm(lm_folder)
    config = hooks.method(name).Config(backbone=lm_folder)
    model = hooks.method(name).build(lm, tokenizer, USERS, config)
    lm.requires_grad_(False)
    lora.add(lm.get_decoder(), rank=8, alpha=16, rslora=True, target_modules=None)
    found = optimized(model, name, config)
    adapter = [p for key, p in model.named_parameters() if "lora_" in key]
    assert adapter and all(found[p] == (rate, 0, False) for p in adapter)
    assert not any(
        p in found for key, p in model.named_parameters() if key.startswith(("backbone.", "lm.")) and "lora_" not in key
    )
    if name == "pdpo":
        assert all(found[p] == (1e-3, 0, False) for p in model.soft.parameters())


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for number, complete in ((2, True), (4, True), (10, False)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{number}" / trainer.COMPLETE).touch()
    assert trainer._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-10").exists()
    assert trainer._last_checkpoint(tmp_path / "none") is None


def test_known_users_and_useless_steps_raise_before_any_work(lm_folder, rows, monkeypatch):
    for name in ("icl", "vpl", "lore"):
        model = trainer.train(name, rows, config_of(name, lm_folder, **({} if name == "icl" else {"epochs": 0.1})))
        adapt.adapt(model, rows)
        monkeypatch.setattr(type(model), "read", lambda *_: pytest.fail("work before the check"), raising=False)
        with pytest.raises(PyargsError, match="is there already: ask for it"):
            adapt.adapt(model, rows)
        monkeypatch.undo()
        if name != "lore":
            with pytest.raises(PyargsError, match="takes no steps"):
                adapt.adapt(model, rows, steps=3)


def test_impossible_ways_to_decode_raise(lm_folder, rows, monkeypatch):
    from pyargs.decode import unguided

    policy, _ = load_lm(lm_folder)
    lore_model = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    self_answering = trainer.train("icl", rows, config_of("icl", lm_folder, shots=0))
    ask = lambda model, **more: answers(policy, model, ["tell me"], ["user_00"], reward_weight=1.0, **more)  # noqa: E731
    with pytest.raises(PyargsError, match="answers by itself"):
        ask(self_answering, best_of=2)
    with pytest.raises(PyargsError, match="whole vocabulary"):
        ask(lore_model, num_candidates=None)
    with pytest.raises(PyargsError, match="samples anyway"):
        ask(lore_model, best_of=2, do_sample=True)
    temperatures = []
    generate = unguided.generate
    monkeypatch.setattr(unguided, "generate", lambda *a, **k: temperatures.append(k["temperature"]) or generate(*a, **k))
    ask(lore_model, best_of=2, temperature=None)
    assert temperatures == [1.0]
    with pytest.raises(PyargsError, match="positions"):
        generate(policy, [[5, 6]], max_new_tokens=5000)


def test_rows_of_the_logits_that_are_no_tokens_are_never_drawn(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    policy.resize_token_embeddings(len(tokenizer) + 64)
    policy.get_output_embeddings().weight.data[-64:] = 3 * policy.get_output_embeddings().weight.data[:64]
    drawn = unguided.generate(policy, [[5, 6, 7]] * 64, max_new_tokens=4, do_sample=True, seed=0).tokens
    assert drawn.max() < len(tokenizer)


@pytest.mark.parametrize("whole", [False, True])
def test_tokenwise_decoding_against_its_formula(lm_folder, rows, whole):
    from pyargs.decode import genarm

    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids, mask = left_pad(prompts, 0)
    weights, k = [0.0, 1.5], None if whole else 5
    decoded = genarm.generate(policy, model, ids, mask, reward_weight=weights, num_candidates=k, max_new_tokens=6)
    for prompt, weight, answer, reward in zip(prompts, weights, decoded.answers(), decoded.rewards, strict=True):
        for n, token in enumerate(answer):
            context = torch.tensor([prompt + answer[:n]])
            logs = policy(context).logits[0, -1].log_softmax(-1)
            rewards = model.lm(context).logits[0, -1].log_softmax(-1)
            candidates = logs.topk(k or len(logs)).indices
            best = candidates[(logs + weight * rewards)[candidates].argmax()]
            assert token == best.item() and reward[n].item() == pytest.approx(rewards[token].item(), abs=1e-3)
    # sampling: seeded by row, the same alone
    options = dict(num_candidates=k, max_new_tokens=6, do_sample=True, reward_weight=1.0)
    both = genarm.generate(policy, model, ids, mask, seed=[3, 4], **options).answers()
    alone = genarm.generate(policy, model, torch.tensor([prompts[1]]), None, seed=[4], **options).answers()
    assert both[1] == alone[0] and both == genarm.generate(policy, model, ids, mask, seed=[3, 4], **options).answers()


def test_a_model_without_a_head_is_sent_to_its_own_decoder(lm_folder, rows):
    from pyargs import generate

    policy, _ = load_lm(lm_folder)
    for name, decoder in (("genarm", "tokenwise"), ("icl", "plain")):
        model = trainer.train(name, rows, config_of(name, lm_folder, **({"epochs": 0.1} if name == "genarm" else {})))
        with pytest.raises(PyargsError, match=decoder):
            generate(policy, model, torch.tensor([[5, 6]]), None, ["user_00"])


def test_genarms_own_sampling_follows_its_distribution(lm_folder, rows):
    from pyargs.decode import genarm

    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    n, prompt = 4000, torch.tensor([[5, 6, 7]])
    drawn = genarm.generate(
        policy, model, prompt.repeat(n, 1), None, num_candidates=None, do_sample=True, max_new_tokens=1, seed=0
    ).tokens[:, 0]
    logs = policy(prompt).logits[0, -1].log_softmax(-1) + model.lm(prompt).logits[0, -1].log_softmax(-1)
    expected = logs.softmax(-1)[: len(model.tokenizer)]
    count = torch.bincount(drawn, minlength=len(expected)).float()
    # a stop token is drawn like any other
    assert ((count / n - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()


def test_best_of_n_takes_the_best_sample(lm_folder, rows):
    from pyargs.decode import best_of_n

    policy, _ = load_lm(lm_folder)
    model = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_00", "user_01"]
    best, rewards = best_of_n.generate(policy, model, prompts, users, n=5, max_new_tokens=6, seed=3)
    assert rewards.shape == (2, 5)
    for decoded, reward, prompt, user in zip(best, rewards, prompts, users, strict=True):
        (answer,) = decoded.answers()
        assert model.score([(prompt, [answer])], [user])[0].item() == pytest.approx(reward.max().item(), abs=1e-5)
    alone, _ = best_of_n.generate(policy, model, prompts[1:], users[1:], n=5, max_new_tokens=6, seed=[3 * 1_000_003 + 1])
    assert alone[0].answers() == best[1].answers()
    with pytest.raises(UnknownUser):
        best_of_n.generate(policy, model, prompts, ["user_00", "nobody"], n=2)
    with pytest.raises(PyargsError, match="at least 1"):
        best_of_n.generate(policy, model, prompts, users, n=0)
