"""Passes of a decoder stack of the Llama family in C++: weights packed once, one parallel region per pass.

    stack = pack(model)                                 # pyargs.lm.stack.pack
    cache = stack.cache(rows=len(ids), capacity=ids.shape[1] + 64 + k)
    states = stack(ids, cache, mask)                    # the prompts
    logits = stack.logits(states[:, -1])
    states = stack(candidates, cache, branches=True)    # k candidates behind each prefix
    stack.commit(cache, slot)                           # one of them becomes the prefix's next token

A token's state does not depend on what else is in its pass: it is the same, bit by bit, in a prompt, as an ordinary step,
among branches, and for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError
from pyargs.progress import progress_bar


class Cache:
    """Keys and values of `rows` sequences in float32; `Stack.cache` makes it.

    length: a list with the number of tokens of each row's prefix. Left padding takes no place. Rows need not belong to one
    batch: a policy and a reward model that share a stack have rows of their own.
    """

    def __init__(self, native):
        self.native = native

    @property
    def length(self) -> list[int]:
        return self.native.length

    @property
    def rows(self) -> int:
        return self.native.rows

    def cut(self, length: int, row: int | None = None) -> None:
        """A row keeps its first `length` tokens only; all rows do by default."""
        if length < 0:
            raise PyargsError(f"a row cannot keep {length} tokens")
        self.native.length = [min(length, kept) if row in (None, i) else kept for i, kept in enumerate(self.length)]

    def copy(self, row: int, source: int, length: int, other: Cache | None = None) -> None:
        """Row `row` becomes the first `length` tokens of row `source`, of this cache or of another one of the same model."""
        with _errors():
            self.native.copy((other or self).native, row, source, length)


class Stack:
    """A packed decoder; `pack` makes it. All tensors that go in and out are on the CPU."""

    def __init__(self, native, sizes: dict, dtype: torch.dtype, rotary: nn.Module, embedding: Tensor, divisor: float | None):
        """divisor: of the output layer's numbers (`structure.logits_divisor`); None without that layer."""
        self._native, self._sizes, self._dtype, self._rotary, self._embedding = native, sizes, dtype, rotary, embedding
        self.dim, self.vocabulary, self.has_delta = sizes["dim"], sizes["vocabulary"], False
        self.has_logits, self._divisor = divisor is not None, divisor

    @torch.no_grad()
    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens, branches included."""
        # Through the model's own tables: every scaling that it has, rounded as it rounds.
        tables = self._rotary(zeros(0), torch.arange(capacity, device="cpu").unsqueeze(0))
        half = self._sizes["head_dim"] // 2
        cosine, sine = (table[0, :, :half].contiguous() for table in tables)
        shape = (self._sizes[name] for name in ("layers", "kv_heads", "head_dim"))
        from pyargs import _C

        with _errors():
            return Cache(_C.Cache(*shape, rows, cosine, sine))

    def __call__(
        self,
        ids: Tensor,
        cache: Cache,
        mask: Tensor | None = None,
        *,
        branches: bool = False,
        rows: Tensor | Sequence[int] | None = None,
        delta: bool | Tensor | Sequence[bool] = False,
    ) -> Tensor:
        """Last-layer states, normed, float32 [B, n, dim], of tokens behind what the cache holds.

        ids: int64 [B, n]. mask: [B, n], zero where there is no token (left padding, or fewer branches than n): nothing is
        computed there, and the states are zero.
        branches: False: the tokens of a row follow each other, and become part of its prefix. True: each sees the prefix and
        itself, as its next token; `commit` then says which stays, the others are written over.
        rows: [B], the row of the cache that each row of ids continues, none twice; the first B by default.
        delta: whether the adapter of `pack` counts; one bool for all rows of ids, or one each [B].
        """
        ids = _dense(ids, torch.int64, "ids")
        if ids.dim() != 2:
            raise PyargsError(f"ids must be [B, n], got shape {list(ids.shape)}")
        count, width = ids.shape
        mask = None if mask is None else _dense(mask, torch.bool, "mask")
        if rows is None and count > cache.rows:
            raise PyargsError(f"{count} rows of ids, but the cache has {cache.rows}: make a larger one")
        rows = None if rows is None else _dense(rows, torch.int64, "rows")
        if isinstance(delta, bool):
            delta = torch.full((count,), True, dtype=torch.bool, device="cpu") if delta else None
        else:
            delta = _dense(delta, torch.bool, "delta")
        if delta is not None and not self.has_delta and delta.any():
            raise PyargsError("this stack has no delta: give pack an adapter")
        make = torch.empty if mask is None else torch.zeros
        states = make(count, width, self.dim, dtype=torch.float32, device="cpu")
        with _errors():
            self._native.forward(cache.native, ids, mask, rows, delta, branches, states)
        return states

    def commit(self, cache: Cache, slot: Tensor, rows: Tensor | Sequence[int] | None = None) -> None:
        """The branch in column slot [B] of the last pass becomes the next token of each row; a slot of -1 leaves its row."""
        rows = None if rows is None else _dense(rows, torch.int64, "rows")
        with _errors():
            cache.native.commit(_dense(slot, torch.int64, "slot"), rows)

    def logits(self, states: Tensor, *, top: int = 0, vocabulary: int | None = None) -> Tensor:
        """The output layer: float32 [B, dim] -> float32 [B, vocabulary], of the first `vocabulary` tokens, all by default.

        top: how many of a row's largest logits must be exact (0: all). The others may be estimates, smaller than these, and so
        is a logsumexp then: an int8 copy of the weights, with a bound of its error, says which few outputs need the full
        weights. With top > 64, or with more rows than this pays for, all are exact.
        """
        if not self.has_logits:
            raise PyargsError("this stack was packed from a decoder, which has no output layer: pack the causal LM")
        states = _dense(states, torch.float32, "states")
        if self._divisor != 1:  # here, since divided logits could be equal where the largest ones are not
            states = states / self._divisor
        vocabulary = self.vocabulary if vocabulary is None else vocabulary
        if top < 0 or not 0 < vocabulary <= self.vocabulary:
            raise PyargsError(f"cannot give the {top} largest logits of {vocabulary} tokens: the model has {self.vocabulary}")
        logits = torch.empty(len(states), vocabulary, dtype=torch.float32, device="cpu")
        with _errors():
            self._native.logits(states, top, logits)
        return logits


def _dense(values, dtype: torch.dtype, name: str) -> Tensor:
    """Values as the extension takes them: it checks shape and device, and that nothing was moved between devices."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    if dtype == torch.int64 and tensor.is_floating_point() and tensor.numel():  # an empty list is of floats
        raise PyargsError(f"{name} must be whole numbers, got {tensor.dtype}")
    return tensor.detach().to(dtype).contiguous()


def _ids(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device="cpu")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


class _errors:
    """Within it, errors of the extension become PyargsErrors."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is RuntimeError:
            raise PyargsError(str(error)) from None


ROWS = 48
"""Tokens in a pass up to which its weights are read once (kTaskRows of csrc/stack/pass.h): what short responses share."""

PLACES = 512
"""Tokens that the cache holds for responses of one pass, each behind a copy of the prompt."""


@torch.no_grad()
def continuations(stack: Stack, groups, progress: str = "states") -> Iterator[tuple[Tensor, list[Tensor]]]:
    """States behind a prompt that is computed once: for each (prompt ids, [response ids]) the prompt's last state [1, D]
    ([0, D] of an empty prompt) and those of each response [T, D], with the stack's delta where it has one. Short responses
    share a pass, and what a prompt begins with as the one before did is not computed again."""
    longest = max((len(prompt) + max(map(len, several), default=0) for prompt, several in groups), default=0)
    passes = [_together(several, PLACES // max(longest, 1)) for _, several in groups]
    cache = stack.cache(max((len(some) for parts in passes for some in parts), default=1), max(longest, 1))
    bar = progress_bar(groups, desc=progress, unit="prompt", hide=len(groups) < 32)
    before: Sequence[int] = []
    for (prompt, _), parts in zip(bar, passes, strict=True):
        cache.cut(known := shared(before, prompt))
        last = stack(_ids([prompt[known:]]), cache, delta=stack.has_delta)[0, -1:] if prompt else zeros(0, stack.dim)
        for row in range(1, max(map(len, parts), default=1)):
            cache.copy(row, 0, len(prompt))
        states, before = [], prompt
        for some in parts:
            cache.cut(len(prompt))
            lengths = [len(one) for one in some]
            ids = _ids([[*one, *[0] * (max(lengths) - len(one))] for one in some])
            mask = torch.tensor([[True] * n + [False] * (max(lengths) - n) for n in lengths], dtype=torch.bool, device="cpu")
            states += stack(ids, cache, mask, delta=stack.has_delta)[mask].split(lengths)
        yield last, states


def shared(before: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens a prompt begins with as the one before did; never all, since its last state is needed."""
    pairs = zip(before, prompt[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), max(len(prompt) - 1, 0)))


def _together(several: Sequence[Sequence[int]], most: int) -> list[list[Sequence[int]]]:
    """Responses, one after the other, that share a pass: `most`, of ROWS tokens in all; longer ones have one of their own."""
    parts: list[list[Sequence[int]]] = []
    for response in several:
        if parts and len(parts[-1]) < most and sum(map(len, parts[-1])) + len(response) <= ROWS:
            parts[-1].append(response)
        else:
            parts.append([response])
    return parts
