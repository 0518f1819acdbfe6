"""How policy and reward model see a batch: each in a pass of its own, or both in one where they rest on the same weights.

Both ways have `begin` (the prompts), `branch` (the reward model reads all candidates of a step) and `follow` (the policy goes
on behind the chosen one). What they give for rows that have finished [B] does not matter. They read nothing back from the
device, so that a step of theirs can be captured.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from pyargs.decode.request import Request
from pyargs.lm import lora
from pyargs.lm.cache import PrefixCache, additive, cache_name, parameters, positions
from pyargs.lm.forward import plain_output_layer
from pyargs.lm.structure import may_replace
from pyargs.models.reward_model import RewardModel


class TwoPasses:
    """A pass of the policy over the chosen token [B, 1], and one of the reward model over the candidates [B, k]."""

    def __init__(self, policy, reward_model: RewardModel, caches: tuple[PrefixCache, ...]):
        self.policy, self.backbone = policy, reward_model.backbone
        self.policy_cache, self.reward_cache = caches

    @staticmethod
    def caches(policy, reward_model: RewardModel, rows: int, capacity: int) -> tuple[PrefixCache, ...]:
        return tuple(
            PrefixCache(model.config.get_text_config(decoder=True), rows, capacity, device)
            for model, device in ((policy, policy.device), (reward_model.backbone, reward_model.device))
        )

    def begin(self, request: Request) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the first token, and the reward model's state [B, D] of the prompts."""
        logits = _prompt(self.policy, request, self.policy_cache, logits_to_keep=1).logits[:, -1]
        return logits, _prompt(self.backbone, request, self.reward_cache).last_hidden_state[:, -1]

    def branch(self, candidates: Tensor, finished: Tensor) -> Tensor:
        """The reward model's states [B, k, D] of candidates [B, k]."""
        return _branches(self.backbone, candidates, self.reward_cache).last_hidden_state

    def follow(self, token: Tensor, slot: Tensor, finished: Tensor) -> Tensor:
        """Logits [B, V] behind the chosen token [B], which stood at slot [B] of the candidates."""
        self.reward_cache.commit(slot)
        logits = _branches(self.policy, token.unsqueeze(1).to(self.policy.device), self.policy_cache, logits_to_keep=1).logits
        self.policy_cache.advance(1)
        return logits[:, -1]


class OnePass:
    """One pass of the shared weights over the candidates gives rewards and, of the one that wins, the policy's next state.

    With LoRA the batch stands there twice, first as the policy sees it and then, LoRA added, as the reward model does. The
    output layer is applied to the winners only.
    """

    def __init__(self, policy, reward_model: RewardModel, caches: tuple[PrefixCache, ...]):
        self.output, self.backbone = policy.get_output_embeddings(), reward_model.backbone
        (self.cache,) = caches
        self.times = 2 if lora.active(self.backbone) else 1

    @staticmethod
    def caches(policy, reward_model: RewardModel, rows: int, capacity: int) -> tuple[PrefixCache, ...]:
        rows *= 2 if lora.active(reward_model.backbone) else 1
        config = reward_model.backbone.config.get_text_config(decoder=True)
        return (PrefixCache(config, rows, capacity, reward_model.device),)

    def begin(self, request: Request) -> tuple[Tensor, Tensor]:
        with self._lora(request.input_ids):
            state = _prompt(self.backbone, request, self.cache, self.times).last_hidden_state[:, -1]
        rows = len(request.input_ids)
        return self.output(state[:rows]), state[-rows:]

    def branch(self, candidates: Tensor, finished: Tensor) -> Tensor:
        with self._lora(candidates):
            states = _branches(self.backbone, candidates.repeat(self.times, 1), self.cache).last_hidden_state
        self.states = states[: len(candidates)]
        return states[-len(candidates) :]

    def follow(self, token: Tensor, slot: Tensor, finished: Tensor) -> Tensor:
        self.cache.commit(slot.repeat(self.times))
        place = slot.clamp(min=0)[:, None, None].expand(-1, 1, self.states.shape[-1])
        return self.output(self.states.gather(1, place).squeeze(1))

    def _lora(self, rows: Tensor):
        return lora.on_last(self.backbone, len(rows)) if self.times == 2 else nullcontext()


MOST_ROWS = {"cuda": 256, "cpu": 32}
"""Rows of a pass up to which reading the weights takes longer than computing: then the policy's k rows beside the reward
model's k cost less than a second pass. Of a GPU the arithmetic says so, of a CPU docs/findings."""


def of(policy, reward_model: RewardModel, rows: int, k: int) -> type[TwoPasses] | type[OnePass]:
    """The faster way for this pair: OnePass needs the same base weights, and gains where its rows come for free."""
    backbone = reward_model.backbone
    free = not lora.active(backbone) or (lora.plain(backbone) and 2 * rows * k <= MOST_ROWS.get(backbone.device.type, 0))
    if not (free and may_replace(policy, backbone)):
        return TwoPasses
    return OnePass if lora.same_weights(policy.get_decoder(), backbone) and plain_output_layer(policy) else TwoPasses


def _prompt(model, request: Request, cache: PrefixCache, times: int = 1, **more):
    mask = request.attention_mask.repeat(times, 1).to(model.device)
    cache.begin(mask)
    output = model(
        input_ids=request.input_ids.repeat(times, 1).to(model.device),
        attention_mask=_mask(cache.causal(), model),
        position_ids=positions(mask),
        use_cache=True,
        **{cache_name(model): cache},
        **_known(model, more),
    )
    cache.advance(mask.shape[1])
    return output


def _branches(model, ids: Tensor, cache: PrefixCache, **more):
    return model(
        input_ids=ids,
        attention_mask=_mask(cache.branches(ids.shape[1]), model),
        position_ids=cache.position.expand(ids.shape),
        use_cache=True,
        **{cache_name(model): cache},
        **_known(model, more),
    )


def _known(model, more: dict) -> dict:
    """Without `logits_to_keep` for the models that do not take it and give the logits of all positions."""
    return {name: value for name, value in more.items() if name in parameters(type(model))}


def _mask(mask: Tensor | None, model) -> Tensor | None:
    return None if mask is None else additive(mask, model)
