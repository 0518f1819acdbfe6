"""Every field of a GenerationConfig, and every argument of `generate`: followed as by `generate` itself, without effect, or
refused by name. Without a weight a guided loop is `generate`, which is the oracle here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import reward_model, tiny_lm
from generating import PROMPTS, STOPS, guided, usual
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin

import pyargs
from pyargs.errors import PyargsError
from pyargs.integrations import generation_config as ours
from pyargs.ops.library import has_extension

FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not has_extension, reason="no extension")), "eager"]


@pytest.fixture(scope="module", params=BACKENDS)
def models(request):
    dtype = torch.float32 if request.param == "cpu" else torch.float64
    return tiny_lm().to(dtype), reward_model(tiny_lm(seed=3).to(dtype))


@pytest.fixture(scope="module")
def policy_and_model():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


GREEDY = {
    "max_length": {"max_length": 9, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 2},
    "max_time": {"max_time": 1e-9},
    "eos_token_id": {"eos_token_id": 49},
    "pad_token_id": {"pad_token_id": 2},
    "min_length": {"min_length": 13},
    "min_new_tokens": {"min_new_tokens": 9},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[22], [51, 49]]},
    "forced_bos_token_id": {"forced_bos_token_id": 9, "rows": [[5], [8]]},
    "forced_eos_token_id": {"forced_eos_token_id": 3, "max_new_tokens": 3},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (0, 2.5)},
    "suppress_tokens": {"suppress_tokens": [49]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [22]},
    "sequence_bias": {"sequence_bias": [[[22], -9.0], [[49, 8], 9.0]]},
    "guidance_scale": {"guidance_scale": 2.5, "negative_prompt_ids": torch.tensor([[5, 6], [7, 8]])},
    "watermarking_config": {"watermarking_config": {"bias": 6.0, "greenlist_ratio": 0.3}},
}  # fmt: skip
SAMPLED = {
    "temperature": {"temperature": 0.4},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "top_h": {"top_h": 0.4},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 4},
    "do_sample": {"top_k": 5, "top_p": 0.8, "temperature": 1.7, "repetition_penalty": 1.3},
}
ELSEWHERE = {  # and where that is
    "remove_invalid_values": "test_logits_that_are_no_numbers_are_removed_where_that_is_asked",
    **dict.fromkeys(("num_return_sequences",), "test_several_sequences_of_a_prompt"),
    **dict.fromkeys(("output_scores", "output_logits", "return_dict_in_generate"), "test_batch.py"),
    "stop_strings": "test_transformers.py",
}


def test_each_field_that_is_followed_has_a_test():
    assert GREEDY.keys() | SAMPLED.keys() | ELSEWHERE.keys() == ours.FOLLOWED


@pytest.mark.parametrize("name", GREEDY)
def test_a_followed_field_is_that_of_generate(models, name):
    asked = dict(GREEDY[name])
    rows = asked.pop("rows", PROMPTS)
    plain, asked = usual(rows), usual(rows, **asked)
    want = models[0].generate(**asked)
    assert torch.equal(guided(models, asked), want)
    without = models[0].generate(**plain)
    assert want.shape != without.shape or not torch.equal(want, without), "the field does nothing here"


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampling_field_gives_the_scores_of_generate_at_each_step(policy_and_model, name):
    """Those that it samples from: with all tokens as candidates, each step's are those of `generate` behind the same text."""
    asked = usual(max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    asked |= {"do_sample": True, "top_k": 0} | SAMPLED[name]
    found = guided(policy_and_model, asked, num_candidates=61, seed=5)
    length = asked["input_ids"].shape[1]
    for step, scores in enumerate(found.scores):
        text = found.sequences[:, : length + step]
        mask = torch.cat([asked["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
        one = asked | {"input_ids": text, "attention_mask": mask, "max_new_tokens": 1}
        (want,) = policy_and_model[0].generate(**one).scores
        torch.testing.assert_close(scores, want, atol=1e-4, rtol=1e-4)
        assert scores.gather(1, found.sequences[:, length + step, None]).isfinite().all()
    (plain,) = policy_and_model[0].generate(**usual(do_sample=True, top_k=0, max_new_tokens=1, output_scores=True,
                                                    return_dict_in_generate=True)).scores  # fmt: skip
    assert not torch.equal(found.scores[0], plain), "the field does nothing here"


def test_a_sample_is_drawn_from_the_scores(policy_and_model):
    """By the noise of its own seed: the first token whose cumulated probability exceeds it, the likeliest first."""
    asked = usual(max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    asked |= {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.5}
    found = guided(policy_and_model, asked, num_candidates=7, seed=[3, 4], reward_weight=1.5)
    for row, seed in enumerate((3, 4)):
        drawn = torch.rand(6, generator=torch.Generator().manual_seed(seed))
        for step, scores in enumerate(found.scores):
            raw = policy_and_model[0](found.sequences[row : row + 1, 1 - row : 5 + step]).logits[0, -1]
            order = raw.topk(7).indices  # of the policy's candidates
            chance = scores[row, order].double().softmax(0).cumsum(0)
            assert found.sequences[row, 5 + step] == order[(chance > drawn[step]).int().argmax()]


MIXED = {
    "min_new_tokens": st.integers(1, 6), "repetition_penalty": st.floats(1.1, 2.0), "no_repeat_ngram_size": st.integers(1, 3),
    "suppress_tokens": st.lists(st.integers(2, 60), min_size=1, max_size=9), "max_new_tokens": st.integers(1, 9),
    "forced_eos_token_id": st.just(3), "eos_token_id": st.sampled_from([None, 3, [3, 11, 22, 40, 47, 51]]),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 3), st.floats(1.1, 1.5)),
}  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(st.data(), st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=6), min_size=1, max_size=3))
def test_any_mix_of_fields_is_that_of_generate(policy_and_model, data, rows):
    names = data.draw(st.sets(st.sampled_from(sorted(MIXED))))
    asked = {name: data.draw(MIXED[name], name) for name in sorted(names)}
    if asked.get("eos_token_id", STOPS) is None:
        asked.pop("exponential_decay_length_penalty", None)
    if "exponential_decay_length_penalty" in asked:  # generate's own scores are NaN where a token is forbidden and wanted
        asked.pop("min_new_tokens", None)
        asked.pop("suppress_tokens", None)
    if "forced_eos_token_id" in asked and "suppress_tokens" in asked:  # generate itself refuses both of one token
        asked["suppress_tokens"] = [one for one in asked["suppress_tokens"] if one != 3] or [4]
    asked = usual(rows, **asked)
    assert torch.equal(guided(policy_and_model, asked), policy_and_model[0].generate(**asked))


def test_logits_that_are_no_numbers_are_removed_where_that_is_asked():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    policy.lm_head.weight.data[7] = torch.nan
    with pytest.raises(PyargsError, match="not numbers"):
        guided((policy, model), usual(), backend="eager")
    asked = usual(remove_invalid_values=True)
    assert torch.equal(guided((policy, model), asked, backend="eager"), policy.generate(**asked))


def test_several_sequences_of_a_prompt(policy_and_model):
    """Each has a sample of its own, for the prompt's user; processors see all of them."""
    asked = usual(num_return_sequences=3, do_sample=True, top_k=0, repetition_penalty=1.2, temperature=2.0)
    several = guided(policy_and_model, asked, seed=[3, 4, 5, 6, 7, 8], reward_weight=[0.0, 1.0], num_candidates=9)
    assert len({tuple(row) for row in several.tolist()}) > 2
    one = usual(PROMPTS[1:], do_sample=True, top_k=0, repetition_penalty=1.2, temperature=2.0)
    alone = guided(policy_and_model, one, seed=[8], reward_weight=1.0, num_candidates=9, users=["bob"])
    assert torch.equal(several[5, : alone.shape[1]], alone[0])


REFUSALS = {
    "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5, "cache_implementation": "static", "constraints": [1],
    "force_words_ids": [[7]], "penalty_alpha": 0.5, "dola_layers": "low", "token_healing": True, "is_assistant": True,
    "assistant_early_exit": 1, "prompt_lookup_num_tokens": 2, "use_mtp": True, "speculation_type": "dflash",
    "output_attentions": True, "output_hidden_states": True,
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_followed_harmless_or_refused(name):
    """A field that a later transformers adds falls among the refused, until it is listed."""
    config = GenerationConfig(do_sample=True)
    setattr(config, name, REFUSALS.get(name, "something"))
    if name in ours.FOLLOWED | ours.WITHOUT_EFFECT:
        return ours.check_config(config, GenerationConfig())
    assert name in REFUSALS.keys() & ours.REFUSED.keys(), f"{name} is new in transformers: list it, and test it"
    with pytest.raises(PyargsError, match=f"does not apply {name}=.*: pass {name}={ours.REFUSED.get(name)}"):
        ours.check_config(config, GenerationConfig())
    setattr(config, name, ours.REFUSED.get(name))
    ours.check_config(config, GenerationConfig())


def test_a_field_that_nobody_knows_is_refused(monkeypatch):
    init = GenerationConfig.__init__
    monkeypatch.setattr(
        GenerationConfig, "__init__", lambda self, **more: (init(self, **more), setattr(self, "newest", None))[0]
    )
    config = GenerationConfig()
    config.newest = 3
    with pytest.raises(PyargsError, match="does not apply newest=3: pass newest=None"):
        ours.check_config(config, GenerationConfig())


WITHOUT = {"use_cache": False, "compile_config": None, "disable_compile": True, "prefill_chunk_size": 2,
           "early_stopping": True, "length_penalty": 3.0, "bos_token_id": 9, "num_assistant_tokens": 2}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_without_effect_changes_no_token(policy_and_model, name):
    asked = usual(max_new_tokens=4)
    with_it = guided(policy_and_model, asked | {name: WITHOUT[name]}, reward_weight=1.0)
    assert torch.equal(with_it, guided(policy_and_model, asked, reward_weight=1.0)) and name in ours.WITHOUT_EFFECT


def test_the_lists_are_apart():
    assert not ours.FOLLOWED & ours.WITHOUT_EFFECT and not (ours.FOLLOWED | ours.WITHOUT_EFFECT) & ours.REFUSED.keys()


def table() -> dict[str, str]:
    """Of each argument what the table of docs/embedding.md says: the first word or words of its second cell."""
    page = Path(pyargs.__file__).parent.parent / "docs" / "embedding.md"
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        kind = (
            re.match(r"followed|without effect|refused|hidden", cells[1])
            if line.startswith("| `") and len(cells) > 2
            else None
        )
        if kind:
            names = re.findall(r"`(\w+)`", cells[0])
            assert not found.keys() & names, "an argument stands twice in the table"
            found |= dict.fromkeys(names, kind.group())
    return found


def test_the_table_of_the_docs_says_what_happens_to_each_argument():
    said = table()
    config = {name: kind for name, kind in said.items() if name in ours.FOLLOWED | ours.WITHOUT_EFFECT | ours.REFUSED.keys()}
    assert config == {
        **dict.fromkeys(ours.FOLLOWED, "followed"),
        **dict.fromkeys(ours.WITHOUT_EFFECT, "without effect"),
        **dict.fromkeys(ours.REFUSED, "refused"),
    }
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "custom_generate", "kwargs"}
    assert {*FIELDS, *arguments} <= said.keys()
    hidden = {name for name, kind in said.items() if kind == "hidden"}
    assert hidden == {"streamer", "assistant_model", "synced_gpus"}
    assert all(name in pyargs.guide.__doc__ for name in hidden)
