"""Best-of-N: N whole answers are sampled from the policy, and the reward model keeps the best. For every reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyargs.decode import unguided
from pyargs.decode.answer import Answer
from pyargs.decode.request import Request, numbered, seeds, whole
from pyargs.errors import PyargsError
from pyargs.types import Decoded
from pyargs.user_ids import user_ids


@dataclass
class Group:
    """A request, and the numbers of its samples."""

    request: Request
    parts: list[int]


def samples(request: Request, n: int) -> list[Request]:
    """N requests for samples from the whole vocabulary, each by a seed of its own."""
    return [replace(request, user="", seed=numbered(request.seed, i)) for i in range(n)]


@torch.no_grad()
def pick(model, number: int, request: Request, answers: Sequence[Answer]) -> Answer:
    """argmax over N samples y ~ pi(. | x) of R_u(x, y). An empty one has no tokens to reward, and only wins among empty ones.

    The answer's rewards are those of all samples, -inf for empty ones; its slots and spreads say nothing.
    """
    kept = [i for i, answer in enumerate(answers) if answer.tokens]
    known = len(model.backbone.get_input_embeddings().weight)
    if any(max(answers[i].tokens) >= known for i in kept):
        raise PyargsError(f"the policy chose a token beyond the {known} that the reward model knows: they do not fit")
    rewards = torch.full((len(answers),), -torch.inf, dtype=torch.float32, device="cpu")
    if kept:
        prompt = list(request.prompt)
        rewards[kept] = model.score([(prompt, [answers[i].tokens for i in kept])], [request.user])[0].float()
    if not rewards[kept].isfinite().all():
        raise PyargsError(f"the rewards of request {number} are not finite numbers: check the model's weights")
    best = answers[int(rewards.argmax())]
    return replace(best, number=number, user=request.user, rewards=rewards.tolist(), seed=request.seed)


@torch.no_grad()
def generate(
    policy,
    model,
    prompts: Sequence[Sequence[int]],
    users: Sequence[str],
    *,
    n: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
) -> tuple[list[Decoded], Tensor]:
    """argmax over N samples y ~ pi(. | x) of R_u(x, y).

    policy: a model of transformers; model: a RewardModel or TokenReward of the same tokenizer; prompts as ids, one user each;
    n: samples (default 16; the paper discusses Best-of-N without a number), from the whole vocabulary at `temperature`
    (1.0). seed: one for all prompts, each then with its number, or one per prompt; a prompt's answer does not depend on the
    others. An empty sample has no tokens to reward and only wins among empty ones.
    Returns one Decoded (of one row) per prompt and the rewards float32 [B, N] of all samples, -inf for empty ones.
    """
    n = whole("n", n, 1)
    users = user_ids(users)
    if len(prompts) != len(users):
        raise PyargsError(f"{len(prompts)} prompts but {len(users)} users: name one user for each row")
    model.users.rows(users)  # an unknown user raises before anything is sampled
    given = seeds(seed, len(prompts))
    own_seeds = given if isinstance(given, list) else [numbered(given or 0, i) for i in range(len(prompts))]
    best, rewards = [], torch.full((len(prompts), n), -torch.inf, dtype=torch.float32, device="cpu")
    for row, (prompt, user, own) in enumerate(zip(prompts, users, own_seeds, strict=True)):
        drawn = unguided.generate(
            policy, [prompt] * n, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, seed=own
        )
        answers = drawn.answers()
        kept = [i for i, answer in enumerate(answers) if answer]
        known = len(model.backbone.get_input_embeddings().weight)
        if any(max(answers[i]) >= known for i in kept):
            raise PyargsError(f"the policy chose a token beyond the {known} that the reward model knows: they do not fit")
        if kept:
            rewards[row, kept] = model.score([(list(prompt), [answers[i] for i in kept])], [user])[0].float()
        if not rewards[row, kept].isfinite().all():
            raise PyargsError(f"the rewards of prompt {row} are not finite numbers: check the model's weights")
        winner = int(rewards[row].argmax())
        best.append(Decoded(*(value[winner : winner + 1] for value in vars(drawn).values())))
    return best, rewards
