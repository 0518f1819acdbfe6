"""The unit of `strength`: the spread of a model's rewards within the candidates of a policy's unguided text.

Rewards have no natural unit: the same raw weight is weak for one model and wild for another. A trained model carries its
spread under its own backbone's language model. For another policy it is measured once, on the embedded prompts, and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pyargs import files
from pyargs.config import check_kinds
from pyargs.data import demo
from pyargs.decode.answer import Answer
from pyargs.errors import PyargsError
from pyargs.files import short_hash
from pyargs.lm.loading import fingerprint
from pyargs.lm.structure import Watch, contents

log = logging.getLogger("pyargs")
PROMPTS, TOKENS = 16, 16
"""Prompts that are answered unguided, and tokens of each answer, with the default number of candidates: 256 steps."""


def reward_std(answers: Sequence[Answer]) -> float:
    """Standard deviation of the candidates' rewards: root mean square over all steps of unguided answers, 0 without any."""
    spreads = torch.tensor([spread for answer in answers for spread in answer.spreads], dtype=torch.float64, device="cpu")
    return spreads.square().mean().sqrt().item() if len(spreads) else 0.0


def known(policy: nn.Module, model) -> float | None:
    """reward_std for this policy, as the model carries it or as it was measured and kept; None if it was never measured.

    Raises PyargsError for a model that carries no reward_std at all.
    """
    carried = model.about.get("reward_std")
    if carried is None:
        raise PyargsError(
            "this model carries no reward_std, the unit of strength: give reward_weight (of `pyargs tune`, say), or train it "
            "with `pyargs train`"
        )
    found = carried.get(_fingerprint(policy))
    if found is None and (file := _file(policy, model)).exists():
        kept = files.read_json(file)
        check_kinds(kept, {"reward_std": float}, f"{file} is damaged, remove it")
        found = kept["reward_std"]
    return found


def unit(policy: nn.Module, model, unguided: Callable[[list[str], list[str]], Sequence[Answer]]) -> float:
    """reward_std of the model under the policy, measured where it is not known. unguided: answers prompts for users."""
    found = known(policy, model)
    if found is None:
        log.warning("the model's reward_std is not known for this policy: measuring it once, on the embedded prompts")
        found = reward_std(unguided(*sample(model)))
        keep(policy, model, found)
    if not found:
        raise PyargsError("the rewards of the candidates never differ: the model has learnt nothing that could guide")
    return found


def sample(model) -> tuple[list[str], list[str]]:
    """Prompts of the embedded set, and users of the model in turns, to measure another policy on."""
    prompts, users = demo.prompts("query")[:PROMPTS], list(model.known_users)[:PROMPTS] or [""]
    return prompts, [users[i % len(users)] for i in range(len(prompts))]


def keep(policy: nn.Module, model, value: float) -> None:
    """Keeps reward_std in the user's cache for later engines."""
    file = _file(policy, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, {"reward_std": value})


_fingerprints: WeakKeyDictionary[nn.Module, tuple[Watch, str]] = WeakKeyDictionary()


def _fingerprint(policy: nn.Module) -> str:
    """Hash of the policy's decoder, computed again only when it changes."""
    decoder = policy.get_decoder()
    watch, found = _fingerprints.get(policy, (None, None))
    if watch is None or watch.changed():
        found = fingerprint(decoder)
        _fingerprints[policy] = Watch(decoder), found
    return found


def _file(policy: nn.Module, model):
    """The file for this policy and this model. Its name does not depend on users, so that it holds for new users, too."""
    others = "backbone.", "lm.", "head.users."
    own = [value for name, value in model.state_dict().items() if not name.startswith(others) or "lora_" in name]
    what = {"policy": _fingerprint(policy), "model": [digest.hex() for digest in contents(own)], "prompts": [PROMPTS, TOKENS]}
    return files.cache_dir() / "strength" / f"{short_hash(what)}.json"
