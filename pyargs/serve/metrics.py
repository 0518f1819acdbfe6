"""What the service says of itself: Prometheus' metrics, and one line for each request. Neither tells users or texts."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable

from pyargs.errors import extra

with extra("serve", "the service"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

log = logging.getLogger("pyargs.serve")

FAST = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts of one service, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = dict(registry=self.registry)
        self.requests = Counter("pyargs_requests", "Requests by path and by how they ended", ["path", "outcome"], **own)
        self.tokens = Counter("pyargs_tokens", "Tokens of prompts and answers", ["kind"], **own)
        self.rows = Gauge("pyargs_rows", "Requests that are being answered", **own)
        self.waiting = Gauge("pyargs_waiting", "Requests that wait for a row", **own)
        self.step = Histogram("pyargs_step_seconds", "Time of a step of all rows", buckets=FAST, **own)
        self.first = Histogram("pyargs_first_token_seconds", "Time from a request to its first token", buckets=SLOW, **own)
        self.between = Histogram("pyargs_between_tokens_seconds", "Time between two tokens of an answer", buckets=FAST, **own)
        self.scrape: Callable[[], Awaitable[bytes]] = self._scrape  # what /metrics tells; of several engines it is more

    def watch(self, worker) -> None:
        """Takes the time of a worker's steps, and reads its rows and waiting requests whenever somebody asks."""
        worker.on_step = self.step.observe
        self.rows.set_function(lambda: worker.open - worker.waiting)
        self.waiting.set_function(lambda: worker.waiting)

    async def _scrape(self) -> bytes:
        return generate_latest(self.registry)


class Noted:
    """ASGI: counts each request and writes its line of JSON, when it has ended.

    What a handler puts into `scope["noted"]` stands in the line, too. The path is the route's, without the id of a user in it.
    """

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, noted, status = time.perf_counter(), {}, 0
        scope["noted"] = noted

        async def sent(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except asyncio.CancelledError:  # the service ends, and this took too long
            noted["outcome"] = "cut"
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            outcome = noted.setdefault("outcome", outcome_of(status))
            self.metrics.requests.labels(route, outcome).inc()
            line = {"method": scope["method"], "path": route, "status": status, **noted}
            log.info(json.dumps({"time": _now(), **line, "seconds": round(time.perf_counter() - started, 4)}))


def log_to_stderr() -> None:
    """Writes the lines of requests to stderr, each as it is."""
    if not log.handlers:
        lines = logging.StreamHandler()
        lines.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(lines)
        log.propagate = False
    log.setLevel(logging.INFO)


def outcome_of(status: int) -> str:
    if status == 429:
        return "full"
    return "failed" if status >= 500 or not status else "refused" if status >= 400 else "ok"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
