"""A function of whole texts in the place of a decoder: a text's state, of one number, is its reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError

TEXTS = 256
"""Of a response, how many beginnings are given to the function at a time."""


class Called(nn.Module):
    """function(ids int64 [B, T], mask int64 [B, T]) -> rewards float [B]. Texts stand on the left, and `pad` fills them up;
    the mask is 1 where a token counts. A function that is a module moves with this one, and is in its mode.

    Raises PyargsError with the function's name where it returns anything else, or numbers that are not finite.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], pad: int):
        super().__init__()
        if not callable(function):
            raise PyargsError(f"a reward is a function of ids and mask, got {function!r:.60}")
        self.place = nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"), requires_grad=False)  # tells the device
        self.function, self.pad = function, pad
        self.name_or_path = getattr(function, "__qualname__", type(function).__name__)

    @torch.no_grad()
    def rewards(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Of texts that are not empty, float32 [B]."""
        longest, device = max(map(len, texts)), self.place.device
        put = lambda rows: torch.tensor(rows, dtype=torch.long, device=device)  # noqa: E731
        ids = put([[*text, *[self.pad] * (longest - len(text))] for text in texts])
        mask = put([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        found = self.function(ids, mask)
        if not isinstance(found, Tensor) or found.shape != (len(texts),) or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise PyargsError(f"the reward function {self.name_or_path} must return floats of shape [{len(texts)}], got {got}")
        if not found.isfinite().all():
            raise PyargsError(f"the reward function {self.name_or_path} returned rewards that are no finite numbers")
        return found.float().to(device)

    def states_of(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The same as states [B, 1]."""
        return self.rewards(texts).unsqueeze(1)

    def states(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """The reward of each beginning of the response behind the prompt, float32 [T, 1]."""
        texts = [[*prompt, *response[: end + 1]] for end in range(len(response))]
        parts = [self.rewards(texts[start : start + TEXTS]) for start in range(0, len(texts), TEXTS)]
        return torch.cat(parts).unsqueeze(1).cpu() if parts else torch.empty(0, 1, dtype=torch.float32, device="cpu")
