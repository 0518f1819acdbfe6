"""Requests that change the policy's logits before the candidates are taken: forbidden tokens, penalties, grammars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.decode.answer import Ticket
from pyargs.errors import PyargsError

Adjust = Callable[[dict[int, list[int]], Tensor], Tensor]
"""`adjust(rows, logits) -> logits`: rows are the requests' numbers with their tokens so far, prompt and answer; logits float32
[n, V] are the policy's, one row each in this order, and may be changed in place. -inf forbids a token."""


def adjusted(tickets: Sequence[Ticket], logits: Tensor) -> Tensor:
    """Logits float32 [m, V] of rows as their requests' `adjust` leave them. Rows with the same function are given to it
    together, so that one which knows a batch (a processor of transformers, a grammar) sees all of it at once. A row without a
    token left is NaN, and ends with an error."""
    places: dict[Adjust, list[int]] = {}
    for place, ticket in enumerate(tickets):
        if ticket.request.adjust is not None:
            places.setdefault(ticket.request.adjust, []).append(place)
    logits = logits.clone()
    for adjust, several in places.items():
        rows = {tickets[place].number: [*tickets[place].request.prompt, *tickets[place].tokens] for place in several}
        own = adjust(rows, logits[several])
        if not isinstance(own, Tensor) or own.shape != (len(several), logits.shape[1]):
            got = f"{list(own.shape)}" if isinstance(own, Tensor) else f"a {type(own).__name__}"
            raise PyargsError(f"adjust must return logits of shape {[len(several), logits.shape[1]]}, got {got}")
        none = (own == -torch.inf).all(1, keepdim=True)
        logits[several] = own.to(logits).masked_fill(none, torch.nan)
    return logits
