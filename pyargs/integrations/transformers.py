"""`lm.generate(**inputs, custom_generate=pyargs.guide(model, users=[...]))`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.decode.engine import Engine
from pyargs.decode.request import integer, numbered, sampling_temperature, seeds, stop_and_pad, weights
from pyargs.errors import PyargsError
from pyargs.user_ids import user_ids

TAKEN = {
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "min_p",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
    "return_dict_in_generate",
}
"""Fields of a generation config that this loop follows."""

WITHOUT_EFFECT = {
    # Speed and memory of transformers' own loops, and where a config comes from.
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size", "low_memory",
    "continuous_batching_config", "transformers_version",
    # Of beams, encoders and assistants, which are refused, absent or hidden from this loop.
    "early_stopping", "length_penalty", "bos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "renormalize_logits",  # the same choice
}  # fmt: skip
"""Fields that change no answer of this loop."""

NEUTRAL = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0,
    "min_length": 0, "min_new_tokens": 0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "top_k": 0,
    "cache_implementation": "dynamic",
}  # fmt: skip
"""Values of the other fields, besides None and False, that change nothing. Any other value is refused."""

SAMPLING = {"top_k", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""Fields that count only with `do_sample`, as top_p and min_p do."""


def guide(
    model,
    users: Sequence[str],
    *,
    strength: float | Sequence[float] | None = None,
    reward_weight: float | Sequence[float] | Tensor | None = None,
    num_candidates: int | str = 10,
    eos_reward: str | None = None,
    seed: int | Sequence[int] | None = None,
    tokenizer=None,
    backend: str = "auto",
    token_callback: Callable[[Tensor], None] | None = None,
    streamer=None,
):
    """A decoding loop for the `custom_generate` argument of `generate`; the language model is the policy.

    model: a RewardModel or TokenReward. users: one id for each prompt of the batch. strength, reward_weight, seed: one for all
    prompts, or one each. num_candidates, eos_reward, tokenizer, backend: as for `pyargs.Engine`. token_callback: called after
    each step with the tokens int64 [B], padding where a row has ended. streamer: a streamer of transformers, for one prompt,
    fed as by `generate`; it is ended also when decoding fails.
    Returns ids [B, T + N], or with return_dict_in_generate a GenerateDecoderOnlyOutput.

    Length, stop tokens, padding, do_sample, temperature, top_p and min_p come from the generation config as usual; the two
    filters act on the policy's candidates, before rewards and temperature. Each call makes an engine, so the backend is chosen
    anew, and logged.

    Raises PyargsError for all else that would change the answer, in the call or in the checkpoint's own generation config:
    penalties, forced and suppressed tokens, beams, other filters, logits processors, stopping criteria, scores to return.
    `top_k` may be num_candidates or more. `streamer=`, `assistant_model=` and `synced_gpus=` of `generate` do nothing here,
    since transformers does not hand them to a custom loop.
    """
    users = user_ids(users)

    def custom_generate(lm, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_inputs):
        from transformers.generation import GenerateDecoderOnlyOutput

        try:
            config = generation_config
            check_config(config, lm.generation_config, num_candidates)
            check_processors(logits_processor or [], config)
            check_criteria(stopping_criteria or [], config)
            check_inputs(input_ids, model_inputs)
            prompts = rows_of(input_ids, model_inputs.get("attention_mask"))
            stop, pad = stop_and_pad(lm, [] if config.eos_token_id is None else config.eos_token_id, config.pad_token_id)
            feed = token_callback if streamer is None else _feeding(streamer, input_ids, stop, token_callback)
            engine = Engine(
                lm, model, backend=backend, max_rows=max(1, len(prompts)), eos_reward=eos_reward, tokenizer=tokenizer
            )
            wishes = _wishes(config, users, strength, reward_weight, seed)
            if len(wishes) != len(prompts):
                raise PyargsError(f"{len(prompts)} prompts but {len(wishes)} users: name one user for each row")
            more = {
                "num_candidates": num_candidates,
                "max_new_tokens": config.max_length - input_ids.shape[1],
                "stop": stop,
                **_sampling(config),
            }
            numbers = [engine.submit(prompt, **wish, **more) for prompt, wish in zip(prompts, wishes, strict=True)]
            tokens = _tokens(engine, numbers, pad, input_ids.device, feed)
        finally:
            if streamer is not None:
                streamer.end()  # or whoever reads it would wait for ever
        sequences = torch.cat([input_ids, tokens], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    return custom_generate


def _wishes(config, users: list[str], strength, reward_weight, seed) -> list[dict]:
    """Arguments of `Engine.submit` for each row: user, weight and seed, with num_return_sequences rows for each user."""
    copies = config.num_return_sequences or 1
    names = [user for user in users for _ in range(copies)]
    found = [{"user": user} for user in names]
    for name, asked in (("strength", strength), ("reward_weight", reward_weight)):
        if asked is not None:
            for row, one in enumerate(weights(asked, len(users), name).expand(len(users)).repeat_interleave(copies).tolist()):
                found[row][name] = one
    given = seeds(seed, len(names))
    for row, wish in enumerate(found):
        wish["seed"] = given[row] if isinstance(given, list) else None if given is None else numbered(given, row)
    return found


def _sampling(config) -> dict[str, float]:
    """The sampling of a generation config, as arguments of `Engine.submit`."""
    if not config.do_sample:
        return {}
    asked = {"temperature": config.temperature, "top_p": config.top_p, "min_p": config.min_p}
    asked = {"temperature": 1.0} | {name: value for name, value in asked.items() if value is not None}
    return asked | {"temperature": sampling_temperature(asked["temperature"])}


def _tokens(engine: Engine, numbers: list[int], pad: int, device, feed: Callable[[Tensor], None] | None) -> Tensor:
    """Tokens int64 [B, N] of the requests, stop tokens included and `pad` behind them; each step is fed once it is known."""
    row_of, written = {number: row for row, number in enumerate(numbers)}, [[] for _ in numbers]
    going, steps = set(range(len(numbers))), []
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            row = row_of[event.number]
            written[row].append(event.token)
            if event.answer is not None:
                going.remove(row)
        known = min((len(written[row]) for row in going), default=max(map(len, written)))
        for step in range(len(steps), known):
            tokens = [own[step] if step < len(own) else pad for own in written]
            steps.append(torch.tensor(tokens, device=device))
            if feed is not None:
                feed(steps[-1])
    return torch.stack(steps, 1) if steps else torch.zeros(len(numbers), 0, dtype=torch.long, device=device)


def rows_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts of input_ids int64 [B, T] without their padding. Raises PyargsError where it is not on the left."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise PyargsError(f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}: both must be [B, T]")
    if not ((mask == 0) | (mask == 1)).all():
        raise PyargsError("attention_mask must hold 1 where a token counts and 0 where it pads, nothing else")
    mask = mask.long()
    if len(mask) and not (mask.shape[1] and (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all()):
        raise PyargsError("prompts must be padded on the left (and not be empty): tokenizer.padding_side = 'left'")
    return [row[first:] for row, first in zip(input_ids.tolist(), (mask == 0).sum(1).tolist(), strict=True)]


def check_config(config, checkpoint, num_candidates: int | str) -> None:
    """Raises PyargsError that names each field of a GenerationConfig that this loop can not follow, and what to pass instead.

    Fields that are not listed above are refused, so that a new field of transformers is never ignored.
    checkpoint: the model's own config, to say which fields come from it.
    """
    from transformers import GenerationConfig

    most = math.inf if num_candidates == "all" else integer("num_candidates", num_candidates, 1)
    found = {}
    for name in sorted(vars(GenerationConfig())):
        value = getattr(config, name, None)
        if name.startswith("_") or name in TAKEN | WITHOUT_EFFECT or value is None or value is False:
            continue
        if name in SAMPLING and not config.do_sample or name == "top_k" and value >= most:
            continue
        if name == "min_length" and config.min_new_tokens:  # transformers makes the one of the other
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            found[name] = value
    if found:
        own = [name for name, value in found.items() if getattr(checkpoint, name, None) == value]
        raise PyargsError(
            f"reward-guided decoding does not apply {', '.join(f'{name}={str(value)[:60]}' for name, value in found.items())}"
            + (f" ({', '.join(own)}: as in the checkpoint's generation_config)" if own else "")
            + f": pass {', '.join(f'{name}={NEUTRAL.get(name)}' for name in found)} to decode without"
            + (", or do_sample=False" if found.keys() <= SAMPLING else "")
            + (f", or num_candidates={found['top_k']}" if "top_k" in found else "")
        )


def check_processors(processors, config) -> None:
    """Raises PyargsError for a logits processor that `generate` was given, by itself or as prefix_allowed_tokens_fn."""
    from transformers.generation import (
        LogitNormalization,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    # Those of the config, which this loop follows or `check_config` has seen; a second one is the caller's.
    own = {
        TemperatureLogitsWarper: "temperature",
        TopKLogitsWarper: "top_k",
        TopPLogitsWarper: "top_p",
        MinPLogitsWarper: "min_p",
    }
    theirs = [p for p in processors if type(p) is not LogitNormalization and type(p) not in own]
    for kind, name in own.items():
        some = [p for p in processors if type(p) is kind]
        if some and (not config.do_sample or len(some) > 1 or getattr(some[0], name) != getattr(config, name)):
            theirs.append(some[0])
    if theirs:
        raise PyargsError(
            f"reward-guided decoding applies no logits processor, got {type(theirs[0]).__name__}: leave out logits_processor "
            "and prefix_allowed_tokens_fn"
        )


def check_criteria(criteria, config) -> None:
    """Raises PyargsError for a stopping criterion other than the config's length and stop tokens."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    stop = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    for one in criteria:
        length = type(one) is MaxLengthCriteria and one.max_length == config.max_length
        if not (length or type(one) is EosTokenCriteria and set(one.eos_token_id.flatten().tolist()) == set(stop)):
            raise PyargsError(f"stopping criterion {type(one).__name__} is not supported: use eos_token_id and max_new_tokens")


def check_inputs(input_ids: Tensor, inputs: dict) -> None:
    """Raises PyargsError for arguments that `generate` passes to the model's forward, which this loop would drop."""
    if inputs.get("inputs_embeds") is not None:
        raise PyargsError("a reward model reads tokens, and there are none in inputs_embeds: give input_ids")
    for name, value in inputs.items():
        if name in ("attention_mask", "use_cache", "logits_to_keep", "cache_position") or value is None or value is False:
            continue
        if name in ("cache", "past_key_values"):  # made by `generate` for its own loops
            if value.get_seq_length():
                raise PyargsError(f"reward-guided decoding starts from the whole prompt: leave {name} out")
        elif name == "position_ids":
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            expected = (mask.long().cumsum(1) - 1).expand(len(input_ids), -1)
            if value.shape[1:] != expected.shape[1:] or ((value != expected) & (mask == 1)).any():
                raise PyargsError("reward-guided decoding counts positions from the first token: leave position_ids out")
        else:
            raise PyargsError(f"reward-guided decoding does not hand '{name}' on to the model: leave it out of generate")


def _feeding(streamer, input_ids: Tensor, stop, also: Callable[[Tensor], None] | None) -> Callable[[Tensor], None]:
    """A token_callback that gives a streamer the prompt, now, and each token up to the stop token."""
    if len(input_ids) != 1:
        raise PyargsError(f"a streamer takes one prompt, not {len(input_ids)}: use token_callback for a batch")
    streamer.put(input_ids.cpu())
    stops, stopped = torch.as_tensor(stop).flatten().tolist(), False

    def feed(tokens: Tensor) -> None:
        nonlocal stopped
        if also is not None:
            also(tokens)
        if not stopped:  # on a GPU a few steps of padding follow
            streamer.put(tokens.cpu())
            stopped = int(tokens) in stops

    return feed
