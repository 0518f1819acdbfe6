"""ARGS as one would write it first: k copies of the reward model's cache, plain PyTorch, any model of transformers.

Tests and benchmarks compare the other decoders with this loop. It also serves models whose layers keep a state instead of
keys and values, or look through a window, since it asks of a cache only that its rows can be reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyargs.decode.request import Request, bounds, check_numbers, noise
from pyargs.lm.cache import copy_rows, follow_copies
from pyargs.lm.forward import forward_step
from pyargs.lm.tokenize import left_pad
from pyargs.models.reward_model import RewardModel
from pyargs.ops.choice import choose, is_stop


class Chosen(NamedTuple):
    """What was chosen for a request, step by step, a stop token included: tokens, their slots and their rewards."""

    tokens: list[int]
    slots: list[int]
    rewards: list[float]


@torch.no_grad()
def answers(
    policy,
    reward_model: RewardModel,
    requests: Sequence[Request],
    *,
    eos_reward: str = "before",
    vocabulary: int | None = None,
    token_callback: Callable[[Tensor], None] | None = None,
) -> list[Chosen]:
    """What is chosen for requests that start together, in their order. eos_reward: see `pyargs.Engine`; vocabulary: so many
    tokens can be chosen, by default all that the policy's logits name. token_callback: called after each step with its tokens.

    Raises PyargsError that names the rows in which nothing could be chosen.
    """
    if not requests:
        return []
    rows, k = len(requests), max(one.num_candidates for one in requests)
    longest, stops = (max(each) for each in zip(*((one.max_new_tokens, len(one.stop)) for one in requests), strict=True))
    device, backbone, head = reward_model.device, reward_model.backbone, reward_model.head
    put = lambda values, dtype: torch.tensor(list(values), dtype=dtype, device=device)  # noqa: E731
    weight, temperature = (
        put((getattr(one, name) for one in requests), torch.float32) for name in ("reward_weight", "temperature")
    )
    limit = put((one.max_new_tokens for one in requests), torch.long)
    stop = put(([*one.stop, *[-1] * (stops - len(one.stop))] for one in requests), torch.long).view(rows, stops)
    clip = put((bounds(one)[0] for one in requests), torch.float32).unsqueeze(1)
    uniform = torch.stack([noise(one, longest) for one in requests], dim=1).to(device)
    user = reward_model.users.rows([one.user for one in requests]).to(device)

    ids, mask = (each.to(policy.device) for each in left_pad([list(one.prompt) for one in requests], 0))
    padded = not bool(mask.all())
    policy_out, policy_cache = forward_step(policy, ids, mask, None, padded, logits_to_keep=1)
    reward_out, reward_cache = forward_step(backbone, ids.to(device), mask.to(device), None, padded)
    so_far = head(reward_out.last_hidden_state[:, -1], user).clamp(-clip[:, 0], clip[:, 0])
    total = torch.zeros_like(so_far)
    # Row b * k + j holds candidate j of row b, behind its own copy of the prefix.
    first_row = torch.arange(rows, device=device) * k
    copy_rows(reward_cache, torch.arange(rows, device=device).repeat_interleave(k), ids.shape[1] + longest)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    steps: list[tuple[Tensor, ...]] = []

    for step in range(longest):
        logprobs = policy_out.logits[:, -1, :vocabulary].float().log_softmax(-1).to(device)
        logprobs, candidates = _topk(logprobs, k)

        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        reward_out, reward_cache = forward_step(
            backbone, candidates.reshape(-1, 1), mask.to(device).repeat_interleave(k, dim=0), reward_cache, padded
        )
        hidden = reward_out.last_hidden_state.reshape(rows, k, -1)
        reward = head(hidden, user.unsqueeze(1).expand(rows, k)).clamp(-clip, clip)
        if eos_reward == "before":
            reward = torch.where(is_stop(candidates, stop), so_far.unsqueeze(1), reward)
        going = ~finished
        token, slot, reward, finished = choose(
            logprobs,
            reward,
            weight / (step + 1) if reward_model.step_reward == "prefix_mean" else weight,
            candidates,
            finished,
            stop=stop,
            temperature=temperature,
            uniform=uniform[step],
            count=put(map(_considered, logprobs, requests), torch.long),
        )
        check_numbers(slot < 0)
        chosen = reward.gather(1, slot.unsqueeze(1)).squeeze(1)
        total = total + chosen
        so_far = total / (step + 1) if reward_model.step_reward == "prefix_mean" else chosen
        finished = finished | (step + 1 >= limit)
        steps.append((going, token, slot, chosen))
        if token_callback is not None:
            token_callback(token)
        if finished.all():
            break

        follow_copies(reward_cache, (first_row + slot).repeat_interleave(k))
        policy_out, policy_cache = forward_step(
            policy, token.unsqueeze(1).to(policy.device), mask, policy_cache, padded, logits_to_keep=1
        )
    going, *parts = (torch.stack(each, dim=1).cpu() for each in zip(*steps, strict=True))
    return [Chosen(*(part[row, going[row]].tolist() for part in parts)) for row in range(rows)]


def _considered(logprobs: Tensor, request: Request) -> int:
    """How many of its candidates, the likeliest first, a request leaves."""
    if request.top_p == 1 and request.min_p == 0:
        return request.num_candidates
    chance = logprobs[: request.num_candidates].double().exp()
    likely = chance.cumsum(0) - chance < request.top_p * chance.sum()
    return max(1, int((likely & (chance >= request.min_p * chance[0])).sum()))


def _topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk with the lower id first among equals, which topk itself does not promise."""
    top, ids = values.topk(k)
    if ((values >= top[:, -1:]).sum(1) > k).any():  # a tie across the border: rare, so it may cost a whole sort
        top, ids = values.sort(dim=-1, descending=True, stable=True)
        return top[:, :k], ids[:, :k]
    ids, order = ids.sort(dim=1)
    top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
    return top, ids.gather(1, order)
