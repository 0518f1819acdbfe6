"""Best-of-N: N whole answers are sampled from the policy, and the reward model keeps the best. For every reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pyargs.decode.answer import Answer
from pyargs.decode.request import Request, numbered
from pyargs.errors import PyargsError
from pyargs.lm.called import Called


@dataclass
class Group:
    """A request, and the numbers of its samples."""

    request: Request
    parts: list[int]
    answer: Answer | None = None
    error: PyargsError | None = None


def samples(request: Request, n: int) -> list[Request]:
    """N requests for samples from the whole vocabulary, each with its own seed."""
    return [replace(request, user="", seed=numbered(request.seed, i)) for i in range(n)]


@torch.no_grad()
def pick(pair, number: int, request: Request, answers: Sequence[Answer]) -> Answer:
    """argmax of R_u(x, y) over N samples y ~ pi(. | x). An empty sample has no reward, and wins only if all are empty.

    The answer's rewards are those of all samples, -inf for empty ones; its slots and spreads say nothing.
    """
    model, prompt = pair.model, list(request.prompt)
    responses = [answer.tokens for answer in answers]
    if pair.bridge is not None:
        prompt = list(request.theirs)
        responses = [ids or [] for ids in pair.bridge.ids([pair.bridge.whole(one) for one in responses])]
    kept = [i for i, response in enumerate(responses) if response]
    called = isinstance(model.backbone, Called)
    known = math.inf if called else len(model.backbone.get_input_embeddings().weight)
    if any(max(responses[i]) >= known for i in kept):
        raise PyargsError(f"the policy chose a token beyond the {known} that the reward model knows: they do not fit")
    rewards = torch.full((len(answers),), -torch.inf, dtype=torch.float32, device="cpu")
    if kept:
        rewards[kept] = model.score([(prompt, [responses[i] for i in kept])], [request.user])[0].float()
    if not rewards[kept].isfinite().all():
        raise PyargsError(f"the rewards of request {number} are not finite numbers: check the model's weights")
    best = answers[int(rewards.argmax())]
    return replace(best, number=number, user=request.user, rewards=rewards.tolist(), seed=request.seed)
