"""pyargs: personalized reward-guided decoding.

The public names below are imported on first use, so that `import pyargs` (and `pyargs --help`) stays fast.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "RewardModel": "pyargs.models.reward_model",
    "guide": "pyargs.integrations.transformers",
    "RewardLogitsProcessor": "pyargs.integrations.logits_processor",
    "Engine": "pyargs.decode.engine",
    "Policy": "pyargs.decode.policy",
    "Scorer": "pyargs.decode.scorer",
    "load_lm": "pyargs.lm.loading",
    "load_pairs": "pyargs.data:load",
    "load_model": "pyargs.models",
    "train": "pyargs.learn",
    "adapt": "pyargs.training.adapt",
    "forget": "pyargs.models",
    "push_to_hub": "pyargs.publish.pushing",
    "topk_logprobs": "pyargs.ops",
    "score_select": "pyargs.ops",
    "tokenwise_select": "pyargs.ops",
    "user_mlp": "pyargs.ops",
    "PyargsError": "pyargs.errors",
}

_MOVED = {"args": "pyargs.guide(model, users)", "generate": "pyargs.Engine(policy, model).generate(prompts, users)"}
"""Names of before, and what stands in their place."""

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _MOVED:
        raise AttributeError(f"pyargs.{name} is gone: write {_MOVED[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'pyargs' has no attribute '{name}'")
    module, _, own = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), own or name)


def __dir__() -> list[str]:
    return sorted(__all__)
