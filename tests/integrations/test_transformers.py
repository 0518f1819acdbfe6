"""Inside `generate` of transformers: what it asks for is done or refused by name, never dropped."""

from __future__ import annotations

import inspect
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, prompts
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import pyargs
from pyargs.errors import PyargsError
from pyargs.integrations import transformers as ours
from pyargs.lm.loading import fingerprint
from pyargs.lm.tokenize import left_pad
from pyargs.models.token_reward import TokenReward

PROMPT = torch.tensor([[5, 9, 7, 11]])


@pytest.fixture(scope="module")
def models():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


def guide_of(model, users, **more):
    return pyargs.guide(model, users=users, **{"reward_weight": 1.0, "num_candidates": 5} | more)


def answer(models, *, ids=PROMPT, guide=None, **asked):
    policy, model = models
    guide = guide or guide_of(model, ["ann"] * len(ids))
    return policy.generate(input_ids=ids, **({"max_new_tokens": 4} | asked), custom_generate=guide)


ASKED = {
    "num_beams": 2, "top_k": 1, "typical_p": 0.3, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "top_h": 0.4, "bad_words_ids": [[7]], "suppress_tokens": [7], "begin_suppress_tokens": [7], "forced_eos_token_id": 0,
    "forced_bos_token_id": 0, "repetition_penalty": 1.05, "encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
    "min_length": 9, "min_new_tokens": 3, "sequence_bias": [[[7], 9.0]], "guidance_scale": 1.5, "max_time": 9.0,
    "output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True,
    "exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True, "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static", "encoder_no_repeat_ngram_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_an_argument_that_would_be_dropped_is_refused_by_name(models, name):
    sampled = {"do_sample": True, "top_k": 0} if name in ours.SAMPLING else {}
    with pytest.raises(PyargsError, match=rf"does not apply {name}=.*: pass {name}="):
        answer(models, **(sampled | {name: ASKED[name], "return_dict_in_generate": True}))


@pytest.mark.parametrize("name", [name for name in vars(GenerationConfig()) if not name.startswith("_")])
def test_every_field_of_a_generation_config_is_followed_harmless_or_refused(name):
    """A field that a later transformers adds falls among the refused, until it is listed."""
    config = GenerationConfig(do_sample=True)
    setattr(config, name, "something")
    if name in ours.TAKEN | ours.WITHOUT_EFFECT:
        ours.check_config(config, GenerationConfig(), 10)
        return
    if name == "top_k":
        config.top_k = 9
    with pytest.raises(PyargsError, match=f"{name}={ours.NEUTRAL.get(name)}"):
        ours.check_config(config, GenerationConfig(), 10)
    setattr(config, name, ours.NEUTRAL.get(name))
    ours.check_config(config, GenerationConfig(), 10)


PARAMETERS = {
    "prompt": {"inputs"},
    "config": {"generation_config", "kwargs"},
    "refused": {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"},
    "only with guidance_scale, which is refused": {"negative_prompt_ids", "negative_prompt_attention_mask"},
    "hidden from a custom loop": {"synced_gpus", "assistant_model", "streamer"},
    "this loop": {"self", "custom_generate"},
}


def test_every_parameter_of_generate_is_known():
    found = set(inspect.signature(GenerationMixin.generate).parameters)
    assert found <= set().union(*PARAMETERS.values())
    for name in PARAMETERS["hidden from a custom loop"]:
        assert name in ours.guide.__doc__


def test_lists_do_not_overlap():
    assert not ours.TAKEN & ours.WITHOUT_EFFECT and not (ours.TAKEN | ours.WITHOUT_EFFECT) & (
        ours.NEUTRAL.keys() | ours.SAMPLING
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 1)])},
        {"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5)]), "do_sample": True},
        {"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5)]), "do_sample": True, "top_p": 0.5},
        {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.5)])},
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]), "do_sample": True},
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]), "do_sample": True, "temperature": 0.5},
        {"prefix_allowed_tokens_fn": lambda row, ids: [7]},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(9.0)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(5)])},
        {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(9)])},
        {"position_ids": torch.tensor([[3, 4, 5, 6]])},
    ],
)
def test_own_processors_criteria_and_positions_are_refused(models, asked):
    with pytest.raises(PyargsError, match="no logits processor|is not supported|position_ids"):
        answer(models, **asked)


def test_another_models_cache_and_embeddings_are_refused(models):
    policy, _ = models
    cache = policy(PROMPT[:, :2], use_cache=True).past_key_values
    with pytest.raises(PyargsError, match="starts from the whole prompt"):
        answer(models, past_key_values=cache)
    with pytest.raises(PyargsError, match="reads tokens"):
        policy.generate(
            inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64),
            max_new_tokens=2,
            custom_generate=guide_of(models[1], ["ann"]),
        )


def test_a_checkpoints_own_settings_are_refused_with_the_way_out():
    """As Qwen's: nothing says whether the caller wants them, so they are never dropped."""
    models = tiny_lm(), reward_model(tiny_lm(seed=3))
    models[0].generation_config.update(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    models[0].generation_config.typical_p = 0.9
    with pytest.raises(
        PyargsError, match="as in the checkpoint's generation_config.*pass repetition_penalty=1.0, typical_p=1.0"
    ):
        answer(models)
    with pytest.raises(PyargsError, match="typical_p=0.9 .*or do_sample=False"):
        answer(models, repetition_penalty=1.0)
    assert answer(models, repetition_penalty=1.0, typical_p=1.0).shape[0] == 1
    greedy = answer(models, repetition_penalty=1.0, do_sample=False)
    assert torch.equal(greedy, answer((tiny_lm(), models[1])))


def test_what_the_loop_follows(models):
    assert answer(models, num_return_sequences=2, do_sample=True).shape[0] == 2
    assert answer(models, return_dict_in_generate=True).sequences.shape[1] <= 8
    assert answer(models, max_new_tokens=2).shape[1] <= 6
    tokens = answer(models, eos_token_id=None, max_new_tokens=30)[0, 4:].tolist()
    assert len(tokens) == 30  # no stop token was asked for, so the model's own stops nothing
    assert answer(models, eos_token_id=tokens[1]).shape[1] <= 6
    mask = torch.tensor([[0, 1, 1, 1]])
    assert answer(models, attention_mask=mask, position_ids=torch.tensor([[0, 0, 1, 2]])).shape[0] == 1


class Kept(BaseStreamer):
    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, value):
        self.put_.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("asked", [{"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_act_on_the_policys_candidates_before_rewards(models, asked):
    """They leave the policy's favourite alone, whatever the rewards say; a greedy choice has no filter."""
    strong = guide_of(models[1], ["ann"], reward_weight=50.0)
    favourite = answer(models, guide=guide_of(models[1], ["ann"], reward_weight=0.0), do_sample=False)
    moved = answer(models, guide=strong, do_sample=False, **asked)
    assert torch.equal(answer(models, guide=strong, do_sample=True, **asked), favourite)
    assert not torch.equal(moved, favourite)
    assert torch.equal(moved, answer(models, guide=strong, do_sample=False))


def test_the_backend_is_chosen_anew_at_each_call_and_logged(models, caplog):
    lm = tiny_lm(dtype=torch.float32)
    model = reward_model(tiny_lm(seed=3, dtype=torch.float32))
    guide = guide_of(model, ["ann"])
    with caplog.at_level("INFO", logger="pyargs"):
        found = answer((lm, model), guide=guide)
        lm.model.layers[0].register_forward_hook(lambda *_: None)
        assert torch.equal(answer((lm, model), guide=guide), found), "no refresh is needed"
    first, second = (record.getMessage() for record in caplog.records)
    assert "hook" in second and first != second
    with pytest.raises(PyargsError, match="backend='cpu' cannot compute this"):
        answer((lm, model), guide=guide_of(model, ["ann"], backend="cpu"))


def test_one_weight_in_one_of_two_units(models):
    policy, model = models
    with pytest.raises(PyargsError, match="no reward_std"):
        answer(models, guide=pyargs.guide(model, ["ann"]))
    with pytest.raises(PyargsError, match="one of them"):
        answer(models, guide=guide_of(model, ["ann"], strength=1.0))
    model.about["reward_std"] = {fingerprint(policy.get_decoder()): 0.25}
    strong = pyargs.guide(model, ["ann", "bob"], strength=[1.0, 0.5], num_candidates=5)
    raw = guide_of(model, ["ann", "bob"], reward_weight=[4.0, 2.0])
    ids = torch.tensor([[1, 5, 6], [7, 8, 9]])
    try:
        assert torch.equal(answer(models, ids=ids, guide=strong), answer(models, ids=ids, guide=raw))
    finally:
        del model.about["reward_std"]


def test_a_token_reward_guides_too():
    """Over its whole vocabulary, with a sample, it is GenARM's own rule."""
    lm, model = tiny_lm(), TokenReward(tiny_lm(seed=3), None)
    for k, more in ((3, {}), ("all", {"do_sample": True, "temperature": 0.5, "top_k": 0})):
        guide = pyargs.guide(model, [""], reward_weight=1.0, num_candidates=k, seed=[4])
        got = answer((lm, model), guide=guide, max_new_tokens=6, eos_token_id=None, **more)
        (want,) = pyargs.Engine(lm, model).generate(
            PROMPT.tolist(),
            reward_weight=1.0,
            num_candidates=k,
            seed=[4],
            max_new_tokens=6,
            stop=[],
            temperature=more.get("temperature", 0.0),
        )
        assert got[0, 4:].tolist() == want.tokens


@pytest.mark.parametrize(
    "mask, message",
    [([[1, 1, 1, 0]], "padded on the left"), ([[0, 1, 0, 1]], "padded on the left"), ([[2, 1, 1, 1]], "nothing else")],
)
def test_padding_elsewhere_than_on_the_left_is_refused(models, mask, message):
    with pytest.raises(PyargsError, match=message):
        answer(models, attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("wrong", [None, "5", [5], 2.5])
def test_the_number_of_candidates_is_checked_before_top_k(models, wrong):
    guide = guide_of(models[1], ["ann"], num_candidates=wrong)
    with pytest.raises(PyargsError, match="num_candidates must be a whole number"):
        answer(models, guide=guide, do_sample=True)


def test_a_streamer_is_fed_as_generate_feeds_it(models):
    kept, seen = Kept(), []
    guide = guide_of(models[1], ["ann"], streamer=kept, token_callback=seen.append)
    found = answer(models, guide=guide)
    assert kept.put_[0] == PROMPT.tolist() and kept.ended == 1
    assert [token for part in kept.put_[1:] for token in part] == found[0, 4:].tolist()
    assert [int(token) for token in seen] == found[0, 4:].tolist()


def test_a_streamer_gets_nothing_behind_the_stop_token(models):
    first, stop = answer(models, eos_token_id=None)[0, 4:6].tolist()
    kept, seen = Kept(), []
    guide = guide_of(models[1], ["ann"], streamer=kept, token_callback=seen.append)
    answer(models, guide=guide, eos_token_id=stop, pad_token_id=50, max_new_tokens=20)
    assert first != stop and kept.put_[1:] == [[first], [stop]]
    assert [int(token) for token in seen] == [first, stop]


def test_a_callback_gets_padding_for_rows_that_have_ended(models):
    ids, seen = torch.tensor([[5, 9, 7, 11], [1, 5, 6, 8]]), []
    asked = dict(ids=ids, pad_token_id=50, max_new_tokens=6)
    # Without a weight, since a stop token has a reward of its own.
    guide = guide_of(models[1], ["ann", "ann"], reward_weight=0.0, token_callback=seen.append)
    free = answer(models, guide=guide, eos_token_id=None, **asked)[:, 4:]
    seen.clear()
    stop = next(token for token in free[0].tolist() if token not in free[1].tolist())
    found = answer(models, guide=guide, eos_token_id=stop, **asked)[:, 4:]
    assert torch.equal(torch.stack(seen, 1), found)
    place = free[0].tolist().index(stop)
    assert torch.equal(found[0, : place + 1], free[0, : place + 1]) and set(found[0, place + 1 :].tolist()) == {50}
    assert torch.equal(found[1], free[1])


def test_tokens_that_are_known_late_are_fed_step_by_step(models, monkeypatch):
    """As those of a captured step are, which several steps' events come with."""
    ids, asked = torch.tensor([[5, 9, 7, 11], [1, 5, 6, 8]]), dict(max_new_tokens=7, eos_token_id=[13, 20, 34, 41])
    guide = guide_of(models[1], ["ann", "bob"])
    want, step = answer(models, ids=ids, guide=guide, **asked), pyargs.Engine.step
    late, seen = [], []

    def slow(engine):
        late.extend(step(engine))
        events = late[:] if len(late) > 4 or not engine.busy else []
        del late[: len(events)]
        return events

    monkeypatch.setattr(pyargs.Engine, "step", slow)
    guide = guide_of(models[1], ["ann", "bob"], token_callback=seen.append)
    assert torch.equal(answer(models, ids=ids, guide=guide, **asked), want)
    assert torch.equal(torch.stack(seen, 1), want[:, 4:])


def test_a_streamers_reader_never_waits_for_ever(models):
    """Whatever goes wrong in decoding: an unknown user, a refused argument, a batch, a callback that raises."""
    from transformers import TextIteratorStreamer

    from pyargs.data.synthetic import tiny_tokenizer

    def fail(_):
        raise ValueError("the reader went away")

    for users, more, asked in (
        (["nobody"], {}, {}),
        (["ann"], {}, {"num_beams": 2}),
        (["ann"] * 2, {}, {"ids": PROMPT.repeat(2, 1)}),
        (["ann"], {"token_callback": fail}, {}),
    ):
        streamer = TextIteratorStreamer(tiny_tokenizer())
        guide = guide_of(models[1], users, streamer=streamer, **more)
        failed = []

        def work(guide=guide, asked=asked, failed=failed):
            try:
                answer(models, guide=guide, **asked)
            except (PyargsError, ValueError) as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        "".join(streamer)
        thread.join(20)
        assert failed and not thread.is_alive()


@pytest.mark.parametrize("sample", [False, True])
def test_generate_of_transformers_gives_the_same_tokens(sample):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([2, 6, 4])
    ids, mask = left_pad(rows, pad_id=1)
    asked = dict(reward_weight=[1.0, 2.0, 0.0], num_candidates=5, seed=0)
    own = pyargs.Engine(policy, model).generate(
        rows, USERS, max_new_tokens=12, **asked, **({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05} if sample else {})
    )
    got = policy.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=sample,
        **({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05} if sample else {}),
        custom_generate=pyargs.guide(model, users=USERS, **asked),
    )
    assert got[:, : ids.shape[1]].tolist() == ids.tolist()
    for row, answer in zip(got[:, ids.shape[1] :].tolist(), own, strict=True):
        n = len(answer.tokens)
        assert row[:n] == answer.tokens and set(row[n:]) <= {1}  # both the stop token and the padding


def test_weights_of_many_prompts_and_inside_generate_are_checked_alike(models):
    """The other doors to the decoder: numbers of any library, and the same refusals."""
    policy, model = models
    ids = torch.tensor([[1, 5, 6], [7, 8, 9]])
    inside = lambda weight: policy.generate(  # noqa: E731
        ids, max_new_tokens=2, custom_generate=guide_of(model, ["ann", "bob"], reward_weight=weight)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = inside([0.5, 2.0])
        assert torch.equal(inside(np.array([0.5, 2.0])), expected) and torch.equal(inside(torch.tensor([0.5, 2.0])), expected)
        for weight in (True, "strong", float("nan"), [1.0, 2.0, 3.0]):
            with pytest.raises(PyargsError, match="reward_weight"):
                inside(weight)
