"""What rows carry from one step to the next, in buffers that keep their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.decode.request import Request, as_float, bounds, noise
from pyargs.ops.row_state import CHOSEN, RowState, likely
from pyargs.ops.topk_logprobs import MAX_K

FILL = {"stop": -1, "slot": -1, "finished": True}
"""What stands where a row's own numbers end, and beyond the rows that are here, if it is not 0."""
OWN = "reward_weight", "finished", "step", "limit", "token", "slot", "chosen", "stop"
"""Fields of a RowState that rows of every kind have."""
WIDTH = 64
"""The noise is as wide as a multiple of it, so that its buffer seldom grows."""


class Rows:
    """Buffers [room, ...] by name. `rows["weight"]` is the first `width` places of one: the rows that are here, at positions
    0, 1, ... without a gap. A captured step sets `width` to the rows that it was captured with; those beyond the rows that are
    here count as finished. requests: of the rows that are here, if they have any; the properties below are derived from them.
    adjust(requests, logits): logits [m, V] of the rows of these m requests, as these want them.
    """

    def __init__(self, room: int, adjust: Callable[[Sequence[Request], Tensor], Tensor] | None = None):
        self.room, self.adjust, self.count, self.width = room, adjust, 0, 0
        self.buffers: dict[str, Tensor] = {}
        self.place: Tensor | None = None  # 0, 1, ...: as many as there may be rows or candidates
        self.requests: list[Request] = []

    @property
    def sampled(self) -> bool:
        """Whether any row samples."""
        return any(one.temperature for one in self.requests)

    @property
    def narrowed(self) -> bool:
        """Whether any row has top-p or min-p."""
        return any(one.top_p < 1 or one.min_p > 0 for one in self.requests)

    @property
    def clipped(self) -> bool:
        """Whether any row has `reward_clip`."""
        return any(one.reward_clip is not None for one in self.requests)

    @property
    def most(self) -> int:
        """The most candidates of a row, those that are only told included; 1 where there are none."""
        return max((max(one.num_candidates or 1, one.logprobs) for one in self.requests), default=1)

    @property
    def telling(self) -> bool:
        """Whether any row has `logprobs`."""
        return any(one.logprobs for one in self.requests)

    @property
    def adjusting(self) -> bool:
        """Whether any row has `adjust`: then all logits must be exact."""
        return any(one.adjust is not None for one in self.requests)

    def logits(self, logits: Tensor, vocabulary: int) -> Tensor:
        """The policy's logits of the last rows, of the tokens that can be chosen, as the requests want them."""
        logits = as_float(logits)[:, :vocabulary]
        return self.adjust(self.requests[len(self.requests) - len(logits) :], logits.float()) if self.adjusting else logits

    @property
    def unlimited(self) -> str:
        """Which rows choose among the whole vocabulary: "none", "some" or "all"."""
        several = {one.num_candidates is None for one in self.requests}
        return "some" if len(several) > 1 else "all" if True in several else "none"

    @property
    def filtered(self) -> bool:
        """Whether any row may have fewer candidates than `most`."""
        most = self.most
        return self.narrowed or any(one.num_candidates != most for one in self.requests)

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name][: self.width]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.buffers[name][: self.width] = value

    def __contains__(self, name: str) -> bool:
        return name in self.buffers

    def join(self, **values: Tensor | None) -> None:
        """Rows come in behind the others, with values [m, ...] of each name. A buffer becomes wider where they are wider."""
        (count,) = {len(value) for value in values.values() if value is not None}
        if self.place is None:
            device = next(value.device for value in values.values() if value is not None)
            self.place = torch.arange(max(self.room, MAX_K), device=device)
        for name, new in values.items():
            if new is None:
                continue
            fill = FILL.get(name, 0)
            kept = self.buffers.get(name)
            if kept is None:
                kept = self.buffers[name] = new.new_full((self.room, *new.shape[1:]), fill)
            if new.ndim == 2 and new.shape[1] > kept.shape[1]:
                kept = self.buffers[name] = F.pad(kept, (0, new.shape[1] - kept.shape[1]), value=fill)
            if new.ndim == 2 and new.shape[1] < kept.shape[1]:
                new = F.pad(new, (0, kept.shape[1] - new.shape[1]), value=fill)
            kept[self.count : self.count + count] = new
        self.count = self.width = self.count + count

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        for to, source in enumerate(order):
            if to != source:
                for kept in self.buffers.values():
                    kept[to] = kept[source]
        self.count = self.width = len(order)
        self.requests = [self.requests[position] for position in order] if self.requests else []
        if "finished" in self:
            self.buffers["finished"][self.count :] = True


def of_requests(requests: Sequence[Request], device) -> dict[str, Tensor]:
    """What rows bring with them, float32 or int64 [m]; stop int64 [m, E] and noise float32 [m, N] are as wide as needed."""
    put = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    stops, steps = max(len(one.stop) for one in requests), max(one.max_new_tokens for one in requests)
    sampled = any(one.temperature for one in requests)
    clip, gap = zip(*map(bounds, requests), strict=True)
    return {
        "reward_weight": put([one.reward_weight for one in requests], torch.float32),
        "clip": put(clip, torch.float32),
        "gap": put(gap, torch.float64),
        "own_k": put([one.num_candidates or 0 for one in requests], torch.long),
        "top_p": put([one.top_p for one in requests], torch.float32).double(),
        "min_p": put([one.min_p for one in requests], torch.float32).double(),
        "temperature": put([one.temperature for one in requests], torch.float32),
        "limit": put([one.max_new_tokens for one in requests], torch.long),
        "stop": put([[*one.stop, *[-1] * (stops - len(one.stop))] for one in requests], torch.long).view(len(requests), stops),
        "noise": torch.stack([noise(one, -(-steps // WIDTH) * WIDTH) for one in requests]).to(device)
        if sampled
        else put([[0.0]] * len(requests), torch.float32),
        "step": put([0] * len(requests), torch.long),
        "finished": put([False] * len(requests), torch.bool),
        "token": put([0] * len(requests), torch.long),
        "slot": put([-1] * len(requests), torch.long),
        "chosen": put([[0.0] * CHOSEN] * len(requests), torch.float64),
    }


def state_of(rows: Rows, *more: str, count: Tensor | None = None) -> RowState:
    """What a step reads and writes of the rows that are here; more: fields that not every decoder has. count int64 [n]: how
    many candidates each row considers, where that is known."""
    names = [*OWN, *more]
    if rows.sampled:
        names += ["temperature", "noise"]
    if rows.filtered and count is None:
        names += ["own_k", "top_p", "min_p"]
    return RowState(**{name: rows[name] for name in names}, count=count)


def considered(rows: Rows, count: Tensor, k: int) -> Tensor:
    """Which of k candidates are the first count [n] of their row, bool [n, k]."""
    return rows.place[:k] < count.unsqueeze(1)


def filtered(rows: Rows, logprobs: Tensor) -> Tensor:
    """Log-probs [n, V] of all tokens, -inf where the row's top_p and min_p leave one out."""
    order = logprobs.sort(dim=1, descending=True, stable=True)
    kept = likely(order.values.double().exp(), rows["top_p"], rows["min_p"])
    kept[:, 0].fill_(True)
    return logprobs.masked_fill(~kept.scatter(1, order.indices, kept), -torch.inf)


class Choice(NamedTuple):
    """What a step chose: token and slot int64 [n] (slot -1: nothing could be chosen), the token's reward and the spread of the
    candidates' rewards float32 [n], and which rows have finished. told float64 [n, 1 + k, 3]: the chosen token, then the
    likeliest ones, each with its log-probability and its reward, NaN where there is none; None where no row has `logprobs`."""

    token: Tensor
    slot: Tensor
    reward: Tensor
    spread: Tensor
    finished: Tensor
    told: Tensor | None = None

    @classmethod
    def read(cls, chosen: Tensor, told: Tensor | None = None) -> Choice:
        """Of what a step has left in the rows, float64 [n, 5] and [n, 1 + k, 3], on the host."""
        token, slot, reward, spread, finished = chosen.T
        return cls(token.long(), slot.long(), reward.float(), spread.float(), finished.bool(), told)

    def lists(self) -> list[list]:
        """The parts as lists of n things."""
        *parts, told = self
        return [*(part.tolist() for part in parts), [None] * len(self.token) if told is None else told.tolist()]


def room_to_tell(rows: Rows, count: int, device) -> dict[str, Tensor | None]:
    """What so many rows that come in bring with them, if any row has `logprobs`."""
    shape = count, 1 + MAX_K, 3
    return {"told": torch.zeros(shape, dtype=torch.float64, device=device) if rows.telling else None}


def tell(rows: Rows, logprob: Tensor, candidates: Tensor, logprobs: Tensor, rewards: Tensor) -> None:
    """Leaves in the rows what is told of a step: the chosen tokens' log-probs [n], and candidates [n, k] with theirs."""
    told = rows["told"][:, : 1 + candidates.shape[1]]
    chosen = rows["chosen"]
    for place, (one, several) in enumerate(
        ((rows["token"], candidates), (logprob, logprobs), (chosen[:, 2], rewards)),
    ):
        told[:, 0, place], told[:, 1:, place] = one, several
