"""PAL: its formulas, the short cut by which new users are fitted, and folders of the older form."""

from __future__ import annotations

import math

import planted
import pytest
import torch
from formulas import USERS, compare, leaves, some_batch
from small import edit, saved
from torch.nn import functional as F

from pyargs import load_model
from pyargs.errors import PyargsError
from pyargs.methods import pal
from pyargs.training import adapt
from pyargs.types import Batch, Features


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


def pal_a_by_hand(head, hidden, user, residual: str):
    """-|f(h) - q_u| in float64."""
    p = {name: value.detach().double() for name, value in head.state_dict().items()}
    layer = lambda x, name: x @ p[f"project.{name}.weight"].T + p[f"project.{name}.bias"]  # noqa: E731

    def f(x):
        one = layer(x, "first").relu()
        two = layer(one, "second").relu()
        return x + layer(two, "third") if residual == "input" else layer(two + one, "third")

    ideal = f(p["users.vectors.mixture"].softmax(-1) @ p["prototypes"])
    return -(f(hidden.double()) - ideal[user]).norm(dim=-1)


def test_pal_a_is_the_originals_and_folders_of_the_older_form_keep_it(lm_folder, tmp_path):
    config = pal.Config(variant="A", rank=3, backbone=lm_folder)
    model = saved(pal, config, tmp_path / "new", lm_folder)
    hidden, user = torch.randn(5, model.head.config()["dim"]), torch.tensor([0, 3, 2, 2, 1])
    for residual in ("input", "hidden"):
        if residual == "hidden":  # as it was saved before
            edit(tmp_path / "new", lambda config: config["head"].pop("residual"))
        again = load_model(tmp_path / "new")
        want = pal_a_by_hand(again.head, hidden, user, residual)
        torch.testing.assert_close(again.head(hidden, user).double(), want, atol=1e-5, rtol=1e-5)
        again.save_pretrained(tmp_path / "again")  # what a folder means stays what it is
        torch.testing.assert_close(load_model(tmp_path / "again").head(hidden, user).double(), want, atol=1e-5, rtol=1e-5)
    edit(tmp_path / "new", lambda config: config["head"].update(residual="twice"))
    with pytest.raises(PyargsError, match="residual"):
        load_model(tmp_path / "new")


def test_pal_a_refuses_a_width_that_its_sum_does_not_have():
    with pytest.raises(PyargsError, match="leave width at 0"):
        pal.build(planted.Backbone(), None, USERS, pal.Config(variant="A", width=planted.DIM + 1))
    pal.build(planted.Backbone(), None, USERS, pal.Config(variant="A", width=planted.DIM))
    pal.build(planted.Backbone(), None, USERS, pal.Config(variant="B", width=planted.DIM + 1))
