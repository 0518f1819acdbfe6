"""OpenAI's bodies: what is taken, what is refused by name, and the shape of errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from pyargs.serve import wire
from pyargs.serve.wire import Chat, Completion, Form, WireError, of_validation

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": "m", "prompt": "Hello"}


def refused(kind, **fields) -> WireError:
    """The error that a body with these fields gets, as the service makes it."""
    with pytest.raises((WireError, ValidationError)) as raised:
        kind.model_validate((CHAT if kind is Chat else TEXT) | fields)
    if isinstance(raised.value, WireError):
        return raised.value
    return of_validation([{**one, "loc": ("body", *one["loc"])} for one in raised.value.errors()])


@pytest.mark.parametrize("name", sorted(wire.IGNORED))
def test_fields_that_change_no_answer_are_taken(name):
    assert Chat.model_validate(CHAT | {name: {"any": "thing"}}) == Chat.model_validate(CHAT)


@pytest.mark.parametrize("name", wire.NEUTRAL)
def test_what_is_not_done_is_refused_by_name_unless_it_asks_for_nothing(name):
    for value in (None, *wire.NEUTRAL[name]):
        assert Chat.model_validate(CHAT | {name: value}) == Chat.model_validate(CHAT)
    error = refused(Chat, **{name: "else"})
    assert (error.status, error.param, error.code) == (422, name, "unsupported_parameter") and name in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "annotations": [{}]}]}, "messages[0].annotations"),
        ({"messages": [{"role": "user", "content": []}, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"reward_clip": 0}, "reward_clip"),
        ({"strength": float("inf")}, "strength"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": wire.CHOICES + 1}, "n"),
        ({"user": "a" * 129}, "user"),
        ({"user": "a\nb"}, "user"),
        ({"user": 5}, "user"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b" * 129]}, "stop[1]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"else": True}}, "stream_options.else"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"foo": 1}, "foo"),
    ],
)
def test_a_wrong_field_is_named(fields, param):
    error = refused(Chat, **fields)
    assert error.status == 422 and error.param.startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 4}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields, param):
    error = refused(Completion, **fields)
    assert error.status == 422 and error.param.startswith(param)


def test_an_answer_s_message_may_come_back():
    back = {"role": "assistant", "content": "Hi", "refusal": None, "audio": None, "function_call": None, "name": "Bo"}
    for more in ({"tool_calls": None, "annotations": None}, {"tool_calls": [], "annotations": []}):
        body = Chat.model_validate(CHAT | {"messages": [*CHAT["messages"], back | more]})
        assert body.messages[1].plain() == {"role": "assistant", "content": "Hi"}
    dumped = ChatCompletionMessage(role="assistant", content="Hi", annotations=[], tool_calls=[]).model_dump()
    assert Chat.model_validate(CHAT | {"messages": [dumped]}).messages[0].plain() == {"role": "assistant", "content": "Hi"}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        Chat.model_validate(CHAT | {"messages": [{"role": "user", "content": parts}]}).messages[0].plain()["content"] == "ab"
    )


def test_prompts_of_a_completion():
    for prompt, several in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])):
        assert Completion.model_validate(TEXT | {"prompt": prompt}).prompts == several


def test_errors_have_openai_s_shape_and_none_of_the_body():
    error = refused(Chat, messages=[{"role": "user", "content": {"secret": "words"}}])
    assert set(error.body()) == {"error"} and set(error.body()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in json.dumps(error.body())
    kinds = {status: WireError(status, "x").body()["error"]["type"] for status in (400, 401, 403, 404, 422, 429, 500, 503)}
    assert kinds == {
        **dict.fromkeys((400, 404, 422), "invalid_request_error"),
        **{401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"},
        **dict.fromkeys((500, 503), "server_error"),
    }


@given(st.text())
def test_an_event_of_a_stream_is_one_line(text):
    form = Form("m", chat=True)
    sent = form.chunk([form.delta(0, text, None, None, None)])
    assert sent.startswith(b"data: ") and sent.endswith(b"\n\n") and sent.count(b"\n") == 2
    assert json.loads(sent[6:])["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize("prompt", [[], "", [[]], [[1], []], ["a", ""]])
def test_a_prompt_without_a_token_is_refused(prompt):
    with pytest.raises(WireError, match="without a token"):
        Completion(model="m", prompt=prompt)


def test_the_first_wrong_part_of_a_long_body_is_enough():
    with pytest.raises(ValidationError) as caught:
        Completion(model="m", prompt=[0] * 50_000 + ["a"] * 50_000)
    assert caught.value.error_count() < 10
    with pytest.raises(ValidationError) as caught:
        Chat(model="m", messages=[{"role": "user", "content": [{}] * 50_000}])
    assert caught.value.error_count() < 10
