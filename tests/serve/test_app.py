"""The service over a real server, asked by OpenAI's own client: every answer is the one that the same request gets alone."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import httpx
import openai
import pytest
import serving
from serving import MODEL, messages

from pyargs.decode.request import numbered
from pyargs.serve.metrics import Metrics
from pyargs.serve.wire import CHOICES

HELLO = "Hello you"


@pytest.fixture(scope="module")
def service(lm_folder):
    """(worker, address)"""
    with serving.service(serving.engine(lm_folder, max_rows=4)) as both:
        yield both


@pytest.fixture(scope="module")
def alone(lm_folder):
    """Answers of an engine that has nothing else to do."""
    guided, free = serving.engine(lm_folder, max_rows=1), serving.engine(lm_folder, guided=False, max_rows=1)

    def answer(prompt, user="", **wish):
        wish = {"temperature": 1.0, "max_new_tokens": 12} | wish
        if "seed" in wish:
            wish["seed"] = [wish["seed"]]
        engine = guided if user or wish.get("temperature") else free  # a free row's k candidates are those of a guided one
        if engine is guided and not user:
            user, wish = "ann", wish | {"reward_weight": 0.0}
        return engine.generate([prompt], [user], **wish)[0]

    return answer


@pytest.fixture
def client(service):
    return serving.client(service[1])


def ask(client, text=HELLO, **more):
    """A chat's answer. More of pyargs' own fields go into `extra_body`."""
    names = "strength", "reward_weight", "reward_clip", "num_candidates", "min_p"
    own = {name: more.pop(name) for name in names if name in more}
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages(text), "max_tokens": 12, "extra_body": own} | more
    )


def test_a_chat_is_the_answer_alone(client, alone):
    for user in ("ann", "bob"):
        for more in (
            {},
            {"temperature": 0.0},
            {"top_p": 0.5, "min_p": 0.1},
            {"strength": 2.5},
            {"reward_weight": 3.0, "num_candidates": 4},
            {"reward_weight": 3.0, "reward_clip": 0.2, "min_p": 0.1, "temperature": 0.0},
        ):
            found = ask(client, user=user, seed=5, **more)
            want = alone(messages(HELLO), user, seed=numbered(5, 0), **more)
            (choice,) = found.choices
            assert choice.message.content == want.text and choice.message.role == "assistant"
            assert choice.finish_reason == want.finish_reason and found.model == MODEL
            assert choice.pyargs["rewards"] == want.rewards and choice.pyargs["slots"] == want.slots
            assert choice.pyargs["reward_weight"] == want.reward_weight and choice.pyargs["backend"] == "cpu"
            assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(want.prompt), len(want.tokens))


def test_without_a_user_it_is_the_policy_alone(client, alone):
    for user in (openai.NOT_GIVEN, ""):
        for temperature in (0.0, 0.8):
            found = ask(client, user=user, seed=5, temperature=temperature).choices[0]
            assert found.message.content == alone(messages(HELLO), seed=numbered(5, 0), temperature=temperature).text
            assert found.pyargs == {"rewards": None, "slots": None, "reward_weight": None, "backend": "cpu"}


def test_several_answers_have_seeds_by_number(client, alone):
    several = ask(client, user="cid", seed=7, n=3).choices
    assert [choice.index for choice in several] == [0, 1, 2]
    assert [choice.message.content for choice in several] == [
        alone(messages(HELLO), "cid", seed=numbered(7, i)).text for i in range(3)
    ]
    assert len({choice.message.content for choice in several}) > 1


def test_a_stream_tells_the_same(client):
    for more in ({}, {"user": "ann"}, {"user": "ann", "n": 2}):
        whole = ask(client, seed=4, **more)
        parts = list(ask(client, seed=4, stream=True, stream_options={"include_usage": True}, **more))
        assert parts[-1].choices == [] and parts[-1].usage.model_dump() == whole.usage.model_dump()
        assert all(part.usage is None for part in parts[:-1]) and len({part.id for part in parts}) == 1
        for choice in whole.choices:
            mine = [one for part in parts for one in part.choices if one.index == choice.index]
            assert "".join(one.delta.content or "" for one in mine) == choice.message.content
            assert mine[0].delta.role == "assistant" and [one.finish_reason for one in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == choice.finish_reason
            told = [reward for one in mine if one.pyargs for reward in one.pyargs["rewards"] or ()]
            assert told == (choice.pyargs["rewards"] or [])
            assert mine[-1].pyargs["backend"] == "cpu"
    assert parts[-1].usage and next(iter(ask(client, stream=True))).usage is None


def test_completions_read_a_text_as_it_is(client, alone, service):
    tokenizer = service[0].engine.pair.tokenizer
    ids = tokenizer(HELLO)["input_ids"]
    want = tokenizer.decode(alone(ids, "ann", seed=numbered(1, 0)).tokens, skip_special_tokens=True)
    for prompt in (HELLO, ids):
        found = client.completions.create(model=MODEL, prompt=prompt, user="ann", seed=1, max_tokens=12)
        assert found.object == "text_completion" and found.choices[0].text == want
    both = client.completions.create(model=MODEL, prompt=[HELLO, "One two"], user="ann", seed=1, max_tokens=12, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.choices[0].text == want
    other = alone(tokenizer("One two")["input_ids"], "ann", seed=numbered(1, 2)).tokens
    assert both.choices[2].text == tokenizer.decode(other, skip_special_tokens=True)
    assert both.usage.prompt_tokens == len(ids) + len(tokenizer("One two")["input_ids"])
    parts = list(client.completions.create(model=MODEL, prompt=HELLO, user="ann", seed=1, max_tokens=12, stream=True))
    assert "".join(part.choices[0].text for part in parts) == want


def test_stop_strings_end_an_answer_wherever_tokens_end(client, alone):
    text = alone(messages(HELLO), "bob", seed=numbered(2, 0), max_new_tokens=40).text
    for start in range(3, len(text) - 4, 9):
        stop = text[start : start + 3]
        want = text[: text.find(stop)].strip()
        found = ask(client, user="bob", seed=2, max_tokens=40, stop=["never there", stop])
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (want, "stop")
        assert len(found.choices[0].pyargs["rewards"]) == found.usage.completion_tokens <= 40
        parts = list(ask(client, user="bob", seed=2, max_tokens=40, stop=stop, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == want
        assert parts[-1].choices[0].finish_reason == "stop"


def test_many_at_once_are_each_as_if_alone(service, alone):
    """More clients than rows; some are refused, some leave."""

    async def one(client, i):
        await asyncio.sleep(0.003 * i)
        text, user = " ".join(["one", "two"] * (1 + i % 5)), [*serving.USERS, ""][i % 4]
        kind = i % 6
        if kind == 4:
            with pytest.raises(openai.NotFoundError):
                await ask(client, text, user="nobody")
            return None
        if kind == 5:
            stream = await ask(client, text, user=user, max_tokens=500, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return None
        more = dict(user=user, seed=i, max_tokens=5 + i)
        if kind == 3:
            parts = [part async for part in await ask(client, text, stream=True, **more)]
            said = "".join(part.choices[0].delta.content or "" for part in parts)
        else:
            said = (await ask(client, text, **more)).choices[0].message.content
        return said, (messages(text), user, dict(seed=numbered(i, 0), max_new_tokens=5 + i))

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{service[1]}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(24)))

    for said, (prompt, user, wish) in filter(None, asyncio.run(all_of_them())):
        assert said == alone(prompt, user, **wish).text
    asyncio.run(idle(service[0]))


async def idle(worker) -> None:
    for _ in range(2000):
        if not worker.open:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests are left")


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_is_cancelled_within_a_step(service, stream):
    worker, address = service
    steps = []
    worker.on_step, before = steps.append, worker.on_step

    async def leave():
        async with httpx.AsyncClient(base_url=address) as client:
            body = {"model": MODEL, "messages": messages(HELLO), "user": "ann", "max_tokens": 1900, "stream": stream, "n": 2}
            with pytest.raises(httpx.ReadTimeout):
                async with client.stream("POST", "/v1/chat/completions", json=body, timeout=0.5) as answer:
                    async for _ in answer.aiter_bytes():
                        if len(steps) > 20:
                            raise httpx.ReadTimeout("enough")
        await idle(worker)

    try:
        asyncio.run(leave())
    finally:
        worker.on_step = before
    assert len(steps) < 1500, "it was not computed to its end"


@pytest.mark.parametrize(
    ("more", "error", "param"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model"),
        ({"user": "nobody"}, openai.NotFoundError, "user"),
        ({"max_tokens": 5000}, openai.BadRequestError, "messages"),
        ({"messages": messages("long " * 3000)}, openai.BadRequestError, "messages"),
        ({"strength": 1.0}, openai.UnprocessableEntityError, "strength"),
        ({"user": "ann", "strength": 1.0, "reward_weight": 1.0}, openai.UnprocessableEntityError, None),
        ({"user": "ann", "num_candidates": 100}, openai.UnprocessableEntityError, None),
        ({"user": "ann", "num_candidates": "all"}, openai.UnprocessableEntityError, None),
        ({"reward_weight": 1e39, "user": "ann"}, openai.UnprocessableEntityError, None),
        ({"n": CHOICES + 1}, openai.UnprocessableEntityError, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.UnprocessableEntityError, "tools"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openai_s_shape(client, more, error, param):
    with pytest.raises(error) as raised:
        ask(client, **more)
    assert set(raised.value.body) == {"message", "type", "param", "code"} and raised.value.body["param"] == param


def test_bodies_that_are_no_bodies(service):
    def post(content, kind="application/json"):
        answer = httpx.post(f"{service[1]}/v1/chat/completions", content=content, headers={"content-type": kind})
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code

    half = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "\ud800"}]}).encode()
    assert post(half) == 422
    assert [post(b"{"), post(b"\xff\xfe"), post(b"[" * 10_000), post(b"1" * 5000)] == [400] * 4
    assert [post(b"[]"), post(b"{}"), post(b"null"), post(b"{}", "text/plain")] == [422] * 4
    assert post(b" " * (2**20 + 1)) == 413
    assert httpx.get(f"{service[1]}/nope").json()["error"]["message"] == "there is no such path here"
    assert httpx.get(f"{service[1]}/v1/completions").status_code == 405
    assert httpx.head(f"{service[1]}/v1/completions").status_code == 405
    other = httpx.get(f"{service[1]}/health", headers={"host": "other.example"})
    assert other.status_code == 400 and set(other.json()["error"]) == {"message", "type", "param", "code"}


def test_head_is_get_without_a_body(service):
    for path in ("/", "/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}"):
        got, head = httpx.get(service[1] + path), httpx.head(service[1] + path)
        assert (got.status_code, head.status_code, head.content) == (200, 200, b"") and got.content
        assert head.headers["content-type"] == got.headers["content-type"]
    assert httpx.head(f"{service[1]}/nope").status_code == 404


def test_an_answer_s_message_comes_back_and_the_talk_goes_on(client, alone):
    first = ask(client, user="ann", seed=1).choices[0].message
    said = [*messages(HELLO), first, {"role": "user", "content": "One two", "name": "Ann"}]
    plain = [*messages(HELLO), {"role": "assistant", "content": first.content}, *messages("One two")]
    want = alone(plain, "ann", seed=numbered(2, 0)).text
    assert ask(client, messages=said, user="ann", seed=2).choices[0].message.content == want


def test_an_answer_that_has_begun_goes_on_exactly(client, alone, service):
    """With the white space that the model writes: what was begun and the answer are one text."""
    tokenizer, found = service[0].engine.pair.tokenizer, []
    for seed in range(12):
        begun = [*messages(HELLO), {"role": "assistant", "content": "One two"}]
        want = alone(begun, "ann", seed=numbered(seed, 0), max_new_tokens=4).tokens
        wish = dict(messages=begun, user="ann", seed=seed, max_tokens=4)
        found.append(ask(client, **wish).choices[0].message.content)
        streamed = "".join(part.choices[0].delta.content or "" for part in ask(client, stream=True, **wish))
        assert streamed == found[-1] == tokenizer.decode(want, skip_special_tokens=True)
    assert any(text != text.lstrip() for text in found)


def test_a_stream_is_for_no_cache_and_no_proxy_s_buffer(service):
    body = {"model": MODEL, "messages": messages(HELLO), "max_tokens": 2, "stream": True}
    told = httpx.post(f"{service[1]}/v1/chat/completions", json=body).headers
    assert "no-cache" in told["cache-control"] and told["x-accel-buffering"] == "no"


def test_more_answers_than_there_is_room_for_are_refused_for_good(lm_folder):
    """429 would have a client come back for ever."""
    with serving.service(serving.engine(lm_folder, max_rows=1), max_waiting=1) as (_, address):
        with pytest.raises(openai.UnprocessableEntityError, match="room for 2 answers") as raised:
            ask(serving.client(address), n=3)
        assert raised.value.body["param"] == "n"
        assert len(ask(serving.client(address), n=2).choices) == 2


def test_models_and_health(client, service):
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert httpx.get(f"{service[1]}/health").json() == {"status": "ok"}


def test_a_full_queue_is_429_with_a_time(lm_folder):
    with serving.service(serving.engine(lm_folder, max_rows=1), max_waiting=1) as (worker, address):
        client = serving.client(address)
        first = ask(client, stream=True, n=2, max_tokens=1900)
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as full:
            ask(client)
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60 and full.value.body["code"] == "queue_full"
        first.close()
        asyncio.run(idle(worker))
        assert ask(client).choices


def test_a_failed_step_is_an_error_of_its_answers(lm_folder, monkeypatch):
    engine = serving.engine(lm_folder)
    real, calls = engine._next, []

    def third():
        calls.append(1)
        if len(calls) in (3, 6):
            raise RuntimeError("a secret of somebody")
        return real()

    monkeypatch.setattr(engine, "_next", third)
    with serving.service(engine) as (_, address):
        client = serving.client(address)
        with pytest.raises(openai.InternalServerError) as whole:
            ask(client, user="ann")
        with pytest.raises(openai.APIError) as stream:
            list(ask(client, user="ann", stream=True))
        assert "secret" not in str(whole.value) + str(stream.value)
        assert ask(client, user="ann").choices
        assert httpx.get(f"{address}/health").status_code == 200


class Key:
    def __init__(self, *users, admin=False):
        self.users, self.admin = users, admin

    def may(self, user):
        return self.admin or user in self.users

    def among(self, users):
        return users if self.admin else [user for user in self.users if user in users]


class Keys:
    keys = {"of-ann": Key("ann"), "of-all": Key(admin=True)}

    def find(self, token):
        return self.keys.get(token)


def test_a_key_sees_its_users_alone(lm_folder):
    with serving.service(serving.engine(lm_folder), keys=Keys()) as (_, address):
        clients = {
            name: openai.OpenAI(base_url=f"{address}/v1", api_key=name, max_retries=0) for name in ("of-ann", "of-all", "none")
        }
        assert ask(clients["of-ann"], user="ann").choices and ask(clients["of-all"], user="bob").choices
        errors = []
        for user in ("bob", "bot"):  # one of them is there
            with pytest.raises(openai.NotFoundError) as raised:
                ask(clients["of-ann"], user=user)
            errors.append(raised.value.body)
        assert errors[0] == errors[1] and "bob" not in str(errors)
        with pytest.raises(openai.NotFoundError, match="Did you mean: ann"):
            ask(clients["of-ann"], user="anna")
        for asked in (lambda one: ask(one), lambda one: one.models.list()):
            with pytest.raises(openai.AuthenticationError):
                asked(clients["none"])
        found = {
            name: httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {name}"}).status_code for name in clients
        }
        assert found == {"of-ann": 403, "of-all": 200, "none": 401}
        assert httpx.get(f"{address}/health", headers={"host": "other.example"}).status_code == 200


def test_a_stream_that_somebody_ends_is_not_counted_as_answered(lm_folder):
    """Whether the client closes it, or the service by refreshing its engine. The status was 200 before."""
    counted = Metrics()

    def outcomes() -> dict[str, float]:
        (family,) = [one for one in counted.registry.collect() if one.name == "pyargs_requests"]
        return {one.labels["outcome"]: one.value for one in family.samples if one.name.endswith("_total")}

    def until(want: dict[str, float]) -> None:
        end = time.monotonic() + 20
        while outcomes() != want:
            assert time.monotonic() < end, outcomes()
            time.sleep(0.01)

    with serving.service(serving.engine(lm_folder), metrics=counted) as (worker, address):
        client = serving.client(address)
        stream = ask(client, stream=True, max_tokens=1900)
        next(iter(stream))
        stream.close()
        until({"gone": 1})
        with pytest.raises(openai.APIError, match="ended this answer"):
            for number, _ in enumerate(ask(client, stream=True, max_tokens=1900)):
                if number == 3:
                    worker.call(lambda engine: engine.refresh()).result()
        until({"gone": 1, "failed": 1})
        ask(client)
        until({"gone": 1, "failed": 1, "ok": 1})


def test_lines_and_metrics_tell_no_user_and_no_text(service, client, caplog):
    with caplog.at_level(logging.INFO, "pyargs.serve"):
        ask(client, "a very private text", user="ann", seed=1)
        with pytest.raises(openai.NotFoundError):
            ask(client, user="somebody-else")
        until = time.monotonic() + 20  # a line is written behind its answer
        while (
            len(of_service := [one for one in caplog.records if one.name == "pyargs.serve"]) < 2 and time.monotonic() < until
        ):
            time.sleep(0.01)
    lines = [json.loads(record.getMessage()) for record in of_service]
    assert [line["outcome"] for line in lines] == ["ok", "refused"] and lines[0]["completion_tokens"] == 12
    assert {"time", "method", "path", "status", "seconds", "prompt_tokens", "first_token"} <= set(lines[0])
    metrics = httpx.get(f"{service[1]}/metrics").text
    assert not any(word in caplog.text.split("HTTP Request")[0] + metrics for word in ("private", "ann", "somebody"))
    for name in (
        "requests_total",
        "tokens_total",
        "rows",
        "waiting",
        "step_seconds",
        "first_token_seconds",
        "between_tokens_seconds",
    ):
        assert f"\npyargs_{name}" in metrics
