"""Decoding on a CPU through the CPU stack, which reads the weights once at the rate of the memory.

Where policy and reward model use the same weights, one pass serves both. With a frozen backbone the candidates' states are the
policy's, too. With LoRA, the reward model's pass also computes the policy's states of the likeliest candidates; if another one
wins, its row needs one more pass. A token's state is bit for bit the same in any pass, so guesses change no token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.lm import lora
from pyargs.lm.bits import held
from pyargs.lm.stack import keep, run
from pyargs.lm.tokenize import left_pad

GUESSES = {1: 2, 2: 1}
"""Rows of a batch -> candidates whose states for the policy are computed along. In larger batches some row nearly always needs
another candidate, and the reward model's rows alone keep the processor busy (docs/performance.md)."""


PLACES = 64
"""A cache's capacity is a multiple of it, so that it seldom grows."""


class _Rows:
    """The rows that are here, at the positions 0, 1, ..., in the cache of a stack.

    halves: how many rows of the cache each of them has; half h of cache row r is r + h * room. The adapter of the stack counts
    for the last half of two, and for `delta` of one.
    """

    def __init__(self, stack: run.Stack, room: int, *, halves: int = 1, delta: bool = False):
        self.stack, self.room, self.halves, self.delta = stack, room, halves, delta
        self.cache, self.capacity = stack.cache(room * halves, 0), 0
        self.rows: list[int] = []
        self.reading: int | None = None  # the row of the cache into which a prompt is being read
        self.texts: list[list[int]] = [[] for _ in range(room)]  # what each row of the cache holds, also when it has left

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """The states [halves, m, D] of the prompts' last tokens. If half of a prompt or more is the beginning of a row in the
        cache, that part is not computed again: a user's demonstrations, say. The first prompt is the one that was being read,
        if there is one."""
        rows, states = self._enter(prompts, capacity)
        self.rows += rows
        self.reading = None
        return states

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`; returns how many of its tokens are in the cache."""
        ((self.reading,), _) = self._enter([prompt], capacity, end)
        return len(self.texts[self.reading])

    def unread(self) -> None:
        self.reading = None

    def _enter(self, prompts: Sequence[Sequence[int]], capacity: int, end: int | None = None) -> tuple[list[int], Tensor]:
        """Rows of the cache into which prompts were read, up to `end`, and the states [halves, m, D] of the last tokens."""
        self.reserve(capacity)
        known, joined = [], []
        free = [row for row in range(self.room) if row not in self.rows and row != self.reading]
        for prompt in prompts:
            if self.reading is not None and not joined:
                joined.append(self.reading)
                known.append((len(self.texts[self.reading]), None))
                continue
            sharing = [run.shared(self.texts[row], prompt) for row in free]
            place = max(range(len(free)), key=sharing.__getitem__)
            row, most, source = free.pop(place), sharing[place], None
            for other in self.rows + [row for row, source in zip(joined, known, strict=True) if source[1] is None]:
                text = self.texts[other] if other in self.rows else list(prompts[joined.index(other)])
                if (same := run.shared(text, prompt)) > most:
                    most, source = same, other
            if 2 * most < len(prompt):
                most, source = 0, None
            joined.append(row)
            known.append((most, source))
        states = torch.empty(self.halves, len(prompts), self.stack.dim, dtype=torch.float32, device="cpu")
        for continued in (False, True):  # those that begin as none of the others does come first
            some = [i for i, (_, source) in enumerate(known) if (source is not None) == continued]
            for i in some:
                length, source = known[i]
                for half in self._halves():
                    if source is None:
                        self.cache.cut(length, joined[i] + half)
                    else:
                        self.cache.copy(joined[i] + half, source + half, length)
            if some:
                new = [list(prompts[i])[known[i][0] : end] for i in some]
                if any(new):
                    ids, mask = left_pad(new, 0)
                    states[:, some] = self.run(ids, mask, rows=[joined[i] for i in some])[..., -1, :]
        for i, (row, prompt) in enumerate(zip(joined, prompts, strict=True)):
            self.texts[row] = list(prompt[: None if end is None else max(end, known[i][0])])
        return joined, states

    def run(self, ids: Tensor, mask: Tensor | None = None, *, rows: list[int] | None = None, branches: bool = False) -> Tensor:
        """States [halves, n, T, D] of ids [n, T] behind the rows at all positions, or of these rows of the cache."""
        rows = self.rows if rows is None else rows
        n, several = len(ids), self.halves > 1
        states = self.stack(
            ids.repeat(self.halves, 1) if several else ids,
            self.cache,
            mask.repeat(self.halves, 1) if several and mask is not None and len(mask) == n else mask,
            branches=branches,
            rows=[row + half for half in self._halves() for row in rows],
            delta=torch.arange(2 * n, device="cpu") >= n if several else self.delta,
        )
        return states.view(self.halves, n, *states.shape[1:])

    def keep(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[position] for position in order]

    def note(self, token: Tensor, going: Tensor | None = None) -> None:
        """Token [n] is the next one of each row, where going [n], all by default."""
        goes = [True] * len(self.rows) if going is None else going.tolist()
        for row, one, on in zip(self.rows, token.tolist(), goes, strict=True):
            if on:
                self.texts[row].append(one)

    def follow(self, token: Tensor, going: Tensor | None = None) -> Tensor:
        """Appends token [n] to each row where going [n]; returns its states [n, D], 0 for the other rows."""
        self.note(token, going)
        if going is None:
            return self.run(token.unsqueeze(1))[0, :, 0]
        on = going.nonzero().flatten().tolist()
        states = run.zeros(len(token), self.stack.dim)
        if on:
            states[on] = self.run(token[on].unsqueeze(1), rows=[self.rows[i] for i in on])[0, :, 0]
        return states

    def _halves(self) -> range:
        return range(0, self.room * self.halves, self.room)

    def reserve(self, capacity: int) -> None:
        if capacity <= self.capacity:
            return
        self.capacity = -(-capacity // PLACES) * PLACES
        old, self.cache = self.cache, self.stack.cache(self.room * self.halves, self.capacity)
        for row, length in enumerate(old.length):
            self.cache.copy(row, row, length, old)


class Half:
    """Policy or reward model by itself, in a stack and rows of its own."""

    def __init__(self, model, room: int):
        self.model, self.stack = model, keep.stack_as_held(model)
        self.held = _Rows(self.stack, room, delta=self.stack.has_delta)

    def reserve(self, capacity: int) -> None:
        """Room for so many tokens of each row."""
        self.held.reserve(capacity)

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        """Reads a prompt up to `end`; returns how many of its tokens are read. `join` has it first and reads the rest."""
        return self.held.read(prompt, end, capacity)

    def unread(self) -> None:
        """The prompt of which a part was read does not come."""
        self.held.unread()

    def current(self) -> bool:
        """Whether the packed weights are still the model's; reads all weights."""
        return keep.stack_as_held(self.model) is self.stack

    def keep(self, order: Sequence[int]) -> None:
        """The rows at these positions stay, in this order."""
        self.held.keep(order)


class Policy(Half):
    """The policy's half: logits behind the tokens of the rows at the positions 0, 1, ...

    vocabulary: the tokens that can be chosen. top: of the logits only so many are asked for, 0 is all: the others may be
    estimates, smaller than these (`Stack.logits`).
    """

    screened = True

    def __init__(self, lm, room: int, vocabulary: int):
        super().__init__(lm, room)
        self.vocabulary, self.top = vocabulary, 0

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """Adds rows behind those that are here and reads their prompts; returns logits [m, V] of their first tokens."""
        return self._logits(self.held.join(prompts, capacity)[0])

    def advance(self, token: Tensor, going: Tensor | None = None) -> Tensor:
        """Appends token [n] to each row where going [n] (all by default); returns the next token's logits [n, V]."""
        return self._logits(self.held.follow(token, going))

    def _logits(self, state: Tensor) -> Tensor:
        return self.stack.logits(state, top=self.top, vocabulary=self.vocabulary)


class Scorer(Half):
    """The reward model's half: states of candidates behind the tokens of the rows."""

    leaves_out = True

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """As `Policy.join`: the states [m, D] of the prompts' last tokens."""
        return self.held.join(prompts, capacity)[0]

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        """States [n, k, D] of candidates [n, k], each behind its row's tokens; 0 outside `wanted` bool [n, k]."""
        return self.held.run(candidates, wanted, branches=True)[0]

    def commit(self, token: Tensor, slot: Tensor) -> None:
        """Appends token [n], the candidate at slot [n], to each row; a slot of -1 leaves its row."""
        self.stack.commit(self.held.cache, slot, self.held.rows)
        self.held.note(token, slot >= 0)

    def advance(self, token: Tensor, going: Tensor | None = None) -> None:
        """Appends token [n], a candidate or not, to each row where going [n]."""
        self.held.follow(token, going)


class Shared:
    """Both halves on the same weights. With LoRA (`adapted`) every row has a second one for the reward model."""

    screened = leaves_out = True

    def __init__(self, policy, backbone, room: int, vocabulary: int):
        self.adapted = lora.active(backbone)
        self.policy, self.backbone, self.adapter = policy, backbone, backbone if self.adapted else None
        self.stack = keep.stack_of(policy, self.adapter)
        self.held = _Rows(self.stack, room, halves=2 if self.adapted else 1)
        self.vocabulary, self.top, self.room = vocabulary, 0, room
        self.states = run.zeros(0, 0, self.stack.dim)  # of the candidates, as the policy sees them

    def join(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor]:
        """Logits [m, V] of the first tokens, and the reward model's states [m, D] of the prompts' last ones."""
        states = self.held.join(prompts, capacity)
        self.states = run.zeros(len(self.held.rows), 0, self.stack.dim)
        return self._logits(states[0]), states[-1]

    def read(self, prompt: Sequence[int], end: int, capacity: int) -> int:
        return self.held.read(prompt, end, capacity)

    def unread(self) -> None:
        self.held.unread()

    @property
    def halves(self) -> tuple[Shared]:
        return (self,)

    def branch(self, candidates: Tensor, wanted: Tensor | None = None) -> Tensor:
        if not self.adapted:
            self.states = self.held.run(candidates, wanted, branches=True)[0]
            return self.states
        n, guesses = len(candidates), GUESSES.get(len(candidates), 0)
        mask = torch.ones(2 * n, candidates.shape[1], dtype=torch.bool, device="cpu")
        if wanted is not None:
            mask &= wanted.repeat(2, 1)
        mask[:n, guesses:] = False
        states = self.held.run(candidates, mask, branches=True)
        self.states = states[0, :, :guesses]
        return states[1]

    def follow(self, token: Tensor, slot: Tensor, stay: bool = False) -> Tensor:
        """Appends token [n], the candidate at slot [n], to each row; returns the next token's logits [n, V]."""
        held, rows = self.held, self.held.rows
        hit = slot < self.states.shape[1]
        own = slot.where(hit, -1)
        if self.adapted:
            self.stack.commit(held.cache, torch.cat([own, slot]), [*rows, *(row + self.room for row in rows)])
        else:
            self.stack.commit(held.cache, own, rows)
        state = self.states.new_zeros(len(slot), self.stack.dim)
        state[hit] = self.states[hit, slot[hit]]
        missed = (~hit).nonzero().flatten().tolist()
        if missed:
            state[missed] = self.stack(token[missed].unsqueeze(1), held.cache, rows=[rows[i] for i in missed])[:, 0]
        held.note(token)
        return self._logits(state)

    def current(self) -> bool:
        """Whether the packed weights are still those of both models; reads all weights."""
        same = shares(self.policy, self.backbone) and lora.active(self.backbone) == self.adapted
        return same and keep.stack_of(self.policy, self.adapter) is self.stack

    def keep(self, order: Sequence[int]) -> None:
        self.held.keep(order)
        self.states = self.states[list(order)]

    def _logits(self, state: Tensor) -> Tensor:
        return self.stack.logits(state, top=self.top, vocabulary=self.vocabulary)


def shares(policy, backbone) -> bool:
    """Whether one pass serves both halves: not where the reward model's weights are held in other bits than the policy's."""
    return held(backbone) in (None, held(policy)) and lora.same_weights(policy.get_decoder(), backbone)
