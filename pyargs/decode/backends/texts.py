"""The reward model's half where it reads whole texts, without a cache: a function of ids."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyargs.lm.called import Called


class Scorer:
    """The half, as in `backends.eager`. Rows come and go as they like."""

    def __init__(self, function: Called):
        self.function = function
        self.texts: list[list[int]] = []  # of the rows that are here

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        new = [list(prompt) for prompt in prompts]
        self.texts += new
        return self.function.rewards(new).unsqueeze(1)

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        several = [[*text, one] for text, own in zip(self.texts, candidates.tolist(), strict=True) for one in own]
        return self.function.rewards(several).view(*candidates.shape, 1)

    def commit(self, token: Tensor, slot: Tensor) -> None:
        for text, one, place in zip(self.texts, token.tolist(), slot.tolist(), strict=True):
            if place >= 0:
                text.append(one)

    def keep(self, order: Sequence[int]) -> None:
        self.texts = [self.texts[position] for position in order]

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """A text is read whole, by `join`."""
        return end

    def unread(self) -> None:
        pass

    def current(self) -> bool:
        return True
