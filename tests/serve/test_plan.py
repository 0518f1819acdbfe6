"""What a call asks of an engine, for every kind of model, and which user it may name."""

from __future__ import annotations

import warnings

import pytest
import serving
from conftest import reward_model, tiny_lm
from decoding import engine_of
from serving import messages
from tokens import byte_level, sentencepiece

from pyargs.decode.engine import Engine
from pyargs.decode.request import numbered
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, raw_ids
from pyargs.models.demonstrations import Demonstrations
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import UserPolicy
from pyargs.serve import plan as plans
from pyargs.serve.keys import Key
from pyargs.serve.plan import TOKENS, plan, takes
from pyargs.serve.wire import Chat, Completion, WireError
from pyargs.serve.worker import add_nobody

HELLO = messages("Hello you")


@pytest.fixture(scope="module")
def pairs(lm_folder):
    """Of a policy and each kind of model, by its name."""
    policy, personal = serving.pair(lm_folder)
    add_nobody(personal.users)
    shown = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    demonstrations = Demonstrations(
        shots=1, retrieve="random", show="pair", content_tokens=50, demonstration_tokens=500, max_tokens=None,
        instruction="", seed=0, prompt_name="Prompt", response_name="Answer", of_user={"ann": shown},
    )  # fmt: skip
    models = {
        "personal": personal,
        "for everyone": TokenReward(load_lm(lm_folder)[0], policy.tokenizer),
        "none": None,
        "demonstrations": UserPolicy(policy, policy.tokenizer, demonstrations=demonstrations),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: Engine(None if isinstance(model, UserPolicy) else policy, model, backend="eager").pair
            for name, model in models.items()
        }


def chat(**fields):
    return Chat.model_validate({"model": "m", "messages": HELLO, **fields})


def completion(**fields):
    return Completion.model_validate({"model": "m", "prompt": "Hello you", **fields})


@pytest.mark.parametrize("name", ["personal", "for everyone", "none", "demonstrations"])
def test_what_a_model_is_said_to_take_is_what_it_takes(pairs, name):
    pair, said = pairs[name], takes(pairs[name])
    unit = {"reward_weight": 1.0} if pair.guided and "strength" not in said["fields"] else {}  # what is asked for by default
    assert not said["needs_user"]
    for field, value in {"strength": 1.0, "reward_weight": 1.0, "reward_clip": 1.0, "num_candidates": 3, "min_p": 0.1}.items():
        try:
            found = plan(pair, chat(user="ann", **({} if field == "strength" else unit) | {field: value}))
            pair.request(found.prompts[0], found.user, **found.wishes[0])
            taken = True
        except (WireError, PyargsError):
            taken = False
        assert taken == (field in said["fields"]), field


def test_seeds_and_prompts_of_several_answers(pairs):
    found = plan(pairs["personal"], completion(prompt=["one", "two three"], n=2, seed=5, user="ann", max_tokens=3))
    assert found.prompts[0] == found.prompts[1] != found.prompts[2] == found.prompts[3]
    assert [wish["seed"] for wish in found.wishes] == [numbered(5, i) for i in range(4)]
    assert all(wish["max_new_tokens"] == 3 and wish["temperature"] == 1.0 for wish in found.wishes)


def test_whose_reward_guides(pairs):
    personal, everyone = pairs["personal"], pairs["for everyone"]
    found = plan(personal, chat(user="ann", strength=2.0))
    assert found.user == "ann" and found.reward_weight == found.wishes[0]["reward_weight"] == personal.raw_weight(2.0, None)
    for body in (chat(), chat(user=""), chat(strength=0.0)):
        found = plan(personal, body)
        assert (found.user, found.reward_weight, found.wishes[0]["reward_weight"]) == ("", None, 0.0)
        assert "num_candidates" not in found.wishes[0]
    assert plan(personal, chat(temperature=0.0)).wishes[0]["num_candidates"] == 1
    assert plan(everyone, chat()).reward_weight is None and plan(everyone, chat(reward_weight=2.0)).reward_weight == 2.0
    assert plan(everyone, chat(user="anybody", reward_weight=2.0)).reward_weight == 2.0
    for name in ("none", "demonstrations"):
        found = plan(pairs[name], chat())
        assert found.reward_weight is None and "reward_weight" not in found.wishes[0]
    with pytest.raises(WireError, match="name the user"):
        plan(personal, chat(reward_weight=1.0))


def test_demonstrations_stand_in_the_prompt_of_their_user_alone(pairs):
    pair = pairs["demonstrations"]
    alone = encode_prompt(pair.tokenizer, HELLO)
    assert plan(pair, chat()).prompts == [alone]
    assert plan(pair, chat(user="ann")).prompts == [pair.encode(HELLO, "ann")] != [alone]
    with pytest.raises(WireError) as raised:
        plan(pair, completion(user="ann"))
    assert raised.value.status == 422


def test_an_answer_s_length(pairs):
    pair = pairs["personal"]
    assert plan(pair, chat()).wishes[0]["max_new_tokens"] == TOKENS
    assert plan(pair, chat(max_completion_tokens=7)).wishes[0]["max_new_tokens"] == 7
    most = 2048
    assert plan(pair, completion(prompt=[5] * (most - 3))).wishes[0]["max_new_tokens"] == 3
    for body in (completion(prompt=[5] * most), completion(prompt=[5] * (most - 3), max_tokens=4)):
        with pytest.raises(WireError) as raised:
            plan(pair, body)
        assert (raised.value.status, raised.value.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", ["personal", "none", "demonstrations"])
def test_what_has_no_chance_to_fit_is_refused_unread(pairs, name, monkeypatch):
    """A megabyte takes seconds to read, most of all where it holds the text of a special token again and again."""
    pair = pairs[name]
    text = (pair.tokenizer.eos_token * 2**20)[: 2**20]
    monkeypatch.setattr(plans, "raw_ids", None)
    monkeypatch.setattr(plans, "encode_prompt", None)
    for body in (completion(prompt=text), chat(messages=messages(text)), chat(messages=messages("a" * 2**10) * 2**10)):
        with pytest.raises(WireError, match="characters") as raised:
            plan(pair, body)
        assert (raised.value.status, raised.value.code) == (400, "context_length_exceeded")


def test_messages_that_are_too_long_for_the_reward_are_refused_and_not_cut(pairs):
    pair = pairs["personal"]
    pair.model.about["max_length"] = 20
    try:
        plan(pair, chat(user="ann"))
        with pytest.raises(WireError) as raised:
            plan(pair, chat(messages=messages("one two three " * 5), user="ann"))
        assert raised.value.code == "context_length_exceeded"
    finally:
        del pair.model.about["max_length"]


def test_the_text_of_a_special_token_is_text(pairs):
    pair = pairs["personal"]
    end = pair.tokenizer.eos_token
    assert pair.tokenizer.eos_token_id not in plan(pair, completion(prompt=f"a{end}b")).prompts[0]


KEY = Key("k", b"", False, frozenset({"bob", "new"}))


@pytest.mark.parametrize("user", ["ann", "nobody", "cid"])
def test_who_is_not_there_and_who_is_not_for_a_key_look_the_same(pairs, user):
    with pytest.raises(WireError) as raised:
        plan(pairs["personal"], chat(user=user), KEY)
    with pytest.raises(WireError) as other:
        plan(pairs["personal"], chat(user="zzzzz"), KEY)
    assert raised.value.body() == other.value.body() and raised.value.status == 404
    assert plan(pairs["personal"], chat(user="bob"), KEY).user == "bob"


def test_near_names_are_those_that_the_key_may_see(pairs):
    with pytest.raises(WireError, match="Did you mean: ann?"):
        plan(pairs["personal"], chat(user="anne"))
    with pytest.raises(WireError, match="There are: ann, bob, cid[.]"):  # not the one without a name
        plan(pairs["personal"], chat(user="x"))
    with pytest.raises(WireError) as raised:
        plan(pairs["personal"], chat(user="anne"), KEY)
    assert "ann" not in raised.value.message
    with pytest.raises(WireError, match="bob"):
        plan(pairs["personal"], chat(user="bobb"), KEY)


def test_a_reward_model_with_another_tokenizer_reads_the_same_messages():
    """In its own template; a text as it is; and ids by their text. What is too long is counted in its tokens."""
    policy, model = tiny_lm(vocab=len(byte_level())), reward_model(tiny_lm(vocab=len(sentencepiece()), seed=1))
    policy.tokenizer, model.tokenizer = byte_level(), sentencepiece()
    pair = engine_of(policy, model, backend="eager").pair
    more = dict(user="ann", reward_weight=1.0, max_tokens=5)
    asked = plan(pair, chat(**more, n=2))
    assert asked.prompts == [encode_prompt(byte_level(), HELLO)] * 2
    assert [wish["guide_prompt"] for wish in asked.wishes] == [encode_prompt(sentencepiece(), HELLO)] * 2
    (wish,) = plan(pair, completion(**more)).wishes
    assert wish["guide_prompt"] == raw_ids(sentencepiece(), "Hello you")
    assert "guide_prompt" not in plan(pair, completion(**more | {"prompt": [5, 6]})).wishes[0]
    request = pair.request(asked.prompts[0], asked.user, **asked.wishes[0])
    assert list(request.theirs) == encode_prompt(sentencepiece(), HELLO)
    model.about["max_length"] = len(request.theirs) - 1
    with pytest.raises(WireError, match=f"have {len(request.theirs)} tokens, and the reward was trained with"):
        plan(pair, chat(**more))
