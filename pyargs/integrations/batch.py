"""The rows of one call of `generate`, as its logits processors and stopping criteria see them: all at once, step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyargs.decode.answer import Event, Told
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError


class Batch:
    """Rows with the prompts ids int64 [B, T], padded with `pad` once they have ended.

    columns: of the policy's logits. temperature: by what the processors divide them, besides what else they do: it counts
    again, for log-probability and reward alike, where a token is chosen. keep: which of "logits" and "scores" are kept of
    each step; both are float32 [B, columns].
    """

    def __init__(self, engine: Engine, ids: Tensor, pad: int, processors, criteria, *, columns, temperature=1.0, keep=()):
        self.engine, self.ids, self.pad, self.processors, self.criteria = engine, ids, pad, processors, criteria
        self.columns, self.temperature, self.keep = columns, temperature, keep
        self.row_of: dict[int, int] = {}
        self.inside = set(range(len(ids)))  # rows that the engine goes on with
        self.written: list[list[int]] = [[] for _ in ids]  # their new tokens, and what is told of them
        self.told: list[list[Told | None]] = [[] for _ in ids]
        self.logits: tuple[Tensor, ...] = ()
        self.processed: tuple[Tensor, ...] = ()
        self.scores: tuple[Tensor, ...] = ()

    def adjust(self, rows: dict[int, list[int]], logits: Tensor) -> Tensor:
        """`decode.adjust.Adjust`, by the processors. Rows that have ended have logits of 0 there, and what becomes of them is
        not looked at."""
        here = [self.row_of[number] for number in rows]
        if len(here) < len(self.inside):
            raise PyargsError(
                "only some of these prompts are longer than the length at which the model's rotary angles change, so that not "
                "all are decoded at once, as logits processors have to see them: call generate for each side"
            )
        known = logits.shape[1]
        raw = logits.new_zeros(len(self.ids), self.columns)
        raw[:, known:] = -torch.inf
        raw[here, :known] = logits
        raw = raw.to(self.ids.device)
        found = self.processors(self.ids, raw.clone())
        if "logits" in self.keep:
            over = [row for row in range(len(raw)) if row not in self.inside]
            raw[over] = torch.nan
            self.logits += (raw,)
        if "scores" in self.keep:
            self.processed += (found.float(),)
        return found[here, :known] * self.temperature

    def run(self, wishes: list[dict], feed: Callable[[Tensor], None] | None) -> Tensor:
        """Ids int64 [B, T + N]. wishes: the arguments of `Engine.submit` for each row. feed: gets each step's tokens [B]."""
        prompts = [wish.pop("prompt") for wish in wishes]
        numbers = [self.engine.submit(prompt, **wish) for prompt, wish in zip(prompts, wishes, strict=True)]
        self.row_of = {number: row for row, number in enumerate(numbers)}
        self.weights = [wish["reward_weight"] for wish in wishes]
        # As in transformers: without a stop token, rows go on until all have ended.
        pads = any(hasattr(one, "eos_token_id") for one in self.criteria)
        unfinished, step = [True] * len(numbers), 0
        while any(unfinished):
            while self.engine.busy and any(len(self.written[row]) == step for row in self.inside):
                self._read(self.engine.step())
            if not any(len(self.written[row]) > step for row in self.inside):
                break
            tokens = [own[step] if row in self.inside else self.pad for row, own in enumerate(self.written)]
            new = torch.tensor(tokens, device=self.ids.device)
            if "scores" in self.keep:
                self.scores += (self._scores(step, tokens),)
            self.ids = torch.cat([self.ids, new.unsqueeze(1)], dim=1)
            over = self.criteria(self.ids, self.scores if "scores" in self.keep else None).tolist()
            unfinished = [on and not end for on, end in zip(unfinished, over, strict=True)]
            for row in [row for row in self.inside if not unfinished[row] and (pads or not any(unfinished))]:
                self.inside.remove(row)
                self.engine.cancel(numbers[row])
            if feed is not None:
                feed(new)
            step += 1
        return self.ids

    def _read(self, events: list[Event]) -> None:
        for event in events:
            if event.error is not None:
                raise event.error
            if event.token is not None:
                self.written[self.row_of[event.number]].append(event.token)
                self.told[self.row_of[event.number]].append(event.told)

    def _scores(self, step: int, tokens: list[int]) -> Tensor:
        """What the step chose by, float32 [B, columns]: the processors' scores and w r over the temperature on the candidates,
        -inf elsewhere. A row that has ended can only be padded."""
        found, processed = torch.full_like(self.processed[step], -torch.inf), self.processed[step]
        for row, token in enumerate(tokens):
            if row not in self.inside:
                found[row, token] = 0.0
                continue
            candidates = self.told[row][step].candidates
            weight = self.weights[row] / self.temperature
            if getattr(self.engine.pair.model, "step_reward", "token") == "prefix_mean":
                weight = weight / (step + 1)
            ids = [one.token for one in candidates]
            rewards = torch.tensor([one.reward for one in candidates] if weight else [0.0] * len(ids), device=found.device)
            found[row, ids] = processed[row, ids] + weight * rewards
        return found
