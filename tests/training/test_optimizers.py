"""Every part has its rate; gradients are cut to a length, dense and sparse alike, only if that is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import planted
import pytest
import torch
from formulas import USERS
from hypothesis import given
from hypothesis import strategies as st

from pyargs.lm.loading import load_lm
from pyargs.methods import pal
from pyargs.training import hooks, optimizers


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.booleans())
def test_gradients_are_cut_as_torch_cuts_dense_ones(seed, most, sparse):
    torch.manual_seed(seed)
    table, dense = torch.nn.Embedding(6, 3, sparse=sparse), torch.nn.Linear(3, 2)
    rows = torch.tensor([1, 4, 1])  # one of them twice: its parts add up

    def gradients() -> list[torch.Tensor]:
        for module in (table, dense):
            module.zero_grad()
        dense(table(rows)).square().sum().backward()
        return [p.grad for module in (table, dense) for p in module.parameters()]

    right = [grad.to_dense().clone() for grad in gradients()]
    length = torch.stack([grad.norm() for grad in right]).norm()
    own = gradients()
    optimizers.clip([*table.parameters(), *dense.parameters(), torch.nn.Parameter(torch.ones(2))], most)
    for grad, one in zip(own, right, strict=True):
        torch.testing.assert_close(grad.to_dense(), one * min(1.0, most / float(length)))


@pytest.mark.parametrize("most", [0.0, 0.5])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_cuts_what_it_applies(most, sparse):
    """Also where two optimisers act as one. A step of Adam with epsilon 1e-8 does not show the length: the gradients do."""
    users, head = torch.nn.Embedding(4, 3, sparse=sparse), torch.nn.Linear(3, 1)
    groups = [{"params": users.parameters(), "lr": 0.1, "sparse": sparse}, {"params": head.parameters(), "lr": 0.1}]
    recipe = SimpleNamespace(parameter_groups=lambda model, config: groups)
    model = SimpleNamespace(backbone=torch.nn.Linear(2, 2).requires_grad_(False))
    optimizer = optimizers.make(recipe, model, SimpleNamespace(max_grad_norm=most, lora_lr=0.1))
    assert isinstance(optimizer, optimizers.Together) == sparse
    (100 * head(users(torch.tensor([0, 2]))).sum()).backward()
    optimizer.step()
    grads = [p.grad.to_dense() for module in (users, head) for p in module.parameters()]
    length = torch.stack([grad.norm() for grad in grads]).norm()
    assert length == pytest.approx(0.5) if most else length > 10


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
