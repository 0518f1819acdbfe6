"""The reward model's side of rows that vLLM samples: told their tokens, it guides their logits."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from pyargs.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

# What vLLM's front-end process imports to check requests stays light: torch and the model come with `Guided`.

MODEL = "PYARGS_VLLM_MODEL"
NAMES = "pyargs_user", "pyargs_reward_weight", "pyargs_num_candidates"
MOST = 64
"""Candidates that the top-k kernels take (`pyargs.ops.topk_logprobs.MAX_K`)."""


@dataclass(frozen=True)
class Wish:
    """What a request asks for: user, raw weight and candidates; stop: tokens that end it."""

    user: str
    weight: float
    candidates: int
    stop: frozenset[int]


@dataclass(eq=False)
class Row:
    """A guided request. tokens: prompt and answer so far, which grow as vLLM samples."""

    wish: Wish
    tokens: Sequence[int] = ()
    name: int = field(default_factory=itertools.count().__next__)
    read: list[int] = field(default_factory=list)  # what the reward model has of it
    so_far: float = 0.0  # the reward of that, which a stop token earns
    tried: dict[int, float] = field(default_factory=dict)  # rewards of the last candidates


def folder() -> Path:
    name = os.environ.get(MODEL)
    if not name:
        raise ValueError(f"set {MODEL} to the folder of the model that guides, in the environment that vLLM starts in")
    return Path(name)


def wish_of(params) -> Wish | None:
    """What a request's `extra_args` ask for; None where it names no user. Raises ValueError, which vLLM answers with 400."""
    given = {name: value for name, value in (getattr(params, "extra_args", None) or {}).items() if name.startswith("pyargs_")}
    if unknown := sorted(given.keys() - set(NAMES)):
        raise ValueError(f"there is no '{unknown[0]}': a request has {', '.join(NAMES)}")
    user = given.get(NAMES[0])
    if user is None:
        if given:
            raise ValueError(f"{next(iter(given))} is about a user's reward: name the user, {NAMES[0]}")
        return None
    weight, candidates = given.get(NAMES[1], 1.0), given.get(NAMES[2], 10)
    if not isinstance(user, str):
        raise ValueError(f"{NAMES[0]} is the id of a user, a str, got {user!r:.60}")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"{NAMES[1]} is a finite number, the raw weight, got {weight!r:.60}")
    if isinstance(candidates, bool) or not isinstance(candidates, Real) or candidates not in range(1, MOST + 1):
        raise ValueError(f"{NAMES[2]} is a whole number, 1 to {MOST}, got {candidates!r:.60}")
    known = _users(folder(), _changed(folder()))
    if known and user not in known:
        from pyargs.errors import did_you_mean

        raise ValueError(f"there is no user '{user}' in {folder()}." + did_you_mean(user, known))
    return Wish(user, float(weight), int(candidates), frozenset(getattr(params, "all_stop_token_ids", ())))


def _changed(place: Path) -> int:
    return (place / "users.json").stat().st_mtime_ns


@lru_cache(1)
def _users(place: Path, _: int) -> frozenset[str]:
    """The users whom the folder knows; none where the model is the same for everyone."""
    from pyargs.files import read_json

    return frozenset(read_json(place / "users.json"))


class Guided:
    """A RewardModel or TokenReward beside vLLM's sampler, with a cache of its own for each row.

    device: where it runs; config: vLLM's `model_config`. Raises ValueError for a model that cannot guide there, so that no
    request ends the batch that it is in.
    """

    def __init__(self, device, config):
        import torch

        import pyargs
        from pyargs.models.reward_model import RewardModel
        from pyargs.models.token_reward import TokenReward

        self.model = pyargs.load_model(folder(), device=torch.device(device)).merge()
        if not isinstance(self.model, (RewardModel, TokenReward)):
            raise ValueError(f"{folder()} answers by itself and guides nobody: {MODEL} is a RewardModel or a TokenReward")
        if isinstance(self.model, RewardModel) and self.model.step_reward != "token":
            raise ValueError(
                f"{folder()} counts the mean of its rewards so far, which is not done inside vLLM: train without it"
            )
        self.tokenwise, self._room, self._half = isinstance(self.model, TokenReward), 0, None
        self._rows: dict[int, Row] = {}  # those that the half has, by name
        self._make_room(1)
        _check(self.model, self._half.shared, config)

    def guide(self, logits: Tensor, rows: Sequence[tuple[int, Row]]) -> None:
        """Writes log pi + w r in the place of the logits of each row's candidates, and -inf of all other tokens.

        logits: float [n, V]; rows: the place among them, and the row, whose tokens are all that the next one follows.
        Raises RuntimeError where a reward is no number.
        """
        import torch

        from pyargs.ops import topk_logprobs

        if not rows:
            return
        self._read([row for _, row in rows])
        places, several = [place for place, _ in rows], [row for _, row in rows]
        own = logits[places]
        known = min(own.shape[1], len(self.model.backbone.get_input_embeddings().weight))
        k = min(max(row.wish.candidates for row in several), known)
        logprobs, candidates, _ = topk_logprobs(own[:, :known].float().contiguous(), k)
        rewards = self._rewards(several, candidates)
        for row, ids, values in zip(several, candidates.tolist(), rewards.tolist(), strict=True):
            row.tried = dict(zip(ids, values, strict=True))
        if not self.tokenwise:  # a head never saw the state behind a stop token
            stop = torch.tensor([[token in row.wish.stop for token in row.tried] for row in several], device=rewards.device)
            rewards = torch.where(stop, rewards.new_tensor([[row.so_far] for row in several]), rewards)
        if rewards.isnan().any():
            raise RuntimeError(f"the model of {folder()} gave a reward that is no number")
        weight = rewards.new_tensor([[row.wish.weight] for row in several])
        beyond = torch.arange(k, device=logprobs.device) >= logprobs.new_tensor([[row.wish.candidates] for row in several])
        scores = (logprobs + torch.where(weight == 0, 0.0, weight * rewards).to(logprobs.device)).masked_fill(
            beyond, -torch.inf
        )
        scores = scores.masked_fill(logprobs == -torch.inf, -torch.inf)  # what is forbidden stays so
        own.fill_(-torch.inf).scatter_(1, candidates, scores.to(own.dtype))
        logits[places] = own

    def drop(self, row: Row) -> None:
        """The row's cache goes."""
        if row.read:
            self._half.drop([row.name])
            del self._rows[row.name]
            row.read = []

    # -- the reward model's half ---------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[Row]) -> None:
        """Brings the caches of these rows up to their tokens: one token more as a rule, else all of them."""
        new, behind = [], []
        for row in rows:
            tokens = list(row.tokens)
            follows = 0 < len(row.read) <= len(tokens) and tokens[: len(row.read)] == row.read
            if follows and len(tokens) == len(row.read):
                continue
            if follows and len(tokens) == len(row.read) + 1 and (self.tokenwise or tokens[-1] in row.tried):
                behind.append((row, tokens[-1]))
            else:
                self.drop(row)
                new.append((row, tokens))
        if behind:
            self._half.advance([row.name for row, _ in behind], [token for _, token in behind])
        for row, token in behind:
            row.read.append(token)
            row.so_far = row.tried.get(token, 0.0)
        if new:
            self._make_room(len(new))
            self._prefill(new)

    def _prefill(self, new: Sequence[tuple[Row, list[int]]]) -> None:
        names, texts = [row.name for row, _ in new], [tokens for _, tokens in new]
        if self.tokenwise:
            self._half.prefill(names, texts)
            rewards = [0.0] * len(new)
        else:
            users = [row.wish.user for row, _ in new]
            self._meet(users)
            rewards = self._half.prefill(names, texts, users).tolist()
        for (row, tokens), reward in zip(new, rewards, strict=True):
            row.read, row.so_far, row.tried = tokens, reward, {}
            self._rows[row.name] = row

    def _meet(self, users: Sequence[str]) -> None:
        """Users who came into the folder since it was loaded."""
        from pyargs.models.folder import load_users, read_config

        own = self.model.users
        new = [user for user in dict.fromkeys(users) if own.personal and user not in own.ids]
        if new:
            there = load_users(folder(), read_config(folder()))
            rows = there.rows(new)
            own.append(new, **{name: value.detach()[rows].to(self.model.device) for name, value in there.vectors.items()})

    def _make_room(self, count: int) -> None:
        """Twice the places where there are too few: those who are here are read again."""
        from pyargs.decode.policy import Policy
        from pyargs.decode.scorer import Scorer

        here = list(self._rows.values())
        if len(here) + count <= self._room:
            return
        self._room = max(8, 2 * (len(here) + count))
        self._half = Policy(self.model.lm, max_rows=self._room) if self.tokenwise else Scorer(self.model, max_rows=self._room)
        if here:
            self._prefill([(row, row.read) for row in here])

    def _rewards(self, rows: Sequence[Row], candidates: Tensor) -> Tensor:
        names = [row.name for row in rows]
        if self.tokenwise:
            logprobs = self._half.next_logits(names).float().log_softmax(1)
            return logprobs.gather(1, candidates.to(logprobs.device))
        return self._half.score(candidates, names)


def _check(model, shared: bool, config) -> None:
    """Raises ValueError where the model does not read the tokens of vLLM's model, all of them, in rows that come and go."""
    from transformers import AutoTokenizer

    from pyargs.decode.request import positions
    from pyargs.lm.forward import border
    from pyargs.lm.loading import same_tokenizer

    if not shared:
        raise ValueError(
            f"candidates of the model of {folder()} cannot share a prefix, so that its rows come in and go on together, as "
            "those of vLLM do not: take one without sliding windows and states"
        )
    known = [most for most in (positions(model.backbone), border(model.backbone)) if most]
    if known and config.max_model_len > min(known):
        raise ValueError(
            f"vLLM's texts have up to {config.max_model_len} tokens, and the model of {folder()} reads {min(known)}: start "
            f"vLLM with --max-model-len {min(known)}"
        )
    try:
        own = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    except Exception as error:  # none is there, where vLLM is given ids alone, or code that comes with it
        warnings.warn(f"whether vLLM's tokenizer is that of {folder()} is not known: {first_line(error)}", stacklevel=2)
        return
    if not same_tokenizer(own, model.tokenizer):
        raise ValueError(
            f"vLLM's model and that of {folder()} have different tokenizers, and a candidate's reward is one of the same "
            "token: take a model that was trained on the family of vLLM's"
        )
