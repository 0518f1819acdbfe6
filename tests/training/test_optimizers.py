"""Gradients are cut to a length, dense and sparse alike, only if that is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyargs.training import optimizers


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
    recipe = SimpleNamespace(groups=lambda model, config: groups)
    model = SimpleNamespace(backbone=torch.nn.Linear(2, 2).requires_grad_(False))
    optimizer = optimizers.make(recipe, model, SimpleNamespace(max_grad_norm=most, lora_lr=0.1))
    assert isinstance(optimizer, optimizers.Together) == sparse
    (100 * head(users(torch.tensor([0, 2]))).sum()).backward()
    optimizer.step()
    grads = [p.grad.to_dense() for module in (users, head) for p in module.parameters()]
    length = torch.stack([grad.norm() for grad in grads]).norm()
    assert length == pytest.approx(0.5) if most else length > 10
