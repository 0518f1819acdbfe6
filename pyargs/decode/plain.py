"""Decoding of a language model by itself, or of a UserPolicy, with no other rule than asked for.

Greedy on a CPU it goes through the native stack where that computes the model (then weight 0 of ARGS gives the same tokens in
any dtype), else through `generate` of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.decode import native
from pyargs.decode.request import check_room, stop_and_pad
from pyargs.errors import PyargsError
from pyargs.lm.encode import left_pad
from pyargs.models.user_policy import UserPolicy
from pyargs.types import Decoded


@torch.no_grad()
def generate(
    policy, prompts: Sequence[Sequence[int]], users: Sequence[str] | None = None, *, max_new_tokens: int = 64,
    do_sample: bool = False, temperature: float = 1.0, seed: int | None = None,
) -> Decoded:  # fmt: skip
    """Answers to prompts given as ids, greedy or sampled from the whole vocabulary (temperature 1, top-p 1 by default).

    policy: a UserPolicy, whose `prompt_ids` made the prompts and which is told the users, or a model of transformers. The
    checkpoint's own generation settings (repetition penalties and the like) are not applied: only its stop tokens are.
    seed: of the sampling of the whole batch. In the result rewards, slots and spreads are 0.
    Raises UnknownUser for a user without a soft prompt, PyargsError for an empty prompt and where the model's positions
    do not suffice.
    """
    lm = policy.lm if isinstance(policy, UserPolicy) else policy
    if not len(prompts):
        return _decoded(torch.zeros(0, 0, dtype=torch.long), [], 0)
    if not all(len(prompt) for prompt in prompts):
        raise PyargsError("a prompt without a token has nothing to answer: give each at least one")
    soft = policy.soft if isinstance(policy, UserPolicy) else None
    before = 0 if soft is None else soft.centres.shape[1]
    check_room(lm, before + max(map(len, prompts)), max_new_tokens)
    tokenizer = policy.tokenizer if isinstance(policy, UserPolicy) else getattr(policy, "tokenizer", None)
    rows = lm.config.get_text_config(decoder=True).vocab_size  # of the logits; the last may be no token
    vocabulary = rows if tokenizer is None else min(len(tokenizer), rows)
    stop, pad = stop_and_pad(lm)
    if soft is None and not do_sample and native.possible(lm):
        tokens = native.greedy(lm, prompts, max_new_tokens=max_new_tokens, vocabulary=vocabulary, stop=stop, pad=pad)
        return _decoded(tokens, stop, pad)
    rules = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
    rules |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "suppress_tokens": [*range(vocabulary, rows)] or None}
    rules |= {"eos_token_id": stop or None, "pad_token_id": pad}
    return _decoded(_transformers(policy, lm, prompts, users, seed, rules), stop, pad)


def _transformers(policy, lm, prompts, users, seed: int | None, rules: dict) -> Tensor:
    """What `generate` of transformers adds to the prompts by these rules, int64 [B, N]."""
    from transformers import GenerationConfig

    ids, mask = (x.to(lm.device) for x in left_pad(prompts, 0))
    inputs = {"input_ids": ids}
    if isinstance(policy, UserPolicy) and policy.soft is not None:
        user = policy.users.rows(users).to(lm.device)
        table = lm.get_input_embeddings()
        words = [table(torch.tensor(prompt, device=lm.device)) for prompt in prompts]
        parts = [torch.cat([soft.to(word), word]) for soft, word in zip(policy.soft(user), words, strict=True)]
        longest = max(map(len, parts))
        inputs = {"inputs_embeds": torch.stack([torch.cat([p.new_zeros(longest - len(p), p.shape[1]), p]) for p in parts])}
        mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in parts]).long().to(lm.device)
    config = GenerationConfig(num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, **rules)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        found = lm.generate(**inputs, attention_mask=mask, generation_config=config)
    return found[:, ids.shape[1] :] if "input_ids" in inputs else found


def _decoded(tokens: Tensor, stop: list[int], pad: int) -> Decoded:
    tokens = tokens.cpu()
    is_stop = torch.isin(tokens, torch.tensor(stop, dtype=torch.long))
    length = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1]) if tokens.shape[1] else tokens.new_zeros(0)
    nothing = torch.zeros(tokens.shape)
    return Decoded(tokens, nothing, torch.zeros_like(tokens), nothing.clone(), length)
