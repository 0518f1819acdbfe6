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
from pyargs.decode.answer import Output
from pyargs.decode.backends import cpu, eager
from pyargs.decode.loop import begin, choose
from pyargs.decode.request import BatchRequest, check
from pyargs.errors import PyargsError
from pyargs.lm.cache import can_branch
from pyargs.lm.structure import may_replace, unwrapped
from pyargs.models.reward_model import RewardModel
from pyargs.types import Decoded


@torch.no_grad()
def generate(
    policy,
    reward_model: RewardModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    users: Sequence[str],
    *,
    reward_weight: float | Sequence[float] | Tensor = 1.0,
    num_candidates: int = 10,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 0.7,
    seed: int | Sequence[int] | None = None,
    eos_reward: str = "before",
    tokenizer=None,
    token_callback: Callable[[Tensor], None] | None = None,
) -> Decoded:
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
    steps when logits or rewards are not numbers or w r is beyond float32. Nothing in a step waits for the device.
    """
    if not isinstance(reward_model, RewardModel):
        raise PyargsError(
            f"a {type(reward_model).__name__} has no head to score candidates with: decode a TokenReward through "
            "pyargs.decode.genarm, a UserPolicy through pyargs.decode.unguided"
        )
    policy = unwrapped(policy)
    if num_candidates is None:
        raise PyargsError("num_candidates=None, the whole vocabulary, is for a TokenReward: name how many a head is to score")
    request = check(
        policy, reward_model, input_ids, attention_mask, users, reward_weight=reward_weight, num_candidates=num_candidates,
        max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=pad_token_id, do_sample=do_sample,
        temperature=temperature, seed=seed, eos_reward=eos_reward, tokenizer=tokenizer, token_callback=token_callback,
    )  # fmt: skip
    if not len(input_ids):
        return Output(0, 0, "cpu").decoded(request, torch.zeros(0, dtype=torch.bool))
    if not may_replace(policy, reward_model.backbone, reward_model.head):  # hooks and the like: the models themselves decode
        return reference.decode(policy, reward_model, request)
    if not (can_branch(policy) and can_branch(reward_model.backbone)):
        warnings.warn(
            "policy or reward model has layers in which candidates can not share a prefix (sliding window, linear attention, "
            "state space, or attention without masks): decoding with k copies of the reward model's cache, which is slower",
            stacklevel=2,
        )
        return reference.decode(policy, reward_model, request)
    return decode(policy, reward_model, request)


@torch.no_grad()
def decode(policy, reward_model: RewardModel, request: BatchRequest) -> Decoded:
    """The loop over shared prefixes; `generate` says what it does."""
    rows, length = request.input_ids.shape
    k, device = request.num_candidates, reward_model.device
    capacity, folded = length + request.max_new_tokens + k, reward_model.head.fold(request.user)
    if cpu.possible(policy, reward_model):
        both = cpu.of(policy, reward_model, rows, capacity)
    else:
        way = eager.of(policy, reward_model, rows, k)
        both = way(policy, reward_model, way.caches(policy, reward_model, rows, capacity))
    output = Output(rows, request.max_new_tokens, device)
    state = begin(both, folded, request, torch.zeros(rows, dtype=torch.bool, device=device))
    for step in range(request.max_new_tokens):
        state, token, slot = choose(both, folded, request, output, state)
        if output.stop(request, step, state.finished) or step + 1 == request.max_new_tokens:
            break
        state = state._replace(logits=both.follow(token, slot, state.finished))
    return output.decoded(request, state.finished)
