"""`model.generate(**inputs, custom_generate=pyargs.args(reward_model, users=[...]))`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.errors import PyargsError
from pyargs.user_ids import user_ids

TAKEN = {
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
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
    "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0,
    "min_length": 0, "min_new_tokens": 0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "top_k": 0,
    "cache_implementation": "dynamic",
}  # fmt: skip
"""What asks for nothing in the other fields, besides None and False. Any other value is refused."""

SAMPLING = {"top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""Fields that only count where `do_sample` is true."""


def args(
    reward_model,
    users: Sequence[str],
    *,
    reward_weight: float | Sequence[float] | Tensor = 1.0,
    num_candidates: int = 10,
    eos_reward: str = "before",
    seed: int | Sequence[int] | None = None,
    tokenizer=None,
    token_callback: Callable[[Tensor], None] | None = None,
    streamer=None,
):
    """A callable for the `custom_generate` argument of `generate`; the arguments are those of `pyargs.generate`.

    users: one id for each prompt of the batch. Length, stop tokens, padding, do_sample and temperature come from the
    generation config as usual. streamer: a streamer of transformers, fed as `generate` does it, for one prompt; it is ended
    also when decoding fails. Returns ids [B, T + N], or with return_dict_in_generate a GenerateDecoderOnlyOutput.

    Raises PyargsError for whatever else would change the answer, asked for or set by the checkpoint's own generation config:
    filters of sampling, penalties, forced and suppressed tokens, beams, logits processors, own stopping criteria, scores to
    return. `top_k` may be num_candidates or more. transformers does not tell a custom loop of `streamer=`, `assistant_model=`
    and `synced_gpus=` given to `generate`: they do nothing here.
    """
    from pyargs.decode.args import generate
    from pyargs.decode.request import weights, whole

    users = user_ids(users)

    def custom_generate(
        model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_inputs
    ):
        from transformers.generation import GenerateDecoderOnlyOutput

        try:
            config = generation_config
            check_config(config, model.generation_config, whole("num_candidates", num_candidates, 1))
            check_processors(logits_processor or [], config)
            check_criteria(stopping_criteria or [], config)
            check_inputs(input_ids, model_inputs)
            copies = config.num_return_sequences or 1
            weight = weights(reward_weight, len(users))
            stop = config.eos_token_id if config.eos_token_id is not None else []  # None was asked for: no stop token
            feed = token_callback if streamer is None else _feeding(streamer, input_ids, stop, token_callback)
            decoded = generate(
                model,
                reward_model,
                input_ids,
                model_inputs.get("attention_mask"),
                [user for user in users for _ in range(copies)],
                reward_weight=weight if len(weight) == 1 else weight.repeat_interleave(copies),
                num_candidates=num_candidates,
                max_new_tokens=config.max_length - input_ids.shape[1],
                eos_token_id=stop,
                pad_token_id=config.pad_token_id,
                do_sample=bool(config.do_sample),
                temperature=1.0 if config.temperature is None else config.temperature,
                seed=seed,
                eos_reward=eos_reward,
                tokenizer=tokenizer,
                token_callback=feed,
            )
        finally:
            if streamer is not None:
                streamer.end()  # or whoever reads it would wait for ever
        sequences = torch.cat([input_ids, decoded.tokens.to(input_ids.device)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    return custom_generate


def check_config(config, checkpoint, num_candidates: int) -> None:
    """Raises PyargsError that names each field of a GenerationConfig that this loop can not follow, and what to pass instead.

    Any field of the class is refused that is not listed above, so a new one is until somebody has seen what it does.
    checkpoint: the model's own config, to say which of them nobody asked for.
    """
    from transformers import GenerationConfig

    found = {}
    for name in sorted(vars(GenerationConfig())):
        value = getattr(config, name, None)
        if name.startswith("_") or name in TAKEN | WITHOUT_EFFECT or value is None or value is False:
            continue
        if name in SAMPLING and not config.do_sample or name == "top_k" and value >= num_candidates:
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
    from transformers.generation import LogitNormalization, TemperatureLogitsWarper, TopKLogitsWarper

    theirs = [p for p in processors if type(p) not in (LogitNormalization, TemperatureLogitsWarper, TopKLogitsWarper)]
    # Those of the config, which this loop follows or `check_config` has seen; a second one is the caller's.
    expected = {TemperatureLogitsWarper: config.temperature, TopKLogitsWarper: config.top_k}
    for kind, name in ((TemperatureLogitsWarper, "temperature"), (TopKLogitsWarper, "top_k")):
        some = [p for p in processors if type(p) is kind]
        if some and (not config.do_sample or len(some) > 1 or getattr(some[0], name) != expected[kind]):
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
    """Raises PyargsError for what `generate` hands on to the model's forward and this loop would drop."""
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
