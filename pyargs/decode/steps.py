"""Steps of rows that come and go, each read before the next one is computed."""

from __future__ import annotations

from collections.abc import Sequence

from pyargs.decode.request import Request
from pyargs.decode.rows import Choice


class Steps:
    """The steps of `rows` (a Guided, Tokenwise or Alone). `backends.cuda_graph.Captured` has the same functions."""

    def __init__(self, rows):
        self.rows, self.chosen = rows, False  # whether a choice is there that no row has followed

    def join(self, requests: Sequence[Request], capacity: int) -> None:
        """Adds rows behind those that are here. capacity: places that the longest row needs, its answer and the most
        candidates of a step included. Call `flush` first. Raises UnknownUser, and then adds nobody."""
        self._follow()
        self.rows.join(requests, capacity)

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`, behind what was read of it before; returns how many of its tokens are read by now. The
        next `join` has it first and reads the rest. Call `flush` first."""
        self._follow()
        return read(self.rows, prompt, end, capacity)

    def unread(self) -> None:
        """The prompt of which a part was read does not come."""
        unread(self.rows)

    def step(self) -> list[Choice]:
        """Computes the next token of each row that is here. Returns, in order, the choices that are known by now, of this
        step or of earlier ones. What they say of a row after its end is padding."""
        self._follow()
        self.rows.choose()
        self.chosen = True
        rows = self.rows.rows
        told = rows["told"][:, : 1 + rows.most].cpu() if rows.telling else None
        return [Choice.read(rows["chosen"].cpu(), told)]

    def flush(self) -> list[Choice]:
        """Waits for the choices that have not been read."""
        return []

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order. Call `flush` first."""
        self.rows.keep(order)
        self.chosen = self.chosen and len(order) > 0

    def current(self) -> bool:
        """Whether the models are those that the steps were made for. May read all weights."""
        return self.rows.current()

    def recover(self, error: BaseException) -> bool:
        """After an error in the middle of a step: whether all rows have left, and others may come. Otherwise the steps have to
        be made anew."""
        return False

    def _follow(self) -> None:
        chosen, self.chosen = self.chosen, False
        if chosen:
            self.rows.follow()


def read(rows, prompt: Sequence[int], end: int, capacity: int) -> int:
    """`Steps.read`, in all halves of the rows."""
    return min(half.read(prompt, end, capacity) for half in rows.halves)


def unread(rows) -> None:
    for half in rows.halves:
        half.unread()
