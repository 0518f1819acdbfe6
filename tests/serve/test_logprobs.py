"""Log-probs in OpenAI's forms are the engine's."""

from __future__ import annotations

import pytest
import serving
from serving import MODEL, messages

from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode.answer import Candidate, Told
from pyargs.decode.request import numbered
from pyargs.serve.logprobs import LEAST, Said, of_chat, of_completion

TOKENIZER = tiny_tokenizer()


def test_the_two_forms_of_one_thing():
    half, word = TOKENIZER("é").input_ids[0], TOKENIZER("user").input_ids[0]
    told = Told(-0.5, [Candidate(word, -0.5, 2.0), Candidate(half, float("-inf"), None)])
    said = [Said(word, told, 0), Said(half, told, 4)]
    first, second = of_chat(TOKENIZER, said, 2)["content"]
    assert (first["token"], first["logprob"], bytes(first["bytes"])) == ("user", -0.5, b"user")
    assert bytes(second["bytes"]) == "é".encode()[:1]
    assert [(one["logprob"], one["reward"]) for one in first["top_logprobs"]] == [(-0.5, 2.0), (LEAST, None)]
    assert of_chat(TOKENIZER, said, 0)["content"][0]["top_logprobs"] == []
    found = of_completion(TOKENIZER, said, 1)
    assert found["tokens"] == ["user", "\ufffd"] and found["text_offset"] == [0, 4]
    assert found["top_logprobs"] == [{"user": -0.5}, {"\ufffd": -0.5, "user": -0.5}]
    assert of_completion(TOKENIZER, said, 0)["top_logprobs"] is None


@pytest.fixture(scope="module")
def service(lm_folder):
    with serving.service(serving.engine(lm_folder, max_rows=2)) as both:
        yield both


@pytest.mark.parametrize("user", ["ann", ""])
def test_a_service_tells_what_the_engine_tells(service, lm_folder, user):
    engine, client = serving.engine(lm_folder, max_rows=1), serving.client(service[1])
    wish = {} if user else {"reward_weight": 0.0}
    prompt = messages("Hello you")
    asked = dict(temperature=1.0, max_new_tokens=9, logprobs=5, seed=[numbered(4, 0)], **wish)
    (want,) = engine.generate([prompt], [user or "bob"], **asked)
    call = dict(model=MODEL, messages=prompt, user=user, seed=4, max_tokens=9, logprobs=True, top_logprobs=5)
    whole = client.chat.completions.create(**call).choices[0].logprobs.content
    parts = [part.choices[0] for part in client.chat.completions.create(**call, stream=True)]
    streamed = [one for part in parts if part.logprobs for one in part.logprobs.content]
    assert [one.logprob for one in whole] == [one.logprob for one in streamed] == [one.logprob for one in want.told]
    for one, told in zip(whole, want.told, strict=True):
        assert [each.logprob for each in one.top_logprobs] == [each.logprob for each in told.candidates]
        if user:
            assert [each.reward for each in one.top_logprobs] == [each.reward for each in told.candidates]
    text = client.completions.create(model=MODEL, prompt="Hello you", user=user, seed=4, max_tokens=9, logprobs=0).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) and text.logprobs.top_logprobs is None
    ascii_only = [i for i, token in enumerate(text.logprobs.tokens) if "\ufffd" not in token]
    for i in ascii_only[:1]:
        at = text.logprobs.text_offset[i]
        assert text.text[at : at + len(text.logprobs.tokens[i])] == text.logprobs.tokens[i]
    assert client.chat.completions.create(model=MODEL, messages=prompt, max_tokens=2).choices[0].logprobs is None
