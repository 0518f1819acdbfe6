"""A checkpoint's generation config changes no answer: but for stop tokens, nothing in it is read."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import chosen, prompts, tokens
from transformers import GenerationConfig

from pyargs.models.token_reward import TokenReward
from pyargs.ops.library import has_extension

READ = ("eos_token_id", "pad_token_id")  # the second by `generate` of transformers
BACKENDS = ["cpu", "eager"] if has_extension else ["eager"]
BITING = dict(
    max_length=7, max_new_tokens=2, min_length=30, min_new_tokens=20, max_time=1e-9, stop_strings=["a"], do_sample=True,
    num_beams=3, early_stopping=True, use_cache=False, cache_implementation="static", temperature=0.1, top_k=1, top_p=0.01,
    min_p=0.9, top_h=0.1, typical_p=0.1, epsilon_cutoff=0.5, eta_cutoff=0.5, repetition_penalty=9.0,
    encoder_repetition_penalty=9.0,
    length_penalty=9.0, no_repeat_ngram_size=1, renormalize_logits=True, forced_bos_token_id=9,
    forced_eos_token_id=9, remove_invalid_values=True, exponential_decay_length_penalty=(0, 9.0), token_healing=True,
    guidance_scale=3.0, watermarking_config={"bias": 9.0}, num_return_sequences=2, output_scores=True, output_logits=True,
    return_dict_in_generate=True, prefill_chunk_size=2, penalty_alpha=0.6, dola_layers="low", num_beam_groups=2,
    prompt_lookup_num_tokens=3, bos_token_id=9,
)  # fmt: skip
"""Values that would be seen if the field were applied. Fields that are not named, and those of tomorrow, are set to 3."""


def fields(tokens: list[int]) -> dict:
    """A value for each field of GenerationConfig but those that are read; tokens: what the model would write."""
    biting = BITING | dict(
        bad_words_ids=[[t] for t in tokens],
        suppress_tokens=tokens,
        begin_suppress_tokens=tokens,
        sequence_bias=[[[t], -99.0] for t in tokens],
    )
    names = set(vars(GenerationConfig())) | biting.keys()
    return {name: biting.get(name, 3) for name in sorted(names - set(READ)) if not name.startswith("_")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_field_of_the_generation_config_changes_an_answer(backend):
    policy, model = tiny_lm(dtype=torch.float32), reward_model(tiny_lm(seed=3, dtype=torch.float32))
    policy.generation_config.eos_token_id = None
    rows, token_reward = prompts([3, 5, 2]), TokenReward(tiny_lm(seed=4, dtype=torch.float32), None)

    def answers() -> list:
        how = dict(backend=backend, max_new_tokens=8)
        return [
            tokens(chosen(policy, None, rows, **how)),
            tokens(chosen(policy, None, rows, **how, temperature=1.5, seed=1)),
            tokens(chosen(policy, model, rows, ["ann", "bob", "cid"], **how)),
            tokens(chosen(policy, token_reward, rows, **how)),
        ]

    before = answers()
    for name, value in fields(sorted({token for row in before[0] for token in row})).items():
        setattr(policy.generation_config, name, value)
    policy.config.min_length, policy.config.repetition_penalty = 30, 9.0  # where older checkpoints keep them
    assert answers() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_field_by_itself_changes_no_answer(backend):
    policy, rows = tiny_lm(dtype=torch.float32), prompts([3, 5, 2])
    policy.generation_config.eos_token_id = None
    before = chosen(policy, None, rows, backend=backend, max_new_tokens=5)
    for name, value in fields(sorted({token for row in tokens(before) for token in row})).items():
        policy.generation_config = GenerationConfig(pad_token_id=1)
        setattr(policy.generation_config, name, value)
        assert chosen(policy, None, rows, backend=backend, max_new_tokens=5) == before, name


def test_stop_tokens_are_the_checkpoints():
    policy, rows = tiny_lm(dtype=torch.float32), prompts([3, 5, 2])
    policy.generation_config = GenerationConfig(pad_token_id=1)
    free = tokens(chosen(policy, None, rows, max_new_tokens=6))
    stop = free[0][2]
    policy.generation_config = GenerationConfig(eos_token_id=[stop, 9], pad_token_id=5)
    for row, one in zip(free, tokens(chosen(policy, None, rows, max_new_tokens=6)), strict=True):
        ends = [n for n, token in enumerate(row) if token in (stop, 9)]
        assert one == (row[: ends[0] + 1] if ends else row)
