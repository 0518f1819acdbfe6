"""Decoding of a language model by itself, or of a UserPolicy, with no other rule than asked for.

Greedy on a CPU it goes through the native stack where that computes the model, else token by token through the model of
transformers. Where ARGS goes through the stack, too, its weight 0 gives the same tokens in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyargs.decode.backends import cpu
from pyargs.decode.request import check_length, check_numbers, check_room, check_sampling, ids_of, one_seed, stop_and_pad
from pyargs.errors import PyargsError
from pyargs.lm.forward import forward_step
from pyargs.lm.structure import unwrapped
from pyargs.lm.tokenize import left_pad
from pyargs.models.user_policy import UserPolicy
from pyargs.ops.choice import settle
from pyargs.types import Decoded


@torch.no_grad()
def generate(
    policy,
    prompts: Sequence[Sequence[int]],
    users: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | None = None,
) -> Decoded:
    """Answers to prompts given as ids, greedy or sampled from the whole vocabulary (temperature 1, top-p 1 by default).

    policy: a UserPolicy, whose `prompt_ids` made the prompts and which is told the users, or a model of transformers. Of the
    checkpoint's generation config `eos_token_id` says where an answer stops and `pad_token_id` what stands behind it. Nothing
    else in it is applied (penalties, suppressed tokens, beams, lengths and the like), whichever way the model is computed.
    seed: of the sampling of the whole batch. In the result rewards, slots and spreads are 0.
    Raises UnknownUser for a user without a soft prompt, PyargsError for an empty prompt, where the model's positions do not
    suffice, for logits that are not numbers, and for models that padding changes.
    """
    lm = unwrapped(policy.lm if isinstance(policy, UserPolicy) else policy)
    soft, tokenizer = getattr(policy, "soft", None), getattr(policy, "tokenizer", None)
    prompts = ids_of(prompts, len(lm.get_input_embeddings().weight))
    if not len(prompts):
        return _decoded(torch.zeros(0, 0, dtype=torch.long), [], 0)
    if not all(len(prompt) for prompt in prompts):
        raise PyargsError("a prompt without a token has nothing to answer: give each at least one")
    temperature, seed = check_sampling(do_sample, temperature), one_seed(seed)
    check_length(max_new_tokens)
    lengths = [len(prompt) + (0 if soft is None else soft.centres.shape[1]) for prompt in prompts]
    check_room(lm, min(lengths), max(lengths), max_new_tokens)
    rows = lm.config.get_text_config(decoder=True).vocab_size  # of the logits; the last may be no token
    vocabulary = rows if tokenizer is None else min(len(tokenizer), rows)
    stop, pad = stop_and_pad(lm)
    if soft is None and not do_sample and cpu.possible(lm):
        tokens = cpu.greedy(lm, prompts, max_new_tokens=max_new_tokens, vocabulary=vocabulary, stop=stop, pad=pad)
        return _decoded(tokens, stop, pad)
    inputs, mask = (x.to(lm.device) for x in left_pad(prompts, 0))
    if soft is not None:
        user = policy.users.rows(users).to(lm.device)
        table = lm.get_input_embeddings()
        words = [table(torch.tensor(prompt, device=lm.device)) for prompt in prompts]
        parts = [torch.cat([before.to(word), word]) for before, word in zip(soft(user), words, strict=True)]
        longest = max(map(len, parts))
        inputs = torch.stack([torch.cat([p.new_zeros(longest - len(p), p.shape[1]), p]) for p in parts])
        mask = torch.stack([torch.arange(longest, device="cpu") >= longest - len(p) for p in parts]).long().to(lm.device)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        tokens = _decode(
            lm,
            inputs,
            mask,
            max_new_tokens=max_new_tokens,
            vocabulary=vocabulary,
            pad=pad,
            stop=torch.tensor(stop, dtype=torch.long, device=lm.device),
            temperature=temperature,
        )
    return _decoded(tokens, stop, pad)


def _decode(
    lm,
    inputs: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    vocabulary: int,
    stop: Tensor,
    pad: int,
    temperature: float | None,
) -> Tensor:
    """Tokens int64 [B, N] behind prompts, the likeliest or sampled, of the first `vocabulary`; behind a stop token `pad`.

    inputs: ids [B, T] or embeddings [B, T, D], padded on the left as mask [B, T] says.
    """
    padded, cache, tokens = not bool(mask.all()), None, []
    beyond = torch.arange(vocabulary, lm.config.get_text_config(decoder=True).vocab_size, device=mask.device)
    bad, finished = mask.new_zeros(2, len(mask), dtype=torch.bool)
    for _ in range(max_new_tokens):
        output, cache = forward_step(lm, inputs, mask, cache, padded, logits_to_keep=1)
        logits = output.logits[:, -1].float().index_fill(1, beyond, -torch.inf)
        bad = bad | logits.isnan().any(1) & ~finished
        logits = logits.masked_fill(bad.unsqueeze(1), 0.0)
        if temperature is None:
            token = logits.argmax(1)
        else:
            colder = (logits - logits.amax(1, keepdim=True)).double() / temperature  # which float32 may not hold
            token = colder.float().softmax(1).multinomial(1).squeeze(1)
        token, finished = settle(token, finished, bad, stop, pad)
        tokens.append(token)
        if finished.all():  # the one look of a step at the device
            break
        inputs, mask = tokens[-1].unsqueeze(1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    check_numbers(bad)
    return torch.stack(tokens, 1)


def _decoded(tokens: Tensor, stop: list[int], pad: int) -> Decoded:
    tokens = tokens.cpu()
    is_stop = torch.isin(tokens, torch.tensor(stop, dtype=torch.long))
    length = torch.where(is_stop.any(1), is_stop.int().argmax(1), tokens.shape[1]) if tokens.shape[1] else tokens.new_zeros(0)
    nothing = torch.zeros(tokens.shape, dtype=torch.float32, device="cpu")
    return Decoded(tokens, nothing, torch.zeros_like(tokens), nothing.clone(), length)
