"""Entry points that are asked in memory: bodies of requests, a running service, arguments of the ops."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import warnings
from pathlib import Path
from random import Random

import torch
from fuzz.guard import Violation
from fuzz.mutations import NUMBERS, json_value, some_bytes

from pyargs.errors import PyargsError

CHAT = {
    "model": "tiny", "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "Hello you"}],
    "user": "ann", "max_tokens": 3, "temperature": 0, "reward_weight": 1.5, "n": 1, "seed": 3, "top_p": 0.9, "stop": ["."],
}  # fmt: skip
PARTS = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "tell"}]}], "max_tokens": 2,
         "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
TEXT = {"model": "tiny", "prompt": ["Hello", "you"], "max_tokens": 2, "user": "bob", "strength": 0.5, "num_candidates": 4,
        "logprobs": 1, "min_p": 0.01}  # fmt: skip
IDS = {"model": "tiny", "prompt": [[3, 4], [5]], "max_tokens": 2, "temperature": 1.0, "seed": 7}
PAIRS = {"pairs": [{"prompt": "tell", "chosen": "cat", "rejected": "dog"}]}
BODIES = {"/v1/chat/completions": (CHAT, PARTS), "/v1/completions": (TEXT, IDS), "/v1/users/ann/pairs": (PAIRS,)}
MORE = (
    "<|im_end|>",
    "<|im_start|>system",
    "assistant",
    "user",
    "all",
    2**64 - 1,
    -(2**63),
    10**6,
    "\u202e",
    "\U0001f600" * 40,
)
NAMES = ("body", *CHAT, *PARTS, *TEXT, *PAIRS)


def body(random: Random) -> tuple[str, bytes]:
    """A path and a spoilt body for it."""
    path = random.choice(list(BODIES))
    valid = random.choice(BODIES[path])
    new = json.dumps(json_value(random, valid, MORE)).encode()
    return path, some_bytes(random, new) if random.random() < 0.1 else new


def bodies(own: Path, outside: Path):
    """From a body to what the engine would be asked."""
    import serving
    from pydantic import ValidationError

    from pyargs.data.synthetic import tiny_lm
    from pyargs.serve.plan import plan
    from pyargs.serve.users import Pairs
    from pyargs.serve.wire import Chat, Completion, WireError, of_validation

    engine = serving.engine(str(tiny_lm(own / "lm", layers=1, width=32, heads=2)), max_rows=4)
    kinds = dict(zip(BODIES, (Chat, Completion, Pairs), strict=True))

    def attempt(random: Random, said: list) -> None:
        path, new = body(random)
        said.append((path, new))
        try:
            value = json.loads(new)
        except (ValueError, RecursionError):
            raise PyargsError("the body is not JSON") from None
        try:
            asked = kinds[path].model_validate(value)
            if path.endswith("pairs"):
                for number, pair in enumerate(asked.pairs):
                    pair.plain(f"pairs[{number}]")
                return
            made = plan(engine.pair, asked)
        except ValidationError as error:
            raise refused(of_validation([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])) from None
        except WireError as error:
            raise refused(error) from None
        known = len(engine.pair.tokenizer)
        for ids, wish in zip(made.prompts, made.wishes, strict=True):
            if not (ids and all(type(one) is int for one in ids) and 0 < wish["max_new_tokens"] <= 2048):
                raise Violation(f"planned {ids[:5]} {wish}")
            if len(ids) + wish["max_new_tokens"] > 2048 or known < 1:
                raise Violation("more than the model has room for")
        if made.reward_weight is not None and not math.isfinite(made.reward_weight):
            raise Violation("a weight that is no number")

    return attempt, NAMES


def refused(error) -> PyargsError:
    """As the client gets it."""
    said = json.loads(json.dumps(error.body(), ensure_ascii=False).encode())["error"]
    if not 400 <= error.status < 500 or set(said) != {"message", "type", "param", "code"} or "Traceback" in said["message"]:
        raise Violation(f"{error.status} {said}")
    if len(said["message"]) > 2000 or "\n" in said["message"]:
        raise Violation(f"no line: {said['message'][:300]!r}")
    return PyargsError(f"the body is refused: {said['message']}"[:1500].replace("\n", " "))


def service(own: Path, outside: Path):
    """The whole service, from bytes to bytes: answers have OpenAI's form and numbers, refusals a reason."""
    import httpx
    import serving

    from pyargs.data.synthetic import tiny_lm
    from pyargs.serve.users import make_router

    engine = serving.engine(str(tiny_lm(own / "lm", layers=1, width=32, heads=2)), max_rows=4)
    worker = serving.Worker(engine)
    app = serving.make_app(worker, model="tiny", routers=[make_router(worker)])
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://localhost", timeout=None
    )
    ask = lambda method, path, **more: loop.run_until_complete(client.request(method, path, **more))  # noqa: E731
    plain = lambda: ask("POST", "/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]  # noqa: E731
    right, tried = plain(), 0
    odd = ("ann", "a/b", "%00", "%ff", "..", "%2e%2e/x", "é", "x" * 300, "", "%ed%a0%80", "a\u202eb")

    def attempt(random: Random, said: list) -> None:
        nonlocal tried
        path, new = body(random)
        method, headers = "POST", {"content-type": "application/json"}
        if random.random() < 0.15:
            user = random.choice(odd)
            path = random.choice((f"/v1/users/{user}", f"/v1/users/{user}/pairs", f"/v1/jobs/{user}", f"/v1/models/{user}",
                                  f"/v1/users?limit={random.choice(NUMBERS)}&after={user}", "/health"))  # fmt: skip
            method = random.choice(("GET", "GET", "DELETE", "HEAD", "PUT", "POST"))
        if random.random() < 0.05:
            headers = random.choice(({}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=utf-16"},
                                     {**headers, "content-length": "7"}, {**headers, "host": "evil"}))  # fmt: skip
        if random.random() < 0.01:
            new = random.choice((b"[" * 100_000, b"9" * 6000, b" " * (2**20 + 1), b'{"a":' * 50_000, b"\xff\xfe"))
        said.append((method, path, headers, new[:400]))
        answer = ask(method, path, content=None if method in ("GET", "HEAD") else new, headers=headers)
        tried += 1
        if tried % 200 == 0 and plain() != right:
            raise Violation("a plain request is answered otherwise now")
        if answer.status_code >= 400:
            if answer.status_code >= 500:
                raise Violation(f"{answer.status_code} {answer.text[:300]}")
            told = "HEAD" if method == "HEAD" else answer.json()["error"]["message"]
            if not told or len(told) > 2000 or "\n" in told:
                raise Violation(f"no line: {told[:300]!r}")
            raise PyargsError(f"the body: {told}"[:1500])
        if "json" in answer.headers.get("content-type", "") and method != "HEAD":
            json.loads(answer.content, parse_constant=no_number)
        elif "event-stream" in answer.headers.get("content-type", ""):
            events = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
            for one in events[:-1]:
                if "error" in json.loads(one, parse_constant=no_number):
                    raise Violation(f"the answer broke off: {one[:200]}")
            if events[-1] != "[DONE]":
                raise Violation("the answer has no end")

    return attempt, NAMES


def no_number(name: str):
    raise Violation(f"{name} in an answer")


# -- ops ---------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
          torch.complex64)  # fmt: skip
PLAIN = (
    None,
    -1,
    0,
    1,
    2,
    64,
    65,
    2**31,
    2**40,
    2**63 - 1,
    10**30,
    2.5,
    float("nan"),
    float("inf"),
    "relu",
    "x",
    [],
    (),
)
REFUSES = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, OverflowError)


def ops(own: Path, outside: Path):
    """Each op with spoilt arguments: it refuses them, and so does its reference; or both give the same."""
    from scored import problem, random_logits
    from states import state_of

    from pyargs import ops as all_ops

    scored = problem(bias=True)
    step = {name: scored[name] for name in ("features", "weight", "user", "logprobs", "ids", "bias")}
    two = {"logits": random_logits(3, 50), "reward_logits": random_logits(3, 50, seed=1)}
    heads = {
        name: torch.randn(2, count, length, 8) for name, count, length in (("query", 4, 3), ("key", 2, 9), ("value", 2, 9))
    }
    right = {
        "score_select": {**scored, "scale": 0.5, "pad_id": 0, "stop": torch.tensor([3, 4])},
        "score_step": {**step, "state": state_of(3)},
        "tokenwise_select": {**two, "reward_weight": torch.ones(3), "finished": torch.zeros(3, dtype=torch.bool), "k": 5},
        "tokenwise_step": {**two, "k": 5, "state": state_of(3)},
        "topk_logprobs": {"logits": two["logits"], "k": 5},
        "user_mlp": {"hidden": torch.randn(3, 4, 8), "bank": torch.randn(5, 6, 8), "user": torch.tensor([0, 4, 2])},
        "commit": {"states": [torch.randn(3, 2, 9, 4) for _ in range(2)], "slot": torch.tensor([0, 2, -1]),
                   "length": torch.tensor([3, 5, 1])},
        "branch_attention": {**heads, "length": torch.tensor([2, 5]), "scale": 0.3},
    }  # fmt: skip

    def attempt(random: Random, said: list) -> None:
        name = random.choice(list(right))
        arguments = copy.deepcopy(right[name])
        for _ in range(random.choice((1, 1, 2))):
            part = random.choice(list(arguments))
            if part == "state":
                fields = arguments["state"]._asdict()
                field = random.choice(list(fields))
                new = other(random, fields[field])
                arguments["state"] = arguments["state"]._replace(**{field: new})
                said.append((name, field, shown(new)))
            else:
                arguments[part] = other(random, arguments[part])
                said.append((name, part, shown(arguments[part])))
        found = [called(getattr(all_ops, f), copy.deepcopy(arguments)) for f in (name, f"{name}_reference")]
        if isinstance(found[0], BaseException) or isinstance(found[1], BaseException):
            if not all(isinstance(one, BaseException) for one in found):
                raise Violation(f"{name}: {found[0]!r:.200} is not {found[1]!r:.200}")
            raise PyargsError(f"refused: {found[0]}")
        same(name, *found)

    return attempt, (*{part for arguments in right.values() for part in arguments}, *right["score_step"]["state"]._fields)


def called(function, arguments: dict):
    """What a function gives, and what it has written to its arguments; or what it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = function(**arguments)
    except REFUSES as error:
        if len(str(error)) < 5:
            raise Violation(f"it says only {error!r}") from error
        return error
    written = [arguments["state"]] if "state" in arguments else arguments.get("states", [])
    return [one for one in flat([given, *written]) if isinstance(one, torch.Tensor)]


def flat(values) -> list:
    return [one for value in values for one in (flat(value) if isinstance(value, (tuple, list)) else [value])]


def same(name: str, ours: list, right: list) -> None:
    for one, other in zip(ours, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise Violation(f"{name}: {shown(one)} is not {shown(other)}")
        if not torch.allclose(one.double(), other.double(), atol=1e-4, rtol=1e-3, equal_nan=True):
            raise Violation(f"{name}: {one.flatten()[:8].tolist()} is not {other.flatten()[:8].tolist()}")


def shown(value) -> str:
    if isinstance(value, torch.Tensor) and value.is_meta:
        return f"{value.dtype} {list(value.shape)} without numbers"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} {list(value.stride())} {value.flatten()[:6].tolist()}"
    return repr(value)[:200]


def other(random: Random, value):
    """Another argument in the place of one: of another shape, dtype or layout, with other numbers, or no tensor at all."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, list) and random.random() < 0.7:
            return random.choice((value[:1], value * 2, [other(random, value[0]), *value[1:]], []))
        return random.choice(PLAIN)
    change = random.choice(("shape", "dtype", "layout", "numbers", "numbers", "numbers", "plain"))
    if change == "shape" and value.numel() and value.dim():
        dim = random.randrange(value.dim())
        return random.choice((value.narrow(dim, 0, 0), value.narrow(dim, 0, 1), torch.cat([value, value], dim),
                              value.unsqueeze(dim), value.flatten(), value.select(dim, 0)))  # fmt: skip
    if change == "dtype":
        return value.to(random.choice(DTYPES))
    if change == "layout" and value.dim():
        wide = torch.cat([value, value], -1)[..., : value.shape[-1]]
        return random.choice((wide, value.repeat_interleave(2, -1)[..., ::2], value[:1].expand_as(value), value.flip(0),
                              value.transpose(0, -1).contiguous().transpose(0, -1), value.to("meta")))  # fmt: skip
    if change == "plain":
        return random.choice(PLAIN)
    value = value.clone()
    if value.numel():
        place = tuple(random.randrange(n) for n in value.shape)
        if value.is_floating_point():
            value[place] = random.choice((math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -0.0, 1e-40))
        elif value.dtype == torch.bool:
            value[place] = not value[place]
        else:
            value[place] = random.choice((-1, 0, 1, 2, 5, 9, 2**31, 2**40, 2**62, -(2**62), 2**63 - 1, -(2**63)))
    return value
