"""Decoding of a language model by itself, or of a UserPolicy, with no other rule than asked for.

Greedy on a CPU it goes through the native stack where that computes the model, else through `generate` of transformers. Where
ARGS goes through the stack, too, its weight 0 gives the same tokens in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.decode import native
from pyargs.decode.request import check_length, check_numbers, check_room, stop_and_pad
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
    Raises UnknownUser for a user without a soft prompt, PyargsError for an empty prompt, where the model's positions do not
    suffice, and for logits that are not numbers.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    lm = policy.lm if isinstance(policy, UserPolicy) else policy
    soft, tokenizer = getattr(policy, "soft", None), getattr(policy, "tokenizer", None)
    if not len(prompts):
        return _decoded(torch.zeros(0, 0, dtype=torch.long), [], 0)
    if not all(len(prompt) for prompt in prompts):
        raise PyargsError("a prompt without a token has nothing to answer: give each at least one")
    check_length(max_new_tokens)
    check_room(lm, max(map(len, prompts)) + (0 if soft is None else soft.centres.shape[1]), max_new_tokens)
    rows = lm.config.get_text_config(decoder=True).vocab_size  # of the logits; the last may be no token
    vocabulary = rows if tokenizer is None else min(len(tokenizer), rows)
    stop, pad = stop_and_pad(lm)
    if soft is None and not do_sample and native.possible(lm):
        prompts = [list(prompt) for prompt in prompts]
        tokens = native.greedy(lm, prompts, max_new_tokens=max_new_tokens, vocabulary=vocabulary, stop=stop, pad=pad)
        return _decoded(tokens, stop, pad)
    ids, mask = (x.to(lm.device) for x in left_pad(prompts, 0))
    inputs = {"input_ids": ids}
    if soft is not None:
        user = policy.users.rows(users).to(lm.device)
        table = lm.get_input_embeddings()
        words = [table(torch.tensor(prompt, device=lm.device)) for prompt in prompts]
        parts = [torch.cat([before.to(word), word]) for before, word in zip(soft(user), words, strict=True)]
        longest = max(map(len, parts))
        inputs = {"inputs_embeds": torch.stack([torch.cat([p.new_zeros(longest - len(p), p.shape[1]), p]) for p in parts])}
        mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in parts]).long().to(lm.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=do_sample, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        eos_token_id=stop or None, pad_token_id=pad, suppress_tokens=[*range(vocabulary, rows)] or None, **sampling,
    )  # fmt: skip
    bad: list[Tensor] = []  # looked at once, at the end: nothing waits for the device

    def note(_, scores: Tensor) -> Tensor:
        bad.append(scores.isnan().any(1))
        return scores

    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        found = lm.generate(
            **inputs, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([note])
        )
    check_numbers(torch.stack(bad).any(0))
    return _decoded(found[:, ids.shape[1] :] if "input_ids" in inputs else found, stop, pad)


def _decoded(tokens: Tensor, stop: list[int], pad: int) -> Decoded:
    tokens = tokens.cpu()
    is_stop = torch.isin(tokens, torch.tensor(stop, dtype=torch.long))
    length = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1]) if tokens.shape[1] else tokens.new_zeros(0)
    nothing = torch.zeros(tokens.shape)
    return Decoded(tokens, nothing, torch.zeros_like(tokens), nothing.clone(), length)
