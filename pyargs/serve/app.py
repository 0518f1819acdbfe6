"""The service: OpenAI's calls over a worker, health, metrics and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Annotated

from pyargs.errors import PyargsError, extra
from pyargs.serve import logprobs, page
from pyargs.serve.answers import Answers, Choice, chunks, whole
from pyargs.serve.metrics import Metrics, Noted
from pyargs.serve.plan import plan, refused, takes
from pyargs.serve.text import Writer
from pyargs.serve.wire import Chat, Completion, Form, WireError, of_validation
from pyargs.serve.worker import Broken, Full, Worker

with extra("serve", "the service"):
    from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from fastapi.routing import APIRoute
    from prometheus_client import CONTENT_TYPE_LATEST

BODY = 2**20
"""Bytes that the body of a request may have."""
LOOPBACK = ["localhost", "127.0.0.1"]
"""Hosts that a service without keys is asked by: a page of another site that has its name point here gets nothing."""


def make_app(
    worker: Worker,
    *,
    model: str,
    metrics: Metrics | None = None,
    keys=None,
    routers: Sequence[APIRouter] = (),
    first: Sequence[Callable] = (),
) -> FastAPI:
    """The application. `app.state` has worker, model, metrics and keys.

    model: the name that calls have to give. keys: who may ask: `keys.find(token)` gives the key of a bearer token, or None; a
    key has `admin`, `may(user)`, and `among(users)`, those that it may see. Without keys everybody is an admin, and the
    service answers to its loopback names only. routers: more calls; `Asker` gives a handler of theirs the key. first: what
    each call waits for (`Adapting.current`).
    """
    app = FastAPI(
        title="pyargs",
        dependencies=[Depends(one) for one in first],
        docs_url=None,  # these pages come from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    if worker.engine.pair.tokenizer is None:
        raise PyargsError("a service writes text: give the engine the tokenizer of its policy")
    metrics = metrics or Metrics()
    metrics.watch(worker)
    app.state.worker, app.state.model, app.state.metrics, app.state.keys = worker, model, metrics, keys
    if keys is None:
        app.add_middleware(Loopback)
    app.add_middleware(Bounded)
    app.add_middleware(Noted, metrics=metrics)
    app.add_exception_handler(WireError, _wire_error)
    app.add_exception_handler(PyargsError, _pyargs_error)
    for status in (400, 404, 405, 413):
        app.add_exception_handler(status, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _other_error)
    for one in (calls, page.router, *routers):
        for route in one.routes:
            if isinstance(route, APIRoute) and "GET" in route.methods:
                route.methods.add("HEAD")  # whose answer has no body: the server leaves it out
        app.include_router(one)
    return app


class Loopback:
    """ASGI: 400 where a request names another host than LOOPBACK."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1") if scope["type"] == "http" else ""
        app = self.app
        if scope["type"] == "http" and named.partition(":")[0] not in LOOPBACK:
            error = WireError(
                400, f"without keys this service is asked by the names {' and '.join(LOOPBACK)} alone", code="host"
            )
            app = _wire_error(None, error)
        await app(scope, receive, send)


class Bounded:
    """ASGI: 413 where a body has more than BODY bytes, in the shape of all errors here."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        size = 0

        async def received():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY:
                raise HTTPException(413)
            return message

        await self.app(scope, received, send)


calls = APIRouter()


def asker(request: Request):
    """The key that a request comes with; None where the service has no keys. Raises WireError 401."""
    keys = request.app.state.keys
    if keys is None:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = keys.find(token.strip()) if scheme.lower() == "bearer" else None
    if key is None:
        raise WireError(401, "a key of this service is needed: Authorization: Bearer KEY", code="invalid_api_key")
    return key


Asker = Annotated[object, Depends(asker)]
"""The key of whoever asks, as an argument of a handler."""


@calls.post("/v1/chat/completions")
async def chat(request: Request, body: Chat, key: Asker) -> Response:
    return await _answer(request, body, Form(request.app.state.model, chat=True), key)


@calls.post("/v1/completions")
async def completions(request: Request, body: Completion, key: Asker) -> Response:
    return await _answer(request, body, Form(request.app.state.model, chat=False), key)


@calls.get("/v1/models")
async def models(request: Request, key: Asker) -> dict:
    return {"object": "list", "data": [_model(request.app)]}


@calls.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str, key: Asker) -> dict:
    _check_model(request.app, name)
    return _model(request.app)


@calls.get("/health")
async def health(request: Request) -> Response:
    """200 as long as steps can be computed."""
    broken = request.app.state.worker.error is not None
    return JSONResponse({"status": "failed" if broken else "ok"}, 503 if broken else 200)


@calls.get("/metrics")
async def metrics(request: Request, key: Asker) -> Response:
    if key is not None and not key.admin:
        raise WireError(403, "metrics are for a key of an admin")
    return Response(await request.app.state.metrics.scrape(), media_type=CONTENT_TYPE_LATEST)


def _model(app: FastAPI) -> dict:
    ours = takes(app.state.worker.engine.pair)
    return {"id": app.state.model, "object": "model", "created": 0, "owned_by": "pyargs", "pyargs": ours}


def _check_model(app: FastAPI, name: str) -> None:
    if name != app.state.model:
        raise WireError(404, f"the model here is '{app.state.model}'", param="model", code="model_not_found")


# -- answers -----------------------------------------------------------------------------------------------------------


async def _answer(request: Request, body: Chat | Completion, form: Form, key) -> Response:
    """The answer to a call, whole or as a stream."""
    arrived, state, noted = time.perf_counter(), request.app.state, request.scope["noted"]
    worker, pair = state.worker, state.worker.engine.pair
    _check_model(request.app, body.model)
    try:
        asked = await asyncio.to_thread(plan, pair, body, key)
    except WireError as error:
        if error.code == "user_not_found" and await asyncio.to_thread(_comes, state, body.user, key):
            said = "this user has pairs and no vector yet: GET /v1/users/ID says how the adaptation goes"
            raise WireError(409, said, param="user", code="user_not_ready") from error
        raise
    prompt_tokens = sum(map(len, asked.prompts[:: body.n or 1]))
    state.metrics.tokens.labels("prompt").inc(prompt_tokens)
    noted.update(prompt_tokens=prompt_tokens, choices=len(asked.prompts), stream=bool(body.stream))
    if len(asked.prompts) > worker.most:
        raise WireError(422, f"this service has room for {worker.most} answers at a time: ask for fewer", param="n")
    try:
        call = await worker.ask(asked.prompts, asked.user, asked.wishes, of=key)
    except Full as error:
        raise WireError(429, str(error), code="queue_full", headers={"Retry-After": str(error.seconds)}) from error
    except Broken as error:
        raise WireError(503, "the service can compute no step: its log says why", code="engine_failed") from error
    except PyargsError as error:
        raise refused(error) from error
    begins = form.chat and body.messages[-1].role != "assistant"  # else it goes on with a text, exactly
    writers = [Writer(pair.tokenizer, body.stops, strip=begins, behind=() if begins else ids) for ids in asked.prompts]
    told = None
    if body.candidates_told is not None:
        make = logprobs.of_chat if form.chat else logprobs.of_completion
        told = partial(make, pair.tokenizer, most=body.candidates_told)
    guided = asked.reward_weight is not None
    choices = [Choice(i, writer, guided=guided, logprobs=told) for i, writer in enumerate(writers)]
    answers = Answers(worker, call, choices, state.metrics, noted, arrived)
    ours = {"reward_weight": asked.reward_weight, "backend": worker.engine.backend}
    if body.stream:
        return Stream(chunks(answers, form, prompt_tokens, ours, with_usage=body.usage_at_end), answers.leave)
    try:
        found = await unless_gone(request, whole(answers, form, prompt_tokens, ours))
    finally:
        answers.leave()
    return Response(status_code=499) if found is None else JSONResponse(found)


def _comes(state, user: str, key) -> bool:
    """Whether a user whom the key may see is being adapted to for the first time."""
    adapting = getattr(state, "adapting", None)
    return adapting is not None and (key is None or key.may(user)) and user in adapting.store


class Stream(StreamingResponse):
    """Server-sent events. `leave` is called behind the last one, and where the client has gone."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]):
        # A proxy sends each event on as it comes, and keeps none.
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._leave = leave

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def unless_gone(request: Request, work: Coroutine):
    """The result of `work`; None where the client goes before, and then the work is cancelled."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- errors ------------------------------------------------------------------------------------------------------------


def _wire_error(request: Request, error: WireError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _pyargs_error(request: Request, error: PyargsError) -> Response:
    return _wire_error(request, refused(error))


def _http_error(request: Request, error: HTTPException) -> Response:
    said = {404: "there is no such path here", 405: "this path has no such method", 413: f"a body has at most {BODY} bytes"}
    message = said.get(error.status_code, str(error.detail))
    return _wire_error(request, WireError(error.status_code, message, headers=error.headers))


def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return _wire_error(request, of_validation(error.errors()))


def _other_error(request: Request, error: Exception) -> Response:
    """One that nobody foresaw; it is in the log of the server."""
    return _wire_error(request, WireError(500, "the service has failed here: its log says why", code="internal"))
