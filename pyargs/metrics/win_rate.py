"""Win rate (arXiv 2512.23067): how often a reward model prefers the text that it guided to the unguided one.

A model that judges itself: near 100% it says that guidance worked, not that the text is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyargs.errors import PyargsError
from pyargs.metrics.rm_accuracy import compare


def win_rate(model, prompts: Sequence[Sequence[int]], users: Sequence[str], ours, theirs) -> dict:
    """Share of prompts, in percent, at which R_u(x, ours) > R_u(x, theirs); a tie is no win, and ties are counted.

    model: a RewardModel or TokenReward; prompts, ours, theirs: token ids without stop tokens on either side, N each; users: N
    ids. A prompt with an empty answer on either side has nothing to be read at: it is no win, and counted in `unscored`.
    `each`: by user a string of 1 for a win and 0 for none, in the order given. `tokens`: mean lengths of both sides, since
    sums of log-probs (GenARM) depend on them. Raises PyargsError without prompts and with a reward that is not a number.
    """
    if not len(prompts):
        raise PyargsError("no answers to compare")
    scored = [i for i, (own, other) in enumerate(zip(ours, theirs, strict=True)) if len(own) and len(other)]
    scores = torch.tensor([[0.0, 1.0]], dtype=torch.float32, device="cpu").repeat(len(prompts), 1)  # neither a win nor a tie
    if scored:
        found = model.score([(prompts[i], [ours[i], theirs[i]]) for i in scored], [users[i] for i in scored])
        scores[scored] = torch.stack([torch.as_tensor(pair, dtype=torch.float32).cpu() for pair in found])
    compared = compare(*scores.T, users)
    return {
        "win_rate": compared["accuracy"],
        **{name: compared[name] for name in ("tie_rate", "n", "each")},
        "unscored": len(prompts) - len(scored),
        "tokens": [sum(map(len, side)) / len(prompts) for side in (ours, theirs)],
    }
