"""Inside `generate` of transformers: what it asks for is done or refused by name, never dropped."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, prompts
from generating import guided, usual
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import pyargs
from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode.backends import without_cache
from pyargs.errors import PyargsError
from pyargs.integrations.transformers import FOLDER
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


def test_users_may_be_left_out_where_the_model_is_the_same_for_everyone(models):
    policy, reward = tiny_lm(), TokenReward(tiny_lm(seed=3), None)
    ids, how = torch.cat([PROMPT, PROMPT.flip(1)]), dict(reward_weight=1.0, num_candidates=5)
    for several in (1, 2):
        asked = dict(input_ids=ids, max_new_tokens=4, num_return_sequences=several, do_sample=several > 1)
        named, nobody = (
            policy.generate(**asked, custom_generate=pyargs.guide(reward, **users, **how, seed=3))
            for users in ({"users": ["x", "y"]}, {})
        )
        assert torch.equal(named, nobody)
    with pytest.raises(PyargsError, match="another one for each user: name the user"):
        answer(models, guide=pyargs.guide(models[1], **how))


def test_own_positions_are_refused(models):
    with pytest.raises(PyargsError, match="leave position_ids out"):
        answer(models, position_ids=torch.tensor([[3, 4, 5, 6]]))


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


def test_a_checkpoints_own_settings_are_followed_or_refused_with_the_way_out():
    """As Qwen's: nothing says whether the caller wants them, so they are never dropped."""
    models = tiny_lm(), reward_model(tiny_lm(seed=3))
    free = answer(models)
    models[0].generation_config.update(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=9.0)
    assert not set(PROMPT[0].tolist()) & set(answer(models, do_sample=False)[0, 4:].tolist())
    assert torch.equal(answer(models, do_sample=False, repetition_penalty=1.0), free)
    models[0].generation_config.num_beams = 2
    with pytest.raises(PyargsError, match="num_beams=2 .*as in the checkpoint's generation_config.*pass num_beams=1"):
        answer(models)


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


@pytest.mark.parametrize("asked", [{"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}, {"typical_p": 1e-6, "temperature": 1e-3}])
def test_filters_act_on_the_policys_candidates_before_rewards(models, asked):
    """They leave the policy's favourite alone, whatever the rewards say; a greedy choice has no filter."""
    strong = guide_of(models[1], ["ann"], reward_weight=50.0)
    favourite = answer(models, guide=guide_of(models[1], ["ann"], reward_weight=0.0), do_sample=False)
    moved = answer(models, guide=strong, do_sample=False, **asked)
    assert torch.equal(answer(models, guide=strong, do_sample=True, **asked), favourite)
    assert not torch.equal(moved, favourite)
    assert torch.equal(moved, answer(models, guide=strong, do_sample=False))


def test_fewer_candidates_and_clipped_rewards_are_those_of_the_engine(models):
    policy, model = models
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    for fewer in ({"candidate_min_p": 0.7}, {"reward_clip": 0.1}):
        own = {name.removeprefix("candidate_"): value for name, value in fewer.items()}
        wish = dict(reward_weight=3.0, num_candidates=5, max_new_tokens=8, stop=[])
        engine = pyargs.Engine(policy, model)
        want, free = (
            [one.tokens for one in engine.generate(ids.tolist(), ["ann", "bob"], **wish, **more)] for more in (own, {})
        )
        asked = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        got = policy.generate(ids, **asked, custom_generate=guide_of(model, ["ann", "bob"], reward_weight=3.0, **fewer))
        assert got[:, ids.shape[1] :].tolist() == want != free
        with pytest.raises(PyargsError, match="output_scores has scores of all candidates"):
            more = dict(return_dict_in_generate=True, output_scores=True)
            policy.generate(ids, **asked, **more, custom_generate=guide_of(model, ["ann", "bob"], **fewer))


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
def test_the_number_of_candidates_is_checked_before_anything_is_computed(models, wrong):
    with pytest.raises(PyargsError, match="num_candidates must be a whole number"):
        guide_of(models[1], ["ann"], num_candidates=wrong)


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
        rows, USERS, max_new_tokens=12, **asked, **({"temperature": 0.7} if sample else {})
    )
    got = policy.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=sample,
        **({"temperature": 0.7, "top_k": 5} if sample else {}),
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


# -- the string form of custom_generate, to which transformers hands all arguments ------------------------------------


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies the folder's code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def by_folder(models, asked, **how):
    policy, model = models
    how = {"users": ["ann", "bob"][: len(asked["input_ids"])], "reward_weight": 0.0, "num_candidates": 3} | how
    return policy.generate(**asked, custom_generate=FOLDER, trust_remote_code=True, reward_model=model, **how)


def test_the_folder_streams_to_the_streamer_of_generate(models):
    ours, theirs = Kept(), Kept()
    asked = usual([[5, 9, 7, 11]])
    want = models[0].generate(**asked, streamer=theirs)
    assert torch.equal(by_folder(models, asked | {"streamer": ours}), want)
    assert ours.put_ == theirs.put_ and ours.ended == theirs.ended == 1
    batch = Kept()
    assert by_folder(models, usual() | {"streamer": batch}).shape[0] == 2 and len(batch.put_) > 2


def test_the_folder_is_the_loop(models):
    asked = usual(repetition_penalty=1.3, do_sample=True, top_k=0)
    how = dict(reward_weight=[1.0, 2.0], num_candidates=5, seed=3)
    seen = []
    found = by_folder(models, asked, token_callback=seen.append, **how)
    assert torch.equal(found, guided(models, asked, **how)) and torch.equal(torch.stack(seen, 1), found[:, 5:])


@pytest.mark.parametrize("where", ["argument", "config", "checkpoint"])
def test_stop_strings_end_rows_as_in_generate(where):
    models, tokenizer = (tiny_lm(), reward_model(tiny_lm(seed=3))), tiny_tokenizer()
    strings = [tokenizer.decode([0]), tokenizer.decode([19])]
    plain = models[0].generate(**usual())
    asked = usual(tokenizer=tokenizer)
    if where == "argument":
        asked["stop_strings"] = strings
    elif where == "checkpoint":
        models[0].generation_config.stop_strings = strings
    else:
        names = "max_new_tokens", "do_sample", "pad_token_id", "eos_token_id"
        config = {name: asked.pop(name) for name in names}
        asked["generation_config"] = type(models[0].generation_config)(**config, stop_strings=strings)
    want = models[0].generate(**asked)
    assert torch.equal(by_folder(models, asked), want) and not torch.equal(want, plain)


def test_the_folder_refuses_what_a_callable_is_not_told_of(models):
    for name, value in {"assistant_model": models[0], "synced_gpus": True, "token_healing": True}.items():
        kept = Kept()
        with pytest.raises(PyargsError, match=name):
            by_folder(models, usual([[5, 9]]) | {name: value, "streamer": kept})
        assert kept.ended == 1
    with pytest.raises(PyargsError, match="pass tokenizer=, the policy's"):
        by_folder(models, usual(stop_strings=["a"]))


# -- policies as people have them -------------------------------------------------------------------------------------


def in_bfloat16():
    return tiny_lm(dtype=torch.bfloat16)


def in_train_mode():
    return tiny_lm().train()


def with_gradient_checkpointing():
    policy = tiny_lm().train()
    policy.gradient_checkpointing_enable()
    return policy


def of_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    policy = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return policy.eval()


def compiled_around():
    return torch.compile(tiny_lm(), backend="eager", dynamic=True)


def compiled_forward():
    policy = tiny_lm()
    policy.forward = torch.compile(policy.forward, backend="eager", dynamic=True)
    return policy


def with_a_device_map():
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    policy = dispatch_model(tiny_lm(), {"": "cpu"})
    for layer in policy.model.layers:  # what a map over several devices puts there
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    return policy


POLICIES = {
    one.__name__: one
    for one in (
        in_bfloat16, in_train_mode, with_gradient_checkpointing, of_peft, compiled_around, compiled_forward, with_a_device_map,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore")
def test_without_a_weight_a_policy_of_any_kind_is_generate(name):
    """Each answers as `generate` has it answer, with a processor and without."""
    policy, model = POLICIES[name](), reward_model(tiny_lm(seed=3))
    if without_cache(policy):  # an older transformers, whose `generate` fails there, too
        with pytest.raises(PyargsError, match="gradient checkpointing drops the cache"):
            guided((policy, model), usual())
        return
    plain = tiny_lm() if name.startswith("compiled") else policy  # compiling for both loops takes long
    for asked in (usual(max_new_tokens=4), usual(max_new_tokens=4, no_repeat_ngram_size=1)):
        assert torch.equal(guided((policy, model), asked), plain.generate(**asked))
    assert not torch.equal(guided((policy, model), asked, reward_weight=9.0), plain.generate(**asked))


def test_a_policy_that_drops_at_random_is_refused():
    policy = tiny_lm("gpt2").train()
    with pytest.raises(PyargsError, match="drops numbers at random, as in training: call eval"):
        guided((policy, reward_model(tiny_lm("gpt2", seed=3))), usual())
