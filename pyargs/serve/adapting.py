"""Adaptation to the users of a store in the background: a process of its own makes the vectors, bit for bit `pyargs.adapt`'s.

The process loads the model when there is something to do, runs behind the engine (nice 10), writes nothing to the disk, and is
ended when one of the users is deleted whose pairs it has seen. It ends when the service does, however that ends.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from pyargs import __version__
from pyargs.data.schema import to_dataset
from pyargs.errors import PyargsError, first_line, refusal
from pyargs.files import weights_hash
from pyargs.lm.tokenize import as_messages
from pyargs.models import load_model
from pyargs.models.folder import locate, read_config
from pyargs.models.reward_model import RewardModel
from pyargs.progress import quiet_others
from pyargs.scoring import rounding, uncached
from pyargs.serve.store import UserStore, Work
from pyargs.training.adapt import new_vectors
from pyargs.training.hooks import method_of
from pyargs.types import Users

log = logging.getLogger("pyargs.serve")

OF_ONE_FOLDER = ("pyargs", "backbone", "trained", "adapted", "reward_std")
"""What folders of one model may say differently: who saved it, where its backbone lies, whom it knows, what was measured."""


def identity(folder: Path) -> str:
    """What users' vectors are for, as text: the same for all folders of a model, whoever came or went in them."""
    config = {name: value for name, value in read_config(folder).items() if name not in OF_ONE_FOLDER}
    return json.dumps({**config, "weights": weights_hash(folder)}, sort_keys=True)


def check_adapts(model) -> None:
    """Raises PyargsError for a model that new users cannot be added to by a vector."""
    if not isinstance(model, RewardModel) or not model.users.personal:
        kind = (
            "this model answers without rewards"
            if not hasattr(model, "pair_scores")
            else "this model is the same for everyone"
        )
        kind = "a policy alone has no model" if model is None else kind
        raise PyargsError(f"{kind}: there are no users' vectors to adapt. Fix: serve one of lore, pref, pal, vpl or mpu")
    method_of(model, None)


# -- the table of the engine -------------------------------------------------------------------------------------------


def restore(store: UserStore, users: Users) -> set[str]:
    """Brings the table of a model that was loaded from its folder to where the store left it. Returns the folder's users who
    are still there.

    Raises PyargsError for a vector that does not fit, and for a user whom both have.
    """
    users.remove(store.marked(users.ids))
    if twins := [user for user in store.users if user in users.ids]:
        raise PyargsError(
            f"user '{twins[0]}' is in {store.path} and in the model's folder. Fix: take them out of the folder, pyargs forget"
        )
    of_model = {*users.ids} - {""}
    kept = [(user, load(vector)) for user, vector in store.vectors()]
    for user, vectors in kept:
        shapes = {name: list(value.shape) for name, value in vectors.items()}
        wanted = {name: [1, *value.shape[1:]] for name, value in users.vectors.items()}
        if shapes != wanted:
            raise PyargsError(
                f"{store.path}: the vector of user '{user}' is {shapes}, and the model has {wanted}. Fix: restore the file "
                "from a copy"
            )
    if kept:
        names = list(users.vectors)
        users.append([user for user, _ in kept], **{name: torch.cat([one[name] for _, one in kept]) for name in names})
    return of_model


@torch.no_grad()
def change(users: Users, user: str, vectors: dict[str, Tensor] | None) -> None:
    """Adds a user to a table, or exchanges the vectors of one who is there; None removes them, if they are there."""
    with users.lock:
        if vectors is None:
            return users.remove([user] if user in users.ids else [])
        if user not in users.ids:
            return users.append([user], **vectors)
        (row,) = users.rows([user]).tolist()
        for name, value in vectors.items():
            users.vectors[name].detach()[row] = value[0]


# -- the process that adapts -------------------------------------------------------------------------------------------


def vectors_for(model, user: str, pairs: list[dict]) -> dict[str, Tensor]:
    """Rows [1, ...] of each kind of vector, from these pairs (prompt, chosen, rejected) alone. Nothing of them is kept.

    Where some prompts are texts and others messages, a text is what a message of the user is.
    """
    if len({isinstance(pair["prompt"], str) for pair in pairs}) > 1:
        pairs = [pair | {"prompt": as_messages(pair["prompt"])} for pair in pairs]
    rows = [{**pair, "user_id": user, "split": "support", "pair_id": str(number)} for number, pair in enumerate(pairs)]
    with uncached():
        return new_vectors(model, to_dataset(rows), again=True)[1]


def load_same(folder: Path, model: str, backbone: str | None):
    """The model of a folder. Raises PyargsError where it is not the one with this `identity`."""
    same = identity(folder) == model
    loaded = load_model(folder, backbone=backbone) if same else None
    if not same or identity(folder) != model:  # somebody may write it meanwhile
        raise PyargsError(
            f"{folder} holds another model than the one that is served: no vector is made by it. Fix: bring that one back, or "
            "restart the service with another file of users"
        )
    return loaded


def compute(connection: Connection, folder: Path, model: str, backbone: str | None, threads: int) -> None:
    """The process: (user, pairs) in; how the vectors were made, and the vectors, out; or why there are none.

    model: the `identity` of what is served; vectors of another model are never made.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(10)
    quiet_others()
    torch.set_num_threads(threads)
    loaded = None
    while True:
        try:
            user, pairs = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            loaded = loaded or load_same(folder, model, backbone)
            vectors = save({name: value.cpu().contiguous() for name, value in vectors_for(loaded, user, pairs).items()})
            about = {name: loaded.about.get(name) for name in ("method", "fields")}
            answer = {**about, "pairs": len(pairs), "pyargs": __version__, "rounding": rounding(), "threads": threads}
        except Exception as error:
            known = str(error) if isinstance(error, PyargsError) else refusal(error)
            answer, vectors = {"error": known or f"{type(error).__name__}: {first_line(error)}"}, b""
        connection.send_bytes(json.dumps(answer).encode())
        connection.send_bytes(vectors)
        user = pairs = vectors = None


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class Process:
    """The process that adapts. seen: numbers of the users whose pairs it was given. late: it was ended after SECONDS."""

    def __init__(self, folder: Path, model: str, backbone: str | None, threads: int):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=compute, args=(theirs, folder, model, backbone, threads), name="pyargs-adapt", daemon=True
        )
        self._process.start()
        theirs.close()
        self.pid, self.seen, self.late = self._process.pid, set[int](), False

    def ask(self, work: Work) -> tuple[dict, bytes] | None:
        """How the vectors were made, or {"error": why they were not}, and the vectors; None where the process has ended."""
        self.late, timer = False, threading.Timer(SECONDS, self._end_late)
        timer.start()
        try:
            self._ours.send_bytes(json.dumps([work.user, work.pairs]).encode())
            return json.loads(self._ours.recv_bytes()), self._ours.recv_bytes()
        except (EOFError, OSError):
            return None
        finally:
            timer.cancel()

    def _end_late(self) -> None:
        self.late = True
        self._process.kill()

    def end(self) -> int:
        self._process.kill()
        self._process.join()
        return self._process.exitcode


class Adapting:
    """A thread that adapts to the users of a store, one after the other.

    tell: gets each user with the new vectors, or None for one who is deleted, and returns when the next request is served so.
    folder: the model's, with its backbone at `backbone` if that was moved. of_model: the folder's users; who is deleted leaves
    them. What is queued in the store is done first.
    """

    def __init__(
        self,
        store: UserStore,
        tell: Callable[[str, dict[str, Tensor] | None], None],
        folder: Path,
        backbone: str | None = None,
        *,
        of_model: Iterable[str],
    ):
        self.store, self._tell, self.of_model = store, tell, set(of_model)
        self._start = partial(Process, folder, store.model, backbone, torch.get_num_threads())
        self._lock, self._wake, self._stopping = threading.Lock(), threading.Event(), False
        self.process: Process | None = None
        self._thread = threading.Thread(target=self._run, name="pyargs-adapting", daemon=True)
        self._thread.start()

    def add(self, user: str, pairs: list[dict], most: int) -> dict:
        """`UserStore.add`, and the job is on its way."""
        job = self.store.add(user, pairs, most)
        self._wake.set()
        return job

    def delete(self, user: str) -> None:
        """Removes a user from the store (`UserStore.delete`), the process and the table. An answer that is being given with
        their vector ends with it; what adapts to them is stopped, and what adapts to somebody else begins anew."""
        with self._lock:
            number = self.store.number(user)
            try:
                self.store.delete(user, mark=user in self.of_model)
                self.of_model.discard(
                    user
                )  # not where the disk refuses: they are back after a restart, and can be deleted yet
            finally:  # what the disk refuses leaves nobody served
                if self.process is not None and number in self.process.seen:
                    self.process.end()
                    self.process = None
                self._tell(user, None)

    async def current(self) -> None:
        """Returns when the table has what earlier calls have changed. It always has: they changed it themselves."""

    def stop(self) -> None:
        """Ends the process and the thread, and closes the store. Who was being adapted to is so again when it is opened."""
        self._stopping = True
        with self._lock:
            if self.process is not None:
                self.process.end()
        self._wake.set()
        self._thread.join()
        self.store.close()

    def _run(self) -> None:
        work = None
        while True:
            self._wake.clear()  # before it is read whether to stop: who says so wakes afterwards
            if self._stopping:
                return
            try:
                if work is not None:
                    self.store.put_back(work)
                work = self.store.take()
                if work is None:
                    self._wake.wait()
                else:
                    self._adapt(work)
                    work = None
            except Exception:  # the disk refuses, or the engine has ended
                log.exception("adaptation waits for %s s", RETRY)
                self._wake.wait(RETRY)

    def _adapt(self, work: Work) -> None:
        """Where the process has ended, as one that was idle may have long ago, a new one tries once more."""
        for last in (False, True):
            with self._lock:
                if self._stopping or not self.store.has(work):
                    return
                self.process = process = self.process or self._start()
                process.seen.add(work.number)
            answer = process.ask(work)
            with self._lock:
                if self._stopping or not self.store.has(work):
                    return
                if answer is not None:
                    return self._land(work, *answer)
                if process is not self.process:  # somebody was deleted
                    return self.store.put_back(work)
                self.process, code = None, process.end()
                if process.late:
                    return self.store.finish(
                        work, f"it took more than {SECONDS:g} s and was ended: begin anew with fewer pairs"
                    )
                if last:
                    self.store.finish(
                        work, f"the process that adapts has ended twice ({code}): was there memory for a second model?"
                    )

    def _land(self, work: Work, answer: dict, vectors: bytes) -> None:
        """The vector is kept, then served, then the job is done."""
        if "error" in answer:
            return self.store.finish(work, answer["error"])
        self.store.keep(work, vectors, answer)
        self._tell(work.user, load(vectors))
        self.store.finish(work)


def open_users(
    file: str | Path, worker, folder: str | Path, backbone: str | None = None, model: str | None = None
) -> Adapting:
    """The store of a service's users, restored into the table of the worker's engine, and what adapts to them.

    folder: the model's. model: its `identity` before the engine's was loaded from it. Raises PyargsError for a model without
    users' vectors, for a file that is not this model's, and for a folder that is another by now.
    """
    check_adapts(worker.engine.pair.model)
    folder, table = locate(folder), worker.engine.pair.model.users
    here = identity(folder)
    if model not in (None, here):
        raise PyargsError(f"{folder} was written while the model was loaded from it. Fix: start again")
    store = UserStore(file, here)

    def tell(user: str, vectors: dict[str, Tensor] | None) -> None:
        worker.call(lambda engine: change(table, user, vectors)).result()

    try:
        of_model = worker.call(lambda engine: restore(store, table)).result()
    except BaseException:
        store.close()
        raise
    return Adapting(store, tell, folder, backbone, of_model=of_model)


RETRY = 10.0
"""Seconds between two tries to write to a disk that refuses."""
SECONDS = 3600.0
"""The most that one adaptation may take."""
