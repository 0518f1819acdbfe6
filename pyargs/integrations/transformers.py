"""`model.generate(**inputs, custom_generate=pyargs.args(reward_model, users=[...]))`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyargs.errors import PyargsError


def args(
    reward_model, users: Sequence[str], *, reward_weight: float | Sequence[float] | Tensor = 1.0, num_candidates: int = 10,
    eos_reward: str = "before",
    seed: int | Sequence[int] | None = None, tokenizer=None, token_callback: Callable[[Tensor], None] | None = None,
):  # fmt: skip
    """A callable for the `custom_generate` argument of `generate`; the arguments are those of `pyargs.generate`.

    users: one id for each prompt of the batch. Length, stop tokens, padding, do_sample and temperature come from the
    generation config as usual. Logits processors are not applied (with a warning): the candidates are the policy's own.
    A `streamer` does not reach a custom loop in transformers: use token_callback. Returns ids [B, T + N], or with
    return_dict_in_generate a GenerateDecoderOnlyOutput.
    Raises PyargsError for what this loop does not do: beams, own stopping criteria.
    """
    from pyargs.decode.args import generate

    def custom_generate(
        model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_inputs
    ):
        from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

        config = generation_config
        if config.num_beams > 1:
            raise PyargsError("reward-guided decoding has no beams: leave num_beams at 1")
        foreign = [c for c in stopping_criteria or [] if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        if foreign:
            raise PyargsError(f"stopping criterion {type(foreign[0]).__name__} is not supported: use stop tokens or length")
        warpers = {
            "TemperatureLogitsWarper",
            "TopKLogitsWarper",
            "TopPLogitsWarper",
        }  # part of sampling, done or not wanted here
        ignored = [type(p).__name__ for p in logits_processor or [] if type(p).__name__ not in warpers]
        if ignored:
            warnings.warn(f"logits processors are not applied in reward-guided decoding: {', '.join(ignored)}", stacklevel=2)
        copies = config.num_return_sequences or 1
        weight = torch.as_tensor(reward_weight, dtype=torch.float32).flatten()
        decoded = generate(
            model, reward_model, input_ids, model_inputs.get("attention_mask"),
            [user for user in users for _ in range(copies)],
            reward_weight=weight if len(weight) == 1 else weight.repeat_interleave(copies),
            num_candidates=num_candidates, max_new_tokens=config.max_length - input_ids.shape[1],
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=bool(config.do_sample),
            temperature=config.temperature or 1.0, seed=seed, eos_reward=eos_reward, tokenizer=tokenizer,
            token_callback=token_callback,
        )  # fmt: skip
        sequences = torch.cat([input_ids, decoded.tokens.to(input_ids.device)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    return custom_generate
