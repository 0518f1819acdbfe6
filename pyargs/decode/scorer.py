"""The reward model's half of the decoder, for your own loop: rewards of candidates for the next token of each row."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from pyargs.decode import backends
from pyargs.decode.args import by_row, folded_of, of_rows, rewards_of
from pyargs.decode.pair import check_guides
from pyargs.decode.policy import Here
from pyargs.decode.request import check_room
from pyargs.decode.rows import Rows
from pyargs.errors import PyargsError
from pyargs.lm.called import Called
from pyargs.lm.structure import Watch
from pyargs.models.reward_model import RewardModel
from pyargs.user_ids import user_ids


class Scorer:
    """Rewards of candidates for the next token of rows that come and go, each row for its user.

    model: a RewardModel. backend: as for `Engine`. max_rows: rows that are here at a time. `shared` says whether candidates
    share their row's prefix; where not, rows come in and go on together.

        scorer.prefill(["a", "b"], [ids, others], users=["ann", "bob"])
        rewards = scorer.score(candidates)          # int64 [2, k] -> float32 [2, k], in the order of scorer.rows
        scorer.advance(["a"], [token])              # one of the candidates costs nothing, another one a pass
        scorer.drop(["b"])

    Rewards are raw and of the candidate alone, also for a model with step_reward "prefix_mean". A row's rewards do not depend
    on the other rows. One thread at a time may use it.
    """

    def __init__(self, model: RewardModel, *, backend: str = "auto", max_rows: int = 8):
        if not isinstance(model, RewardModel):
            raise PyargsError(f"a scorer has the head of a RewardModel, got a {type(model).__name__}")
        check_guides(model)
        if isinstance(model.backbone, Called):
            raise PyargsError(
                f"the reward is your function {model.backbone.name_or_path}: call it in your loop, or take pyargs.guide"
            )
        self.model = model
        chosen = backends.resolve(backend, model.backbone)
        self.backend, self.reason, self.shared = chosen.name, chosen.reason, chosen.shared
        self._here = Here(model.backbone, max_rows)
        self._half = backends.scorer(chosen, model.backbone, self._here.max_rows)
        self._parts = Rows(self._here.max_rows)
        self._here.watch = Watch(model.backbone, model.head, but=model.users)
        self._tried: Tensor | None = None  # candidates [n, k] by position since the last token, where there are any

    @property
    def max_rows(self) -> int:
        return self._here.max_rows

    @property
    def known(self) -> int:
        """How many tokens the model knows."""
        return self._here.known

    @property
    def rows(self) -> list[Hashable]:
        """The rows that are here, by position."""
        return list(self._here.names)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Hashable], ids: Sequence[Sequence[int]], users: Sequence[str]) -> Tensor:
        """Adds rows with their tokens; returns the rewards float32 [n] of these texts as they are.

        users: one for each row. Raises UnknownUser for a user without parameters, PyargsError for a row that is here already,
        an empty one, or one too many.
        """
        users = user_ids(users)
        if len(users) != len(rows):
            raise PyargsError(f"{len(rows)} rows but {len(users)} users: name one user for each row")
        folded = folded_of(self.model.head, self.model.users, users, self.model.device)
        texts = self._here.new(list(rows), ids)
        if not texts:
            return torch.zeros(0, dtype=torch.float32, device=self.model.device)
        states = self._half.join(texts, max(map(len, texts)) + 1)
        self._here.came(list(rows), texts)
        self._parts.join(**by_row(folded, len(users)))
        self._folded, self._tried = folded, None
        return rewards_of(folded, states.unsqueeze(1).to(self.model.device)).squeeze(1)

    @torch.no_grad()
    def score(self, candidates: Tensor | Sequence[Sequence[int]], rows: Sequence[Hashable] | None = None) -> Tensor:
        """Rewards float32 [n, k] of candidate tokens int64 [n, k], each as the next token of its row; all rows by default.

        Where a row has fewer candidates, -1 stands behind them, and NaN behind their rewards; a CPU computes nothing there."""
        places = self._here.places(rows)
        given = torch.as_tensor(candidates, device="cpu")
        known = self._here.known
        if (
            given.ndim != 2
            or given.is_floating_point()
            or not given.shape[1]
            or given.numel()
            and not -1 <= given.min() <= given.max() < known
        ):
            raise PyargsError(f"candidates are whole numbers [rows, k], tokens of the {known} that the model knows")
        if not places:
            return torch.zeros(given.shape, dtype=torch.float32, device=self.model.device)
        tokens = self._here.spread(places, given.long(), fill=-1)
        wanted = tokens >= 0
        if not wanted[places, 0].all() or (wanted[:, 1:] & ~wanted[:, :-1]).any():
            raise PyargsError("a row has at least one candidate, and -1 stands behind its candidates")
        check_room(self.model.backbone, min(self._here.lengths.values()), self._here.longest, 1)
        self._half.reserve(self._here.longest + given.shape[1])
        device, self._tried = self.model.device, tokens
        wanted = None if wanted.all() else wanted.to(device)
        states = self._half.branch(tokens.clamp(min=0).to(device), wanted)
        rewards = rewards_of(of_rows(self._folded, self._parts), states.to(device))
        return (rewards if wanted is None else rewards.masked_fill(~wanted, torch.nan))[places]

    @torch.no_grad()
    def advance(self, rows: Sequence[Hashable], tokens: Sequence[int] | Tensor) -> None:
        """Appends one token to each of these rows, a candidate or not; tokens int64 [n]."""
        places = self._here.places(rows)
        token = self._here.next(places, tokens)
        going, slot = token >= 0, torch.full_like(token, -1)
        if self._tried is not None:
            same = (self._tried == token.unsqueeze(1)) & going.unsqueeze(1)
            slot = torch.where(same.any(1), same.int().argmax(1), -1)
        device = self.model.device
        if (slot >= 0).any():
            self._half.commit(token.clamp(min=0).to(device), slot.to(device))
        missed = going & (slot < 0)
        if missed.any():
            self._half.reserve(self._here.longest + 1)
            self._half.advance(token.clamp(min=0).to(device), missed.to(device))
        self._here.went(places)
        self._tried = None

    def drop(self, rows: Sequence[Hashable]) -> None:
        """Removes rows."""
        order = self._here.remove(rows)
        self._half.keep(order)
        self._parts.keep(order)
        self._tried = None if self._tried is None else self._tried[order]
