"""ARGS: at each step the policy proposes k tokens, a reward model scores each for the row's user, and the best sum wins.

score(v) = log pi(v | x, y_<t) + w r_u(v | x, y_<t), argmax (or a sample) over the policy's top k (eq. 1 of the paper).

The reward model sees the k candidates as k branches behind one shared prefix: they stand side by side as queries, each
masked to the prefix and itself, all at the same position. The winner's keys and values are then moved into the prefix. So
the prefix is stored once, not k times, and the winner is never computed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.decode import reference
from pyargs.decode.request import Output, Request, as_float, check
from pyargs.errors import PyargsError
from pyargs.lm.cache import PrefixCache, can_branch
from pyargs.lm.hf import additive
from pyargs.models.reward_model import RewardModel
from pyargs.ops import score_select, topk_logprobs
from pyargs.types import Decoded


@torch.no_grad()
def generate(
    policy, reward_model: RewardModel, input_ids: Tensor, attention_mask: Tensor | None, users: Sequence[str], *,
    reward_weight: float | Sequence[float] | Tensor = 1.0, num_candidates: int = 10, max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None, do_sample: bool = False,
    temperature: float = 0.7, seed: int | Sequence[int] | None = None, eos_reward: str = "before", tokenizer=None,
    token_callback: Callable[[Tensor], None] | None = None,
) -> Decoded:  # fmt: skip
    """Reward-guided decoding for a batch of different users.

    policy: a decoder-only model of transformers; reward_model: of the same tokenizer; both may be on different devices.
    input_ids, attention_mask: int64 [B, T], padded on the left; users: B ids.
    reward_weight: w of eq. 1 in raw units, one or one per row; 0 is exactly the policy's greedy choice.
    num_candidates: k (default 10, the example value of ARGS; the paper is silent). max_new_tokens: 64 suits titles.
    eos_token_id, pad_token_id: those of the policy's generation config by default.
    do_sample: sample over the k from softmax(score / temperature) instead of the argmax (0.7 as in ARGS).
    seed: of the sampling, one or one per row; without it torch's own generator goes on, as in `generate` of transformers.
    eos_reward: what a stop token earns; "before": the reward of the text so far, since a head is never trained on the state
    after a stop token; "state": the reward of that state.
    tokenizer: the policy's, compared with the reward model's (models of `pyargs.load_lm` bring it with them).
    token_callback: called after each step with the tokens [B] (pad_token_id where a row has finished), for streaming.

    Returns a Decoded on the CPU. Raises PyargsError on wrong input (UnknownUser for a user without parameters), and within 8
    steps when logits or rewards are NaN. Nothing in a step waits for the device.
    """
    if not isinstance(reward_model, RewardModel):
        raise PyargsError(
            f"a {type(reward_model).__name__} has no head to score candidates with: decode a TokenReward through "
            "pyargs.decode.tokenwise, a UserPolicy through pyargs.decode.plain"
        )
    request = check(
        policy, reward_model, input_ids, attention_mask, users, reward_weight=reward_weight, num_candidates=num_candidates,
        max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=pad_token_id, do_sample=do_sample,
        temperature=temperature, seed=seed, eos_reward=eos_reward, tokenizer=tokenizer, token_callback=token_callback,
    )  # fmt: skip
    if not len(input_ids):
        return Output(request).decoded(torch.zeros(0, dtype=torch.bool))
    if not (can_branch(policy) and can_branch(reward_model.backbone)):
        warnings.warn(
            "policy or reward model has layers in which candidates can not share a prefix (sliding window, linear attention, "
            "state space, or attention without masks): decoding with k copies of the reward model's cache, which is slower",
            stacklevel=2,
        )
        return reference.decode(policy, reward_model, request)
    return decode(policy, reward_model, request)


@torch.no_grad()
def decode(policy, reward_model: RewardModel, request: Request) -> Decoded:
    """The loop over shared prefixes; `generate` says what it does."""
    rows, length = request.input_ids.shape
    k, device = request.num_candidates, reward_model.device
    backbone, folded = reward_model.backbone, reward_model.head.fold()

    policy_cache = PrefixCache(policy.config.get_text_config(decoder=True), length + request.max_new_tokens)
    reward_cache = PrefixCache(backbone.config.get_text_config(decoder=True), length + request.max_new_tokens + k)
    valid = torch.cat([request.attention_mask.bool(), request.attention_mask.new_ones(rows, request.max_new_tokens).bool()], 1)
    position = request.attention_mask.sum(1, keepdim=True)  # of the next token
    prompt_position = (request.attention_mask.cumsum(1) - 1).clamp(min=0)
    padded = not bool(request.attention_mask.all())

    def prompt_mask(model) -> Tensor | None:
        if not padded:
            return None
        seen = valid[:, None, None, :length] & torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
        # A padding position sees itself, since a softmax over nothing is not a number.
        seen = seen | torch.eye(length, dtype=torch.bool, device=valid.device)
        return additive(seen, model).to(model.device)

    # use_cache makes the models hand the cache on; logits_to_keep leaves the output layer out for all but the last place.
    logits = policy(
        input_ids=request.input_ids, attention_mask=prompt_mask(policy), position_ids=prompt_position,
        past_key_values=policy_cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    policy_cache.advance(length)
    state = backbone(
        input_ids=request.input_ids.to(device), attention_mask=prompt_mask(backbone),
        position_ids=prompt_position.to(device), past_key_values=reward_cache, use_cache=True,
    ).last_hidden_state[:, -1]  # fmt: skip
    reward_cache.advance(length)

    output = Output(request)
    so_far = reward_model.head(state, request.user)  # reward of the text so far: what a stop token earns
    total = torch.zeros_like(so_far)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    reward_valid, reward_position = valid.to(device), position.to(device)
    itself = torch.eye(k, dtype=torch.bool, device=device).expand(rows, 1, k, k)

    for step in range(request.max_new_tokens):
        logprobs, candidates, _ = topk_logprobs(as_float(logits)[:, : request.vocabulary], k)
        logprobs, candidates = logprobs.to(device), candidates.to(device)

        prefix = reward_valid[:, None, None, : length + step].expand(rows, 1, k, length + step)
        hidden = backbone(
            input_ids=candidates, attention_mask=additive(torch.cat([prefix, itself], dim=-1), backbone),
            position_ids=(reward_position + step).expand(rows, k), past_key_values=reward_cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        token, slot, reward, finished = score_select(
            folded.features(as_float(hidden), request.user), folded.weight, request.user, request.step_weight(step),
            logprobs, candidates, finished, bias=folded.bias, activation=folded.activation,
            stop=request.stop, stop_reward=so_far if request.eos_reward == "before" else None, pad_id=request.pad_id,
            temperature=request.temperature, uniform=None if request.uniform is None else request.uniform[step],
        )  # fmt: skip
        chosen = output.add(step, token, slot, reward, finished)
        total = total + chosen
        so_far = total / (step + 1) if request.prefix_mean else chosen
        if output.stop(step, finished):
            break

        reward_cache.commit(slot.clamp(min=0))
        logits = policy(
            input_ids=token.unsqueeze(1).to(policy.device),
            attention_mask=additive(valid[:, None, None, : length + step + 1], policy) if padded else None,
            position_ids=position + step, past_key_values=policy_cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        policy_cache.advance(1)
    return output.decoded(finished)
