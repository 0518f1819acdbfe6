"""The optimizer of training: learning rates by group, sparse gradients of user tables, clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Together(torch.optim.Optimizer):
    """Several optimisers as one, for schedulers and the Trainer. It has the same parameter groups as they have."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for one in optimizers for group in one.param_groups], {})

    def step(self, closure=None) -> None:
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict:
        return {str(number): one.state_dict() for number, one in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for number, one in enumerate(self.optimizers):
            one.load_state_dict(state[str(number)])  # which replaces its groups
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]


def make(recipe, model, config) -> torch.optim.Optimizer:
    """AdamW over the recipe's `parameter_groups` and LoRA at lora_lr; decay where a group has it.

    A group with "sparse" goes to SparseAdam: rows of users who are not in a minibatch then keep values and moments, while Adam
    would move them by momentum.
    """
    groups = [
        *recipe.parameter_groups(model, config),
        {"params": model.backbone.parameters(), "lr": getattr(config, "lora_lr", 0.0)},
    ]
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    dense = [group for group in groups if group["params"] and not group.get("sparse")]
    sparse = [group for group in groups if group["params"] and group.pop("sparse", False)]
    found = [torch.optim.AdamW(dense, betas=(0.9, 0.999), weight_decay=0.0)] if dense else []
    found += [torch.optim.SparseAdam(sparse, betas=(0.9, 0.999))] if sparse else []
    optimizer = found[0] if len(found) == 1 else Together(*found)
    if config.max_grad_norm:
        optimizer.register_step_pre_hook(lambda *_: clip([p for g in groups for p in g["params"]], config.max_grad_norm))
    return optimizer


def clip(parameters: Iterable[torch.nn.Parameter], most: float) -> None:
    """Scales all gradients, sparse ones too, so that their norm together is at most `most`."""
    found = [p.grad for p in parameters if p.grad is not None]
    parts = [grad.coalesce().values() if grad.is_sparse else grad for grad in found]
    length = torch.stack([part.float().norm() for part in parts]).norm() if parts else torch.zeros((), dtype=torch.float32)
    for grad in found if length > most else ():
        grad.mul_(most / length.to(grad.device))
