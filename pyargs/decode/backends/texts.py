"""The reward model's half where it reads texts of its own: a function of whole texts, or a model with another tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs.decode.backends import eager
from pyargs.decode.bridge import Bridge

log = logging.getLogger("pyargs")


@dataclass
class Row:
    """prompt: ids of the reward model. answer: of the policy. ids: of the reward model, of both; text: the answer's, both
    without bytes that are no character yet. tried: text and ids with each candidate. held: ids of the reward model that a
    cache holds; laid: what the last pass read behind them, as of `_paths`; paths: where each candidate's part of it begins,
    and how long it is."""

    prompt: list[int]
    ids: list[int]
    held: list[int]
    answer: list[int] = field(default_factory=list)
    text: str = ""
    tried: list[tuple[str, list[int]]] = field(default_factory=list)
    laid: list[tuple[int, int, int]] = field(default_factory=list)
    paths: list[tuple[int, int]] = field(default_factory=list)


class Scorer:
    """The half, as in `backends.eager`, of rows that come and go as they like. Every text is read whole.

    states: of texts, as ids of the reward model, [B, D]. bridge: None where policy and reward model share a tokenizer. most:
    tokens that a text may have; the states of longer ones are not numbers, so that their row ends with an error.
    """

    leaves_out = True

    def __init__(self, states: Callable[[list[list[int]]], Tensor], bridge: Bridge | None, most: int | None = None):
        self.states, self.bridge, self.most = states, bridge, most
        self.rows: list[Row] = []

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """prompts: ids of the reward model."""
        new = [Row(*(list(prompt) for _ in range(3))) for prompt in prompts]
        self.rows += new
        return self.states([row.ids for row in new])

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        """States [n, k, D] of candidates [n, k], 0 behind those that a row wants, bool [n, k]: its first ones."""
        texts, beyond = self.texts(candidates, wanted)
        states = iter(self.states([ids for own in texts for ids in own]).split(list(map(len, texts))))
        states = torch.stack([F.pad(own, (0, 0, 0, candidates.shape[1] - len(own))) for own in states])
        return states.masked_fill(beyond.to(states.device).unsqueeze(-1), torch.nan)

    def texts(self, candidates: Tensor, wanted: Tensor | None = None) -> tuple[list[list[list[int]]], Tensor]:
        """What the reward model reads of each candidate that a row wants, and which of all are too long, bool [n, k]: the
        prompt stands for these."""
        k = candidates.shape[1]
        counts = [k] * len(candidates) if wanted is None else wanted.sum(1).tolist()
        several = [(row, own[:n]) for row, own, n in zip(self.rows, candidates.tolist(), counts, strict=True)]
        if self.bridge is None:
            for row, own in several:
                row.tried = [("", [*row.ids, one]) for one in own]
        else:
            texts = [[self.bridge.text([*row.answer, one], row.text) for one in own] for row, own in several]
            found = iter(self.bridge.ids([text for own in texts for text in own]))
            for row, own in zip(self.rows, texts, strict=True):
                row.tried = [(text, row.ids if (ids := next(found)) is None else [*row.prompt, *ids]) for text in own]
        beyond = [[self.most is not None and len(ids) > self.most for _, ids in row.tried] for row in self.rows]
        for row, marks in zip(self.rows, beyond, strict=True):
            if any(marks) and len(row.ids) <= self.most:
                log.warning("an answer grows beyond the %d positions of the reward model, where it has no rewards", self.most)
        own = [
            [row.prompt if long else ids for (_, ids), long in zip(row.tried, marks, strict=True)]
            for row, marks in zip(self.rows, beyond, strict=True)
        ]
        return own, torch.tensor([marks + [False] * (k - len(marks)) for marks in beyond], device="cpu")

    def commit(self, token: Tensor, slot: Tensor) -> None:
        for row, one, place in zip(self.rows, token.tolist(), slot.tolist(), strict=True):
            if place >= 0:
                row.answer.append(one)
                row.text, row.ids = row.tried[place]

    def keep(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[position] for position in order]

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """The reward model's prompt may have other parts: it is read whole, by `join`."""
        return end

    def unread(self) -> None:
        pass

    def current(self) -> bool:
        return True


def one_by_one(backbone: nn.Module) -> Callable[[list[list[int]]], Tensor]:
    """`states` of a Scorer, for models of which nothing can be kept: each text in a pass of its own."""

    def state(ids: list[int]) -> Tensor:
        return backbone(input_ids=torch.tensor([ids], device=backbone.device), use_cache=False).last_hidden_state[0, -1]

    return lambda texts: torch.stack([state(ids) for ids in texts])


class Kept(Scorer):
    """The cache keeps of each row the longest beginning that all its candidates' texts share. One pass reads what comes behind
    that in all texts of all rows, each of which sees only itself. For models whose candidates can share a prefix."""

    def __init__(self, backbone: nn.Module, room: int, bridge: Bridge, most: int | None):
        super().__init__(one_by_one(backbone), bridge, most)
        self.half, self.device = eager.Scorer(backbone, room), backbone.device

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        self.rows += [Row(*(list(prompt) for _ in range(3))) for prompt in prompts]
        return self.half.join(prompts, max(map(len, prompts)))

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        texts, beyond = self.texts(candidates, wanted)
        for row, own in zip(self.rows, texts, strict=True):
            row.held = row.held[: min(len(commonprefix([row.held, *own])), min(map(len, own)) - 1)]
            row.laid, row.paths = _paths([ids[len(row.held) :] for ids in own])
        kept = [len(row.held) for row in self.rows]
        self.half.cache.cut(kept)
        width = max(len(row.laid) for row in self.rows)
        self.half.reserve(max(kept) + width)
        put = lambda rows: torch.tensor(rows, device=self.device)  # noqa: E731
        # -1 pads, and sees itself.
        ids, path, place = put([row.laid + [(0, -1, 0)] * (width - len(row.laid)) for row in self.rows]).unbind(-1)
        seen = (path.unsqueeze(2) == path.unsqueeze(1)) & (place.unsqueeze(1) <= place.unsqueeze(2))
        states = self.half.tree(ids, place, seen)
        k = candidates.shape[1]  # for what is not wanted stands the first one
        last = put([[start + n - 1 for start, n in row.paths + row.paths[:1] * (k - len(row.paths))] for row in self.rows])
        states = states.gather(1, last.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        return states.masked_fill(beyond.to(self.device).unsqueeze(-1), torch.nan)

    def commit(self, token: Tensor, slot: Tensor) -> None:
        chosen = [(0, 0) if one < 0 else row.paths[one] for row, one in zip(self.rows, slot.tolist(), strict=True)]
        self.half.cache.graft(*(list(each) for each in zip(*chosen, strict=True)))
        for row, (start, count) in zip(self.rows, chosen, strict=True):
            row.held += [token for token, *_ in row.laid[start : start + count]]
        super().commit(token, slot)

    def keep(self, order: Sequence[int]) -> None:
        super().keep(order)
        self.half.keep(order)


def _paths(several: list[list[int]]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Lists of tokens one behind the other, equal ones once: (token, number of its list, its place there), and for each list
    where it begins and how long it is."""
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    tokens: list[tuple[int, int, int]] = []
    for one in map(tuple, several):
        if one not in first:
            first[one] = len(tokens), len(one)
            tokens += [(token, len(first), place) for place, token in enumerate(one)]
    return tokens, [first[tuple(one)] for one in several]
