"""ARGS as one would write it first: k copies of the reward model's cache, plain PyTorch, any model of transformers.

Tests and benchmarks compare the other decoders with this loop. It also serves models whose layers keep a state instead of
keys and values, or look through a window, since it asks of a cache only that its rows can be reordered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pyargs.decode.answer import Output
from pyargs.decode.request import BatchRequest
from pyargs.errors import PyargsError
from pyargs.lm.cache import PrefixLayer
from pyargs.lm.forward import forward_step
from pyargs.models.reward_model import RewardModel
from pyargs.ops.choice import choose
from pyargs.types import Decoded


@torch.no_grad()
def decode(policy, reward_model: RewardModel, request: BatchRequest) -> Decoded:
    rows, k = len(request.user), request.num_candidates
    device, backbone = reward_model.device, reward_model.backbone
    mask = request.attention_mask
    padded = not bool(mask.all())

    policy_out, policy_cache = forward_step(policy, request.input_ids, mask, None, padded, logits_to_keep=1)
    reward_out, reward_cache = forward_step(backbone, request.input_ids.to(device), mask.to(device), None, padded)
    so_far = reward_model.head(reward_out.last_hidden_state[:, -1], request.user)
    total = torch.zeros_like(so_far)
    # Row b * k + j holds candidate j of row b, behind its own copy of the prefix.
    first_row = torch.arange(rows, device=device) * k
    _branch(reward_cache, torch.arange(rows, device=device).repeat_interleave(k), request.max_new_tokens)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    output = Output(rows, request.max_new_tokens, device)

    for step in range(request.max_new_tokens):
        logprobs = policy_out.logits[:, -1, : request.vocabulary].float().log_softmax(-1).to(device)
        logprobs, ids = _topk(logprobs, k)

        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        reward_out, reward_cache = forward_step(
            backbone, ids.reshape(-1, 1), mask.to(device).repeat_interleave(k, dim=0), reward_cache, padded
        )
        hidden = reward_out.last_hidden_state.reshape(rows, k, -1)
        reward = reward_model.head(hidden, request.user.unsqueeze(1).expand(rows, k))
        if request.eos_reward == "before":
            reward = torch.where(torch.isin(ids, request.stop), so_far.unsqueeze(1), reward)
        token, slot, reward, finished = choose(
            logprobs,
            reward,
            request.step_weight(step),
            ids,
            finished,
            stop=request.stop,
            pad_id=request.pad_id,
            temperature=request.temperature,
            uniform=None if request.uniform is None else request.uniform[step],
        )
        chosen = output.add(token, slot, reward, finished)
        total = total + chosen
        so_far = total / (step + 1) if request.prefix_mean else chosen
        if output.stop(request, step, finished):
            break

        _follow(reward_cache, (first_row + slot.clamp(min=0)).repeat_interleave(k))
        policy_out, policy_cache = forward_step(
            policy, token.unsqueeze(1).to(policy.device), mask, policy_cache, padded, logits_to_keep=1
        )
    return output.decoded(request, finished)


def _branch(cache, row: Tensor, room: int) -> None:
    """Makes copies of the rows; row int64 [B * k] is what each copy holds. `room` tokens will be added."""
    if type(cache).__module__ != DynamicLayer.__module__:  # nobody promises that all of it is copied
        raise PyargsError(
            f"a {type(cache).__name__} holds more than transformers' own caches: candidates can not be tried here"
        )
    cache.reorder_cache(row)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # it would copy all its keys and values at every token
            cache.layers[i] = PrefixLayer(layer.get_seq_length() + room)
            cache.layers[i].update(layer.keys, layer.values)
            cache.layers[i].length = layer.get_seq_length()


def _follow(cache, winner: Tensor) -> None:
    """All copies go on from their row's winner; winner int64 [B * k] is the copy that each one continues."""
    for layer in cache.layers:
        if type(layer) is PrefixLayer:  # the copies differ in their newest place only
            for states in (layer.keys, layer.values):
                states[:, :, layer.length] = states[winner, :, layer.length]
            layer.length += 1
        else:
            layer.reorder_cache(winner)


def _topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk with the lower id first among equals, which topk itself does not promise."""
    top, ids = values.topk(k)
    if ((values >= top[:, -1:]).sum(1) > k).any():  # a tie across the border: rare, so it may cost a whole sort
        top, ids = values.sort(dim=-1, descending=True, stable=True)
        return top[:, :k], ids[:, :k]
    ids, order = ids.sort(dim=1)
    top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
    return top, ids.gather(1, order)
