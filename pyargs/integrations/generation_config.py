"""What happens to each argument of `generate` inside a guided loop: followed, without effect, or refused by name."""

from __future__ import annotations

import torch
from torch import Tensor

from pyargs.errors import PyargsError

FOLLOWED = {
    # By the loop.
    "max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id", "do_sample",
    "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
    # By the processors that `generate` makes of them; they change the policy's logits before the candidates are taken.
    "min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale",
    "watermarking_config", "renormalize_logits",
    # As these do, only where do_sample is set; the temperature then divides log-probability and reward alike.
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
}  # fmt: skip
"""Fields of a generation config that a guided loop follows."""

WITHOUT_EFFECT = {
    # Speed and memory of transformers' own loops, and where a config comes from.
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size", "low_memory",
    "continuous_batching_config", "transformers_version",
    # Of beams, encoders and assistants, which are refused, absent or hidden from this loop.
    "early_stopping", "length_penalty", "bos_token_id", "decoder_start_token_id", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight",
}  # fmt: skip
"""Fields that change no answer of a guided loop."""

REFUSED = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "cache_implementation": "dynamic",
    **dict.fromkeys(("constraints", "force_words_ids", "penalty_alpha", "dola_layers", "token_healing", "is_assistant")),
    **dict.fromkeys(("assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "speculation_type")),
    **dict.fromkeys(("output_attentions", "output_hidden_states")),
}  # fmt: skip
"""Fields that are refused, and the value that changes nothing, besides None and False. A field of a later transformers is
refused, too, until it is listed."""


def check_config(config, checkpoint) -> None:
    """Raises PyargsError that names each field of a GenerationConfig that a guided loop can not follow, and what to pass
    instead. checkpoint: the model's own config, to say which fields come from it."""
    from transformers import GenerationConfig

    found = {}
    for name in sorted(vars(GenerationConfig())):
        value = getattr(config, name, None)
        if name.startswith("_") or name in FOLLOWED | WITHOUT_EFFECT or value is None or value is False:
            continue
        if value != REFUSED.get(name):
            found[name] = value
    if found:
        own = [name for name, value in found.items() if getattr(checkpoint, name, None) == value]
        raise PyargsError(
            f"reward-guided decoding does not apply {', '.join(f'{name}={str(value)[:60]}' for name, value in found.items())}"
            + (f" ({', '.join(own)}: as in the checkpoint's generation_config)" if own else "")
            + f": pass {', '.join(f'{name}={REFUSED.get(name)}' for name in found)} to decode without"
        )


def changes_logits(processors, config, num_candidates: int | str) -> bool:
    """Whether any processor changes which candidates a row has, or their log-probabilities, but for the temperature, which
    the choice applies."""
    from transformers.generation import LogitNormalization, TemperatureLogitsWarper, TopKLogitsWarper

    left = [one for one in processors if type(one) is not LogitNormalization]  # it moves all logits of a row alike
    if num_candidates != "all":  # the sort of a filter that leaves all candidates
        left = [one for one in left if not (type(one) is TopKLogitsWarper and one.top_k >= num_candidates)]
    own = temperature_of(config)
    return bool(left) and not (len(left) == 1 and type(left[0]) is TemperatureLogitsWarper and left[0].temperature == own)


def temperature_of(config) -> float:
    """By what the processors of a config divide the logits."""
    return config.temperature if config.do_sample and config.temperature is not None else 1.0


def ends(criteria, config) -> tuple[int, list[int]]:
    """The length at which rows end, and the tokens that end one, by the criteria that `generate` made or was given in their
    place."""
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    stops = [one.eos_token_id.flatten().tolist() for one in criteria if type(one) is EosTokenCriteria]
    return min(lengths, default=config.max_length), list(dict.fromkeys(token for each in stops for token in each))


def check_inputs(input_ids: Tensor, inputs: dict) -> None:
    """Raises PyargsError for arguments that `generate` passes to the model's forward, which a guided loop would drop."""
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


def rows_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts of input_ids int64 [B, T] without their padding. Raises PyargsError where it is not on the left."""
    return [row[first:] for row, first in zip(input_ids.tolist(), padding_of(input_ids, attention_mask), strict=True)]


def padding_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """How many tokens of each row of input_ids int64 [B, T] pad it on the left."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise PyargsError(f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}: both must be [B, T]")
    if not ((mask == 0) | (mask == 1)).all():
        raise PyargsError("attention_mask must hold 1 where a token counts and 0 where it pads, nothing else")
    mask = mask.long()
    if len(mask) and not (mask.shape[1] and (mask[:, -1] == 1).all() and (mask.diff(dim=1) >= 0).all()):
        raise PyargsError("prompts must be padded on the left (and not be empty): tokenizer.padding_side = 'left'")
    return (mask == 0).sum(1).tolist()
