"""The policy's half of the decoder, for your own loop: logits of the next token of each row."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from pyargs.decode import backends
from pyargs.decode.request import as_float, check_room, ids_of, integer
from pyargs.errors import PyargsError
from pyargs.lm.structure import Watch, unwrapped


def several(rows: Sequence[Hashable]) -> Sequence[Hashable]:
    """The rows. Raises PyargsError for a str, whose letters would count as rows."""
    if isinstance(rows, (str, bytes)):
        raise PyargsError(f"rows is a list of names, got {rows!r}: write [{rows!r}]")
    return rows


def of_transformers(lm) -> nn.Module:
    """The model. Raises PyargsError unless it is a model of transformers."""
    if not isinstance(lm, nn.Module):
        raise PyargsError(
            f"a policy is a causal language model of transformers, got {lm!r:.60}: load it with pyargs.load_lm(name)[0]"
        )
    return unwrapped(lm)


class Here:
    """Which row stands at which position, and how many tokens it has. A row goes by any name that its owner gives it."""

    def __init__(self, lm, max_rows: int):
        self.lm, self.max_rows = lm, integer("max_rows", max_rows, 1)
        self.known = len(lm.get_input_embeddings().weight)
        self.names: list[Hashable] = []
        self.lengths: dict[Hashable, int] = {}
        self.watch = Watch(lm)

    def new(self, rows: Sequence[Hashable], ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens of rows that may come in; `came` says that they have. Raises PyargsError for a row that is here, or one
        too many."""
        self.check_unchanged()
        several(rows)
        if len(rows) != len(ids) or len(set(rows)) < len(rows):
            raise PyargsError(f"{len(rows)} rows and {len(ids)} prompts: name each row once, with its tokens")
        if again := [row for row in rows if row in self.lengths]:
            raise PyargsError(f"row {again[0]!r} is here already: drop it first")
        if len(self.names) + len(rows) > self.max_rows:
            raise PyargsError(f"there is room for {self.max_rows} rows: make it with a larger max_rows, or drop some")
        texts = ids_of(ids, self.known)
        if not all(map(len, texts)):
            raise PyargsError("a row needs at least one token")
        if lengths := [*map(len, texts), *self.lengths.values()]:
            check_room(self.lm, min(lengths), max(lengths), 1)
        return texts

    def came(self, rows: Sequence[Hashable], texts: Sequence[Sequence[int]]) -> None:
        self.names += rows
        self.lengths |= {row: len(text) for row, text in zip(rows, texts, strict=True)}

    def next(self, places: Sequence[int], tokens) -> Tensor:
        """The next token of rows at these positions, int64 for all rows, -1 for the others; `went` says that they have it.
        Raises PyargsError where one is none, or there is no place for it."""
        given = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        token = self.spread(places, torch.tensor(*ids_of([given], self.known), dtype=torch.long, device="cpu"), fill=-1)
        if places:
            longest = max(self.lengths[self.names[place]] for place in places)
            check_room(self.lm, min(self.lengths.values()), longest, 1)
        return token

    def went(self, places: Sequence[int]) -> None:
        for place in places:
            self.lengths[self.names[place]] += 1

    @property
    def longest(self) -> int:
        return max(self.lengths.values(), default=0)

    def places(self, rows: Sequence[Hashable] | None) -> list[int]:
        """Positions of rows, all by default."""
        self.check_unchanged()
        rows = self.names if rows is None else list(several(rows))
        if missing := [row for row in rows if row not in self.lengths]:
            raise PyargsError(f"row {missing[0]!r} is not here: prefill it first")
        if len(set(rows)) < len(rows):
            raise PyargsError("a row is named twice")
        return [self.names.index(row) for row in rows]

    def remove(self, rows: Sequence[Hashable]) -> list[int]:
        """Rows leave; returns the positions of those that stay."""
        gone = set(self.places(rows))
        order = list(range(len(self.names)))
        for place in sorted(gone, reverse=True):
            order[place] = order[-1]
            order.pop()
        for place in gone:
            del self.lengths[self.names[place]]
        self.names = [self.names[place] for place in order]
        return order

    def spread(self, places: Sequence[int], values, fill: int = 0) -> Tensor:
        """Values [n, ...] of rows at these positions, for all rows; `fill` for the others."""
        values = torch.as_tensor(values, device="cpu")
        if len(values) != len(places):
            raise PyargsError(f"{len(values)} values for {len(places)} rows: give one candidate list or token for each")
        wide = values.new_full((len(self.names), *values.shape[1:]), fill)
        wide[list(places)] = values
        return wide

    def check_unchanged(self) -> None:
        if self.watch.changed():
            raise PyargsError("the model has changed since (weights, modules or hooks): make a new Policy or Scorer")


class Policy:
    """Logits of the next token of rows that come and go.

    lm: a causal language model of transformers. backend: as for `Engine`. max_rows: rows that are here at a time. `shared`: as
    of a `Scorer`.

        policy.prefill(["a", "b"], [ids, others])
        logits = policy.next_logits()               # float32 [2, V], in the order of policy.rows
        policy.advance(["a"], [token])
        policy.drop(["b"])

    A row's logits do not depend on the other rows. One thread at a time may use it.
    """

    def __init__(self, lm, *, backend: str = "auto", max_rows: int = 8):
        self.lm = of_transformers(lm)
        chosen = backends.resolve(backend, self.lm)
        self.backend, self.reason, self.shared = chosen.name, chosen.reason, chosen.shared
        vocabulary = self.lm.config.get_text_config(decoder=True).vocab_size
        self._here = Here(self.lm, max_rows)
        self._half = backends.policy(chosen, self.lm, self._here.max_rows, vocabulary)
        self._logits: dict[Hashable, Tensor] = {}

    @property
    def rows(self) -> list[Hashable]:
        """The rows that are here, by position."""
        return list(self._here.names)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Hashable], ids: Sequence[Sequence[int]]) -> None:
        """Adds rows with their tokens. Raises PyargsError for a row that is here already, an empty one, or one too many."""
        texts = self._here.new(list(rows), ids)
        if not texts:
            return
        logits = self._half.join(texts, max(map(len, texts)) + 1)
        self._here.came(list(rows), texts)
        self._note(list(rows), logits)

    def next_logits(self, rows: Sequence[Hashable] | None = None) -> Tensor:
        """Logits float32 [n, V] of the next token of each of these rows, all by default."""
        places = self._here.places(rows)
        if not places:
            size = 0, self.lm.config.get_text_config(decoder=True).vocab_size
            return torch.zeros(size, dtype=torch.float32, device=self.lm.device)
        return torch.stack([self._logits[self._here.names[place]] for place in places])

    @torch.no_grad()
    def advance(self, rows: Sequence[Hashable], tokens: Sequence[int] | Tensor) -> None:
        """Appends one token to each of these rows; tokens int64 [n]."""
        places = self._here.places(rows)
        token = self._here.next(places, tokens)
        if not places:
            return
        self._half.reserve(self._here.longest + 2)
        going = None if len(places) == len(token) else token >= 0
        logits = self._half.advance(token.clamp(min=0).to(self.lm.device), going)
        self._here.went(places)
        self._note([self._here.names[place] for place in places], logits[places])

    def drop(self, rows: Sequence[Hashable]) -> None:
        """Removes rows."""
        self._half.keep(self._here.remove(rows))
        for row in rows:
            del self._logits[row]

    def _note(self, rows: Sequence[Hashable], logits: Tensor) -> None:
        self._logits |= zip(rows, as_float(logits).float(), strict=True)
