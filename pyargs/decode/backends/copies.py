"""Any model of transformers, called as it is: the reward model's cache is copied for each candidate.

For models whose layers keep a state instead of keys and values, or look through a window, and for those with hooks. It needs
only a cache whose rows can be reordered. So rows come in together, when no row is here. Each leaves at any time, but is
computed until the last one has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyargs.errors import PyargsError
from pyargs.lm.cache import PrefixLayer, copy_rows, follow_copies
from pyargs.lm.forward import embedded, forward_step
from pyargs.lm.tokenize import left_pad


class _Closed:
    """Rows that came in together. `here`: which of them stands at each position."""

    def __init__(self, lm):
        self.lm, self.here, self.mask, self.cache, self.padded = lm, [], None, None, False

    def begin(self, prompts: Sequence[Sequence[int]], soft: Tensor | None = None, **more):
        if self.here:
            raise PyargsError("rows of this model can only come in when no row is here")
        read = left_pad([list(prompt) for prompt in prompts], 0) if soft is None else embedded(self.lm, prompts, soft)
        ids, self.mask = (x.to(self.lm.device) for x in read)
        self.padded, self.cache, self.here = not bool(self.mask.all()), None, list(range(len(prompts)))
        output, self.cache = forward_step(self.lm, ids, self.mask, None, self.padded, **more)
        return output

    def all(self, values: Tensor) -> Tensor:
        """Values [n, ...] of the rows that are here, for all rows that came in; 0 for the others."""
        wide = values.new_zeros(len(self.mask), *values.shape[1:])
        wide[self.here] = values
        return wide

    def together(self, going: Tensor | None) -> None:
        if going is not None and not bool(going.all()):
            raise PyargsError("rows of this model go on together: advance all that are here, or drop one")

    def longer(self) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.mask


class Policy:
    """The policy's half, as in `backends.eager`."""

    screened = False
    top = 0  # all logits are exact

    def __init__(self, lm, room: int):
        self.held = _Closed(lm)

    def join(self, prompts: Sequence[Sequence[int]], capacity: int, soft: Tensor | None = None) -> Tensor:
        return self.held.begin(prompts, soft, logits_to_keep=1).logits[:, -1]

    def advance(self, token: Tensor, going: Tensor | None = None) -> Tensor:
        held = self.held
        held.together(going)
        ids = held.all(token).unsqueeze(1).to(held.lm.device)
        output, held.cache = forward_step(held.lm, ids, held.longer(), held.cache, held.padded, logits_to_keep=1)
        return output.logits[held.here, -1]

    def reserve(self, capacity: int) -> None:
        """Its cache grows by itself."""

    def current(self) -> bool:
        return True

    def keep(self, order: Sequence[int]) -> None:
        self.held.here = [self.held.here[position] for position in order]


class Scorer:
    """The reward model's half, as in `backends.eager`. Row b * k + j holds candidate j of row b, and its prefix."""

    leaves_out = False

    def __init__(self, backbone, room: int):
        self.held, self.copies, self.tried = _Closed(backbone), 0, False

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        self.copies, self.capacity, self.tried = 0, capacity, False
        return self.held.begin(prompts).last_hidden_state[:, -1]

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        held, k = self.held, candidates.shape[1]
        if self.tried:
            raise PyargsError("this model tries candidates once for each token: its state has gone past them")
        self.tried = True
        if k > self.copies:
            self._copy(k)
        ids = held.all(candidates)
        ids = torch.cat([ids, ids[:, :1].expand(-1, self.copies - k)], dim=1).reshape(-1, 1).to(held.lm.device)
        mask = held.longer().repeat_interleave(self.copies, dim=0)
        output, held.cache = forward_step(held.lm, ids, mask, held.cache, held.padded)
        return output.last_hidden_state.reshape(len(held.mask), self.copies, -1)[held.here, :k]

    def commit(self, token: Tensor, slot: Tensor) -> None:
        """All copies go on from their row's winner."""
        self.held.together(slot >= 0)
        self.tried = False
        first = torch.arange(len(self.held.mask), device=self.held.mask.device) * self.copies
        winner = (first + self.held.all(slot)).repeat_interleave(self.copies)
        follow_copies(self.held.cache, winner)

    def advance(self, token: Tensor, going: Tensor | None = None) -> None:
        self.held.together(going)
        candidates = token.unsqueeze(1).expand(-1, max(self.copies, 1))
        self.branch(candidates)
        self.commit(token, torch.zeros_like(token))

    def reserve(self, capacity: int) -> None:
        self.capacity = max(self.capacity, capacity)
        for layer in self.held.cache.layers if self.copies else ():
            if type(layer) is PrefixLayer and capacity > layer.capacity:
                wider = (0, 0, 0, capacity - layer.capacity)
                layer.keys, layer.values, layer.capacity = F.pad(layer.keys, wider), F.pad(layer.values, wider), capacity

    def current(self) -> bool:
        return True

    def keep(self, order: Sequence[int]) -> None:
        self.held.here = [self.held.here[position] for position in order]

    def _copy(self, k: int) -> None:
        """Makes k copies of each row, of which there is one so far, or fewer than k."""
        if self.copies:
            raise PyargsError(
                f"rows came in with {self.copies} candidates, and are now to have {k}: ask for the most at first"
            )
        rows = torch.arange(len(self.held.mask), device=self.held.mask.device)
        copy_rows(self.held.cache, rows.repeat_interleave(k), self.capacity + self.held.mask.shape[1])
        self.copies = k
