"""The service on a Ray cluster: replicas behind one address, and one actor that owns the users.

A replica is the application of one machine, over an engine of its own. It looks beyond itself in two places. Calls about users
go to the owner, and every call first takes over what has changed there since the last one: what one replica has answered, the
next call finds on any other. And `/metrics` tells of all replicas.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load
from torch import Tensor

from pyargs.errors import PyargsError, extra
from pyargs.models.folder import locate
from pyargs.serve.adapting import Adapting, change, check_adapts, identity, restore
from pyargs.serve.metrics import Metrics
from pyargs.serve.store import UserStore
from pyargs.serve.wire import WireError
from pyargs.serve.worker import Worker
from pyargs.types import Users

with extra("ray", "the service on Ray"):
    import ray
    from ray import serve
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

with extra("serve", "the service"):
    from fastapi import FastAPI
    from prometheus_client import Metric, generate_latest

NAME = "pyargs"
"""Of the application and its deployment in Ray Serve."""
KEPT = 60.0
"""Seconds for which the owner knows a change. A replica asks every LOOK seconds; one that was away for longer reads all."""
LOOK = 1.0
"""Seconds between two looks at a replica: whether it computes, and at what has changed of the users."""
ELSE = 64
"""Requests for which a replica has room beside answers: about users, health, and those that it refuses with 429."""

Change = tuple[str, dict[str, Tensor] | None]
"""A user with the new vectors, or None for one who is gone."""
Version = tuple[str, int]
"""Of a table: the life of its owner, and the number of the last change."""


# -- the owner ---------------------------------------------------------------------------------------------------------


class Changes:
    """The last change of each user of a table, by numbers that grow. They begin anew in each life of the process.

    Those older than `KEPT` are forgotten, so that what is deleted does not stay here.
    """

    def __init__(self):
        self._lock, self._life, self._last, self._forgotten = threading.Lock(), secrets.token_hex(8), 0, 0
        self._changes: dict[str, tuple[int, float, dict | None]] = {}  # in the order of their numbers

    def tell(self, user: str, vectors: dict[str, Tensor] | None) -> None:
        with self._lock:
            self._last += 1
            self._changes.pop(user, None)
            self._changes[user] = self._last, time.monotonic(), vectors

    def since(self, seen: Version | None) -> tuple[Version, list[Change] | None]:
        """The version of the table, and what has changed since it was `seen`: None where that is not known (any more)."""
        with self._lock:
            version, old = (self._life, self._last), time.monotonic() - KEPT
            while self._changes and (first := next(iter(self._changes.items())))[1][1] < old:
                self._forgotten = first[1][0]
                del self._changes[first[0]]
            if seen == version:
                return version, []
            if seen is None or seen[0] != self._life or seen[1] < self._forgotten:
                return version, None
            return version, [(user, vectors) for user, (number, _, vectors) in self._changes.items() if number > seen[1]]


class Owner:
    """The actor, which has the store and what adapts."""

    def __init__(self, file: str, folder: str, backbone: str | None, threads: int):
        torch.set_num_threads(threads)
        self._changes, place = Changes(), locate(folder)
        store = UserStore(file, identity(place))
        of_model = restore(store, Users.load(place))
        self._adapting = Adapting(store, self._changes.tell, place, backbone, of_model=of_model)

    def about(self) -> tuple[Path, str]:
        """The file, and the model that its vectors are for."""
        return self._adapting.store.path, self._adapting.store.model

    @ray.method(max_task_retries=-1)  # while the actor is started again, calls wait
    def changes(self, seen: Version | None) -> tuple[Version, list[Change] | None]:
        return self._changes.since(seen)

    def ask(self, name: str, *args):
        """What this method or property of the store, or of what adapts, gives."""
        found = getattr(self._adapting if name in ("add", "delete") else self._adapting.store, name)
        found = found(*args) if callable(found) else found
        return [*found] if isinstance(found, Iterator) else found

    def stop(self) -> None:
        self._adapting.stop()


# -- a replica ---------------------------------------------------------------------------------------------------------


@contextmanager
def reached():
    """Around a call to the owner: its errors as they are, WireError 503 where nobody answers."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise WireError(
            503, "the users of this service cannot be reached: try again", code="no_users", headers={"Retry-After": "5"}
        ) from error


class Shared:
    """What a replica has in place of `Adapting` and its store: calls go to the owner, and `current` brings its changes.

    folder: the replica's copy of the model. model: its `identity` before it was loaded. of_model: its users, without those who
    were deleted. Raises PyargsError where it is not the owner's model, and as `open_users` does.
    """

    def __init__(self, owner, worker: Worker, folder: str, model: str):
        self._owner, self._worker, self._users = owner, worker, worker.engine.pair.model.users
        self.store, self._fetching = self, asyncio.Lock()
        check_adapts(worker.engine.pair.model)
        self.path, owned = self._result(owner.about.remote())
        if {model, identity(locate(folder))} != {owned}:
            raise PyargsError(f"{folder} is another model on this machine than on that of {self.path}. Fix: copy the folder")
        self._seen, _ = self._result(owner.changes.remote(None))
        self.of_model = self._worker.call(lambda engine: restore(self, self._users)).result()
        self._known = set(self.users)  # whom this replica has from the owner

    def _result(self, reference):
        with reached():
            return reference.future().result()

    def _ask(self, name: str, *args):
        return self._result(self._owner.ask.remote(name, *args))

    @property
    def users(self) -> list[str]:
        return self._ask("users")

    @property
    def waiting(self) -> list[str]:
        return self._ask("waiting")

    def __contains__(self, user: str) -> bool:
        return self._ask("__contains__", user)

    def user(self, user: str) -> dict | None:
        return self._ask("user", user)

    def job(self, job: str) -> dict | None:
        return self._ask("job", job)

    def vectors(self) -> list[tuple[str, bytes]]:
        return self._ask("vectors")

    def marked(self, users: Iterable[str]) -> list[str]:
        return self._ask("marked", [*users])

    def add(self, user: str, pairs: list[dict], most: int) -> dict:
        return self._ask("add", user, pairs, most)

    def delete(self, user: str) -> None:
        self._ask("delete", user)

    async def current(self) -> None:
        """Brings the table to where the owner's is now."""
        async with self._fetching:
            with reached():
                version, changes = await self._owner.changes.remote(self._seen)
            if version == self._seen:
                return
            if changes is None:
                changes = await asyncio.to_thread(self._all)
            await asyncio.wrap_future(self._worker.call(lambda engine: self._take_over(changes)))
            self._seen = version

    def _all(self) -> list[Change]:
        """What the table has to have, whatever it has."""
        kept = {user: load(vector) for user, vector in self.vectors()}
        with self._users.lock:
            others = [user for user in self._users.ids if user not in kept]
        gone = [*(user for user in others if user in self._known), *self.marked(others)]
        return [*kept.items(), *((user, None) for user in gone)]

    def _take_over(self, changes: list[Change]) -> None:
        for user, vectors in changes:
            change(self._users, user, vectors)
            self.of_model.discard(user)  # whoever comes from pairs was deleted before
            (self._known.discard if vectors is None else self._known.add)(user)


class Replica:
    """One engine, with so many threads, and its application.

    make: gives the application, from its `metrics` and from `shared`, which opens the users for a worker, a folder and its
    identity, if the service has an owner of users.
    """

    def __init__(self, make: Callable[..., FastAPI], threads: int, owner):
        torch.set_num_threads(threads)
        self._metrics = Metrics()
        self._metrics.scrape = self._scrape
        self._app = make(metrics=self._metrics, shared=owner and partial(Shared, owner))
        self._shared = self._app.state.adapting

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """What Ray asks: who computes no step is exchanged. Users who were deleted leave the memory here at the latest."""
        if self._app.state.worker.error is not None:
            raise RuntimeError("the engine fails at every step")
        if self._shared is not None:
            with suppress(WireError, asyncio.TimeoutError):  # the owner has a life of its own
                await asyncio.wait_for(self._shared.current(), LOOK)

    def families(self) -> tuple[str, list[Metric]]:
        """The name of this replica and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, [*self._metrics.registry.collect()]

    async def _scrape(self) -> bytes:
        """All replicas' metrics; each sample says whose it is."""
        asked = serve.get_deployment_handle(NAME, NAME).broadcast("families")
        told = await asked.results_async(timeout_s=10, return_exceptions=True)  # one may have died
        return text_of([one for one in told if not isinstance(one, BaseException)])


def text_of(told: Iterable[tuple[str, list[Metric]]]) -> bytes:
    """Metrics of several replicas in Prometheus' format, with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, metrics in sorted(told, key=lambda one: one[0]):
        for metric in metrics:
            samples = [sample._replace(labels={**sample.labels, "replica": replica}) for sample in metric.samples]
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += samples
    return generate_latest(SimpleNamespace(collect=families.values))


# -- the cluster -------------------------------------------------------------------------------------------------------


def deploy(
    make: Callable[..., FastAPI],
    *,
    model: str,
    host: str,
    port: int,
    replicas: int,
    most: int,
    seconds: int,
    users: tuple[str, str, str | None] | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C; running answers may go on for so many seconds then.

    make: of `Replica`. model: its name. most: requests that a replica takes, refused ones too. users: file, folder and
    backbone of `Owner`, if the service keeps users. The cluster is that of RAY_ADDRESS or of `ray start` on this machine;
    without one this process makes its own. Raises PyargsError where there is no room, and for what the replicas refuse.
    """
    ray.init(include_dashboard=False, logging_level="WARNING", namespace=NAME)
    owner = None
    try:
        check_head()
        resources = share(replicas)
        port = port or free_port(host)
        if serve.status().proxies:
            raise PyargsError(
                "Ray Serve runs on this cluster already, and has one address. Fix: `serve shutdown`, or take another cluster"
            )
        if users is not None:
            owner = make_owner(*users, threads=resources["num_cpus"])
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},  # it would name users
        )
        deployment = serve.deployment(
            serve.ingress()(Replica),
            name=NAME,
            num_replicas=replicas,
            ray_actor_options=resources,
            max_ongoing_requests=most,
            max_constructor_retry_count=1,
            health_check_period_s=LOOK,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=seconds,
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        with said_by_replicas():
            serve.run(deployment.bind(make, resources["num_cpus"], owner), name=NAME)
        print(f"serving {model} ({replicas} on Ray) at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        ended = threading.Event()
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: ended.set())
        ended.wait()
        serve.delete(NAME)  # returns when running answers have ended
        if owner is not None:
            ray.get(owner.stop.remote())
    finally:
        with suppress(RayActorError):
            serve.shutdown()
        ray.shutdown()


def check_head() -> None:
    """Raises PyargsError on a machine that is not the cluster's head, where the address is."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [one for one in ray.nodes() if one["NodeID"] == here]
    if "node:__internal_head__" not in node["Resources"]:
        raise PyargsError("the address is on the head of the cluster, and this is another machine. Fix: run this there")


def share(replicas: int) -> dict[str, int]:
    """What each replica gets of the cluster: as many CPUs as all can have, and a GPU where there are some."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    each = max((n for n in range(1, max(cpus) + 1) if sum(cpu // n for cpu in cpus) >= replicas), default=0)
    if not each or 0 < gpus < replicas:
        there = f"{gpus} GPUs" if each else f"{sum(cpus)} CPUs"
        raise PyargsError(f"each of {replicas} replicas wants its own, and the cluster has {there}. Fix: fewer --replicas")
    return {"num_cpus": each, "num_gpus": int(gpus > 0)}


def make_owner(file: str, folder: str, backbone: str | None, threads: int):
    """The actor, on this machine. Raises PyargsError for a file that is not this model's, or in use."""
    UserStore(file, identity(locate(folder))).close()  # here, where an error is one line
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=64, scheduling_strategy=here)(Owner)
    return kind.remote(file, folder, backbone, threads)


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def said_by_replicas():
    """Makes one line of the traceback that Ray has of a replica which refuses to start."""
    try:
        yield
    except RuntimeError as error:
        told = [one.message for app in serve.status().applications.values() for one in app.deployments.values()]
        said = re.findall(r"\bpyargs\.[\w.]+: (.+)$", "\n".join(told), re.MULTILINE)
        raise PyargsError(said[-1] if said else f"the replicas do not start: {error}") from error
