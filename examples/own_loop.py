"""The ops in a decoding loop of your own: nothing of pyargs.decode is used, only `topk_logprobs` and `score_select`.

    python examples/own_loop.py [--model smollm2-135m] [--reward-model FOLDER --users ID ID] [--max-new-tokens 40]

Two prompts are answered in one batch, each for another user. The loop keeps one copy of the reward model's cache for every
candidate, as loops over DynamicCache do; `pyargs.Engine` chooses the same tokens with one shared prefix.
"""

from __future__ import annotations

import quick
import torch
from transformers import DynamicCache

import pyargs
from pyargs.lm.cache import cache_name
from pyargs.ops import score_select, topk_logprobs


@torch.no_grad()
def decode(policy, model, input_ids, attention_mask, users, weight: float, stop: list[int], pad: int, steps: int, k: int = 10):
    """Tokens int64 [B, steps or less], those that pyargs.Engine chooses; the head must be a linear one."""
    batch, device = len(input_ids), input_ids.device
    user = model.users.rows(users).to(device)
    directions = model.head.fold(user).weight  # [batch, D]: what score_select reads of a linear head, one row for each user
    row = torch.arange(batch, device=device)
    weights, stop = torch.full((batch,), weight, device=device), torch.tensor(stop, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    copies = row.repeat_interleave(k)  # the row of each candidate

    mask, place = attention_mask, (attention_mask.cumsum(1) - 1).clamp(min=0)
    policy_cache, reward_cache = DynamicCache(config=policy.config), DynamicCache(config=policy.config)
    # One name for all models since transformers 5.24, another before.
    policy_cached, reward_cached = {cache_name(policy): policy_cache}, {cache_name(model.backbone): reward_cache}
    logits = policy(input_ids, attention_mask=mask, position_ids=place, **policy_cached).logits[:, -1]
    hidden = model.backbone(input_ids, attention_mask=mask, position_ids=place, **reward_cached).last_hidden_state
    before = model.head(hidden[:, -1], user)  # the reward of the text so far: what a stop token earns
    reward_cache.reorder_cache(copies)

    tokens = []
    for _ in range(steps):
        # Many models have more rows of logits than tokens; the rest of the vocabulary is padding.
        logprobs, candidates, _ = topk_logprobs(logits[:, : len(model.tokenizer)], k)
        mask, place = torch.cat([mask, mask.new_ones(batch, 1)], dim=1), place[:, -1:] + 1
        hidden = model.backbone(
            candidates.reshape(-1, 1), attention_mask=mask[copies], position_ids=place[copies], **reward_cached
        ).last_hidden_state
        token, slot, reward, finished = score_select(
            hidden.view(batch, k, -1),
            directions,
            row,
            weights,
            logprobs,
            candidates,
            finished,
            stop=stop,
            stop_reward=before,
            pad_id=pad,
        )
        tokens.append(token)
        if finished.all():
            break
        before = reward.gather(1, slot.unsqueeze(1)).squeeze(1)
        reward_cache.reorder_cache((torch.arange(batch, device=device) * k + slot)[copies])  # all copies follow the winner
        logits = policy(token.unsqueeze(1), attention_mask=mask, position_ids=place, **policy_cached).logits[:, -1]
    return torch.stack(tokens, dim=1)


def main(words: list[str] | None = None) -> torch.Tensor:
    options = quick.arguments(__doc__, words)
    policy, tokenizer = pyargs.load_lm(options.model)
    model = quick.reward_model(options.reward_model, options.model)
    inputs = quick.prompts(tokenizer)
    weight = options.reward_weight or quick.unit_weight(policy, model, inputs, options.users)
    stop = policy.generation_config.eos_token_id
    stop = [stop] if isinstance(stop, int) else list(stop or [])
    tokens = decode(
        policy,
        model,
        **inputs,
        users=options.users,
        weight=weight,
        stop=stop,
        pad=tokenizer.pad_token_id,
        steps=options.max_new_tokens,
    )
    quick.show(tokenizer, options.users, tokens)
    return tokens


if __name__ == "__main__":
    main()
