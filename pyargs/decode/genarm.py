"""Guided decoding with a TokenReward (GenARM): its log-probs reward every token at once, so no candidate is ever tried.

score(v) = log pi(v | x, y_<t) + w log pi_r(v | x, y_<t). Over the policy's top k the best one is taken, as in ARGS; over the
whole vocabulary (num_candidates=None) with do_sample this is GenARM's own rule, which samples from softmax(score).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.decode.answer import Output
from pyargs.decode.request import BatchRequest, as_float, check
from pyargs.errors import PyargsError
from pyargs.lm.forward import forward_step
from pyargs.models.token_reward import TokenReward
from pyargs.ops import tokenwise_select
from pyargs.ops.choice import choose
from pyargs.types import Decoded
from pyargs.user_ids import user_ids


@torch.no_grad()
def generate(
    policy,
    token_reward: TokenReward,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    users: Sequence[str] = (),
    *,
    reward_weight: float | Sequence[float] | Tensor = 1.0,
    num_candidates: int | None = 10,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | Sequence[int] | None = None,
    tokenizer=None,
    token_callback: Callable[[Tensor], None] | None = None,
) -> Decoded:
    """Arguments and result as for `args.generate`; the rewards are the same for all users, who need not be named.

    num_candidates: k of the policy, or None for the whole vocabulary. A stop token has its own reward: a TokenReward learns
    to stop. Raises PyargsError on wrong input, and within 8 steps when logits are NaN.
    """
    request = check(
        policy, token_reward, input_ids, attention_mask, user_ids(users) or [""] * len(input_ids), reward_weight=reward_weight,
        num_candidates=num_candidates, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        do_sample=do_sample, temperature=temperature, seed=seed, eos_reward="state", tokenizer=tokenizer,
        token_callback=token_callback,
    )  # fmt: skip
    if token_reward.lm.get_output_embeddings().weight.shape[0] < request.vocabulary:
        raise PyargsError("the token reward's output layer has fewer rows than the tokenizer has tokens")
    device = token_reward.device
    output = Output(len(input_ids), request.max_new_tokens, device)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
    if not len(input_ids):
        return output.decoded(request, finished)

    mask = request.attention_mask
    padded = not bool(mask.all())
    ids, caches = request.input_ids, [None, None]
    for step in range(request.max_new_tokens):
        logits = []
        for i, lm in enumerate((policy, token_reward.lm)):
            out, caches[i] = forward_step(lm, ids.to(lm.device), mask.to(lm.device), caches[i], padded, logits_to_keep=1)
            logits.append(as_float(out.logits[:, -1])[:, : request.vocabulary].to(device))
        if request.num_candidates is None:
            token, rank, reward, finished = _among_all(*logits, request, step, finished)
            output.add(token, rank.clamp(max=0), reward, finished)
            output.slots[:, step] = rank
        else:
            token, slot, reward, finished = tokenwise_select(
                *logits,
                request.weight,
                finished,
                request.num_candidates,
                stop=request.stop,
                pad_id=request.pad_id,
                temperature=request.temperature,
                uniform=None if request.uniform is None else request.uniform[step],
            )
            output.add(token, slot, reward, finished)
        if output.stop(request, step, finished):
            break
        ids, mask = token.unsqueeze(1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return output.decoded(request, finished)


def _among_all(policy: Tensor, reward: Tensor, request: BatchRequest, step: int, finished: Tensor):
    """The same over all tokens: the choice, its rank under the policy (-1: not a number), its reward [B, 1], and finished."""
    logprobs, rewards = policy.float().log_softmax(1), reward.float().log_softmax(1)
    ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand_as(logprobs)
    token, slot, rewards, after = choose(
        logprobs,
        rewards,
        request.weight,
        ids,
        finished,
        stop=request.stop,
        pad_id=request.pad_id,
        temperature=request.temperature,
        uniform=None if request.uniform is None else request.uniform[step],
    )
    place = slot.clamp(min=0).unsqueeze(1)  # the candidates stand in order of their ids
    rank = (logprobs > logprobs.gather(1, place)).sum(1).masked_fill(finished, 0).masked_fill(slot < 0, -1)
    return token, rank, rewards.gather(1, place), after
