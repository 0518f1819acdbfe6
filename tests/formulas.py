"""What holds a loss and its gradients to a formula in float64."""

from __future__ import annotations

import planted
import pytest
import torch

from pyargs.types import Batch

USERS = ["a", "b", "c", "d"]


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
