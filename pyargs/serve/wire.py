"""OpenAI's wire format: the bodies of requests and answers, and errors. What is not done is refused by name."""

from __future__ import annotations

import json
import re
import time
import unicodedata
import uuid
from typing import Annotated, Any, Literal

from pyargs.errors import extra, one_line

with extra("serve", "the service"):
    from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, StringConstraints, model_validator

CHOICES = 16
"""The most answers of one call, all its prompts together."""
IGNORED = {
    *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prompt_cache_options", "parallel_tool_calls", "prediction"),
}
"""Fields of OpenAI that change no answer: they are taken and not read."""
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields of OpenAI that are not done, with the values that ask for nothing. null is one of these everywhere."""


def _printed(name: str) -> str:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise ValueError("it holds a control character")
    return name


Name = Annotated[str, StringConstraints(max_length=128), AfterValidator(_printed)]
UserId = Annotated[Name, StringConstraints(min_length=1)]
"""The id of a user: 1 to 128 characters, none of them a control character."""
Stop = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class First(FailFast):
    """The first wrong part of a list is enough: a body may have a hundred thousand. A union wants a hash of its parts."""

    __hash__ = object.__hash__


FIRST = First()
Ids = Annotated[list[int], FIRST]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FIRST]
    name: str | None = None  # of who speaks: no chat template here writes it

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        """Without what an answer's message says of things that are not there: null, or none in a list."""
        own = cls.model_fields
        return (
            {name: value for name, value in data.items() if value is not None and (name in own or value != [])}
            if isinstance(data, dict)
            else data
        )

    def plain(self) -> dict:
        """As `pyargs.lm.tokenize` takes it."""
        content = self.content
        return {"role": self.role, "content": content if isinstance(content, str) else "".join(part.text for part in content)}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is padded in either case


class Asked(BaseModel):
    """What both calls have. strength, reward_weight, reward_clip, num_candidates, min_p are ours, as of `Engine.submit`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    user: Name | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Finite | None = Field(None, ge=0)
    top_p: Finite | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], FIRST] | None = Field(None)
    n: int | None = Field(None, ge=1, le=CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strength: Finite | None = None
    reward_weight: Finite | None = None
    reward_clip: Finite | None = Field(None, gt=0)
    num_candidates: int | Literal["all"] | None = None
    min_p: Finite | None = Field(None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if (value := data.get(name)) is not None and value not in neutral:
                only = f", only {json.dumps(neutral[0])}" if neutral else ""
                said = f"'{name}' is not done here{only}: leave it out"
                raise WireError(422, said, param=name, code="unsupported_parameter")
        return {name: value for name, value in data.items() if name not in NEUTRAL and name not in IGNORED}

    @model_validator(mode="after")
    def _fits_together(self):
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise WireError(422, "stop: at most 4 strings", param="stop")
        if self.stream_options is not None and not self.stream:
            raise WireError(422, "stream_options is for stream: true", param="stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Chat(Asked):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], FIRST] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_limit(self):
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise WireError(422, "max_tokens and max_completion_tokens are one thing: give one of them", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise WireError(422, "top_logprobs is for logprobs: true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def candidates_told(self) -> int | None:
        """How many candidates of each token are told; None where no log-probs are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Asked):
    """The body of POST /v1/completions. A prompt is read as it is, without a chat template."""

    prompt: str | Ids | Annotated[list[str], FIRST] | Annotated[list[Ids], FIRST]
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _few(self):
        if not self.prompt or not all(self.prompts):
            raise WireError(422, "prompt: without a token there is nothing to go on with", param="prompt")
        if len(self.prompts) * (self.n or 1) > CHOICES:
            raise WireError(422, f"prompts times n is at most {CHOICES}", param="n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def candidates_told(self) -> int | None:
        return self.logprobs


# -- errors ------------------------------------------------------------------------------------------------------------

KIND = re.compile(r"str|int|float|bool|constrained-.*|list\[.*|literal\[.*|function-.*|[A-Z]\w*")
"""What pydantic says in a place of the kind that it tried there."""
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class WireError(Exception):
    """What a client gets in the place of an answer: a status, and OpenAI's object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict | None = None
    ):
        message, param = one_line(message), param and one_line(param)  # which may be names of the body
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unknown_user(hint: str = "") -> WireError:
    """The same for a user who is not there and for one whom the key may not see."""
    return WireError(404, "there is no such user here." + hint, param="user", code="user_not_found")


def of_validation(errors: list[dict]) -> WireError:
    """The first of pydantic's errors, without the value that it found; of the kinds that a field may have, the one that fits
    furthest."""
    of_field = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    error = max(of_field, key=lambda one: len(one["loc"]))
    if error["type"] == "json_invalid":
        return WireError(400, "the body is not JSON", code="invalid_json")
    if error["type"] == "model_attributes_type" and error["loc"] == ("body",):
        return WireError(422, "the body is a JSON object, sent with Content-Type: application/json", code="invalid_json")
    name = ""
    for part in error["loc"][1:]:  # the first one is "body", "path" or "query"
        if isinstance(part, int):
            name += f"[{part}]"
        elif not KIND.fullmatch(part):
            name += f".{part}" if name else part
    if error["type"] == "extra_forbidden":
        return WireError(422, f"there is no field '{name}' here: leave it out", param=name, code="unknown_parameter")
    return WireError(422, f"{name or 'the body'}: {error['msg']}", param=name or None, code="invalid_value")


# -- answers -----------------------------------------------------------------------------------------------------------

ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Form:
    """One of the two forms of an answer.

    chat: that of /v1/chat/completions. model: the name that answers say.
    """

    def __init__(self, model: str, *, chat: bool):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._begin = b"data: " + ENCODE(self._head("chat.completion.chunk" if chat else "text_completion"))[:-1].encode()

    def whole(self, choices: list[dict], usage: dict) -> dict:
        """The body of an answer that is not streamed."""
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, reason: str, logprobs: dict | None, ours: dict) -> dict:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason, "pyargs": ours}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> bytes:
        """An event of a stream."""
        return b'%s,"choices":%s,"usage":%s}\n\n' % (self._begin, ENCODE(choices).encode(), ENCODE(usage).encode())

    def delta(
        self, index: int, text: str | None, reason: str | None, logprobs: dict | None, ours: dict | None, *, first=False
    ) -> dict:
        """A choice of a chunk."""
        if self.chat:
            said = {"delta": {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}}
        else:
            said = {"text": text or ""}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason, "pyargs": ours}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(data: dict) -> bytes:
    return b"data: %s\n\n" % ENCODE(data).encode()


DONE = b"data: [DONE]\n\n"


def usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
