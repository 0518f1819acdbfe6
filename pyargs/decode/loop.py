"""One step of ARGS for a batch: the policy's k candidates, their rewards, the choice. Nothing in it waits for the device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyargs.decode.answer import Output
from pyargs.decode.request import BatchRequest, as_float
from pyargs.heads import Folded
from pyargs.ops import score_select, topk_logprobs


class Passes(Protocol):
    """What a backend does for a step: the passes of policy and reward model behind the rows' prefixes."""

    def begin(self, request: BatchRequest) -> tuple[Tensor, Tensor]:
        """Reads the prompts: the policy's logits [B, V] and the reward model's states [B, D] of their last tokens."""

    def branch(self, candidates: Tensor, finished: Tensor) -> Tensor:
        """The reward model's states [B, k, D] of candidates [B, k], each behind its row's prefix; any for finished rows."""

    def follow(self, token: Tensor, slot: Tensor, finished: Tensor) -> Tensor:
        """Token [B], the candidate of that slot [B], becomes each row's next one: the logits [B, V] behind it."""


class State(NamedTuple):
    """What a step takes over from the one before.

    logits [B, V] of the next token under the policy; so_far [B], the reward of the text so far (what a stop token earns);
    total [B], the sum of the chosen tokens' rewards; finished bool [B].
    """

    logits: Tensor
    so_far: Tensor
    total: Tensor
    finished: Tensor


def begin(passes: Passes, folded: Folded, request: BatchRequest, finished: Tensor) -> State:
    """Reads the prompts. finished [B]: rows that are none of the caller's."""
    logits, state = passes.begin(request)
    so_far = _rewards(folded, state.unsqueeze(1)).squeeze(1)
    return State(logits, so_far, torch.zeros_like(so_far), finished)


def choose(
    passes: Passes, folded: Folded, request: BatchRequest, output: Output, state: State
) -> tuple[State, Tensor, Tensor]:
    """The step's choice, noted in `output`: the state after it (its logits still the old ones), tokens [B] and slots [B]."""
    device = request.user.device
    logprobs, candidates, _ = topk_logprobs(as_float(state.logits)[:, : request.vocabulary], request.num_candidates)
    logprobs, candidates = logprobs.to(device), candidates.to(device)
    hidden = passes.branch(candidates, state.finished)
    token, slot, reward, finished = score_select(
        folded.features(as_float(hidden), folded.own),
        folded.weight,
        torch.arange(len(candidates), device=device),
        request.step_weight(output.steps),
        logprobs,
        candidates,
        state.finished,
        bias=folded.bias,
        activation=folded.activation,
        stop=request.stop,
        stop_reward=state.so_far if request.eos_reward == "before" else None,
        pad_id=request.pad_id,
        temperature=request.temperature,
        uniform=None if request.uniform is None else request.uniform.index_select(0, output.steps)[0],
    )
    chosen = output.add(token, slot, reward, finished)
    total = state.total + chosen
    so_far = total / output.steps if request.prefix_mean else chosen  # the step is counted by now
    return State(state.logits, so_far, total, finished), token, slot


def _rewards(folded: Folded, states: Tensor) -> Tensor:
    """Rewards [B, k] of states [B, k, D], as `choose` computes them."""
    rows, k, _ = states.shape
    user = torch.arange(rows, device=folded.weight.device)
    ids = torch.zeros(rows, k, dtype=torch.long, device=user.device)
    nothing = torch.zeros(rows, k, dtype=torch.float32, device=user.device)
    return score_select(
        folded.features(as_float(states), folded.own),
        folded.weight,
        user,
        nothing[:, 0],
        nothing,
        ids,
        torch.zeros(rows, dtype=torch.bool, device=user.device),
        bias=folded.bias,
        activation=folded.activation,
    )[2]
