"""The calls about users: their pairs come in, vectors are made of them in the background, and all of it can be deleted."""

from __future__ import annotations

import heapq
import logging
from contextlib import contextmanager
from typing import Annotated

from pyargs.data.schema import check_row
from pyargs.errors import PyargsError, extra
from pyargs.serve.adapting import Adapting, check_adapts
from pyargs.serve.app import Asker
from pyargs.serve.plan import personal, unknown
from pyargs.serve.store import DiskError, TooManyPairs
from pyargs.serve.wire import FIRST, Message, UserId, WireError
from pyargs.serve.worker import Worker

with extra("serve", "the service"):
    from fastapi import APIRouter, Query
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints

log = logging.getLogger("pyargs.serve")

PAIRS, ALL_PAIRS = 256, 4096
"""The most pairs of one call, and of a user."""
TEXT = 2**15
"""The most characters of a text of a pair."""
WAITING = 1000
"""The most users who wait to be adapted to. A key may have as many of them as places are free, so that none takes all."""

Text = Annotated[str, StringConstraints(max_length=TEXT)]


class Pair(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Text | Annotated[list[Message], FIRST, Field(min_length=1, max_length=256)]
    chosen: Text
    rejected: Text

    def plain(self, place: str) -> dict:
        """As `pyargs.data` has it. Raises PyargsError for a text that is blank, and for two that are the same."""
        messages = isinstance(self.prompt, list)
        texts = {"prompt": [one.plain() for one in self.prompt] if messages else self.prompt}
        texts |= {"chosen": self.chosen, "rejected": self.rejected}
        row = check_row({**texts, "user_id": "user", "split": "support"}, place)
        return {name: row[name] for name in texts}


class Pairs(BaseModel):
    """The body of POST /v1/users/{id}/pairs."""

    model_config = ConfigDict(extra="forbid", strict=True)
    pairs: Annotated[list[Pair], FIRST] = Field(min_length=1, max_length=PAIRS)


def make_router(worker: Worker, adapting: Adapting | None = None) -> APIRouter:
    """The calls about users. Without `adapting` they only tell whom the model's folder knows.

    What a key may not see looks as if it were not there, whether it is or not.
    """
    router, pair = APIRouter(), worker.engine.pair
    store = None if adapting is None else adapting.store
    if adapting is not None:
        of_model = adapting.of_model
    else:
        of_model = {*pair.model.known_users} - {""} if personal(pair) else set()
    brought: dict[str, object] = {}  # users who wait, and the key that has asked for it

    def keeping() -> Adapting:
        """Raises WireError where users have no vectors, and where none are kept."""
        try:
            check_adapts(pair.model)
        except PyargsError as error:
            raise WireError(409, str(error), code="no_user_vectors") from error
        if adapting is None:
            raise WireError(409, "this service keeps no users: it was started without --users FILE", code="no_users_file")
        return adapting

    def everyone() -> set[str]:
        return of_model.union(() if store is None else store.users)

    def check_key(user: str, key) -> None:
        if key is not None and not key.may(user):  # first, so that nothing takes longer for those who are there
            raise unknown(pair, user, key)

    def told(user: str) -> dict | None:
        """What is told of a user; None for one who is not there."""
        found, folder = None if store is None else store.user(user), user in of_model
        if not (found or folder):
            return None
        found = found or {"id": user, "pairs": None, "created": None, "adapted": None, "made": None, "job": None}
        made = found["made"] and {name: found["made"][name] for name in ("method", "pairs", "pyargs")}
        return {**found, "object": "user", "source": "model" if folder else "pairs", "made": made}

    def check_place(key) -> None:
        """Raises WireError where too many users wait, or too many whom this key has brought."""
        waiting = set(store.waiting)
        for user in [user for user in list(brought) if user not in waiting]:
            brought.pop(user, None)
        mine = 0 if key is None else sum(one is key for one in list(brought.values()))
        if WAITING - len(waiting) <= mine:
            raise WireError(429, "too many users wait to be adapted to", code="queue_full", headers={"Retry-After": "60"})

    @router.post("/v1/users/{user:path}/pairs", status_code=202)
    def add(user: UserId, body: Pairs, key: Asker) -> dict:
        """Keeps pairs and adapts to all pairs of this user, who may be new. What is answered with 202 is on the disk."""
        here = keeping()
        check_key(user, key)
        if user in of_model:
            raise WireError(
                409,
                "this user came with the model, and the pairs that the vector was made of are not here: it would be lost. "
                "To begin anew from these pairs alone, delete the user first",
                param="user",
                code="user_of_the_model",
            )
        pairs = [one.plain(f"pairs[{number}]") for number, one in enumerate(body.pairs)]
        with on_disk():
            check_place(key)
            made = here.add(user, pairs, ALL_PAIRS)
        brought[user] = key
        return {**made, "object": "job"}

    @router.get("/v1/jobs/{job}")
    def job(job: str, key: Asker) -> dict:
        with on_disk():
            found = keeping().store.job(job)
        if found is None or (key is not None and not key.may(found["user"])):
            raise WireError(404, "there is no such job here", code="job_not_found")
        return {**found, "object": "job"}

    @router.get("/v1/users")
    def users(key: Asker, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str = "") -> dict:
        """The users whom the key may see, in the order of their ids, from the first one behind `after` on; whether calls may
        change them (`keeps`)."""
        while True:
            seen = everyone() if key is None else key.among(everyone())
            page = heapq.nsmallest(limit + 1, (user for user in seen if user > after))
            with on_disk():
                found = [told(user) for user in page[:limit]]
            if None not in found:  # else somebody has gone meanwhile
                return {"object": "list", "data": found, "has_more": len(page) > limit, "keeps": adapting is not None}

    @router.get("/v1/users/{user:path}")
    def user(user: UserId, key: Asker) -> dict:
        check_key(user, key)
        with on_disk():
            found = told(user)
        if found is None:
            raise unknown(pair, user, key)
        return found

    @router.delete("/v1/users/{user:path}")
    def delete(user: UserId, key: Asker) -> dict:
        """Removes all that is here of a user; answers that are being given end with the vector that they began with."""
        here = keeping()
        check_key(user, key)
        if user not in of_model and user not in here.store:
            raise unknown(pair, user, key)
        with on_disk():
            here.delete(user)
        return {"id": user, "object": "user", "deleted": True}

    return router


@contextmanager
def on_disk():
    """What the store refuses, as the client gets it."""
    try:
        yield
    except TooManyPairs as error:
        raise WireError(409, str(error), param="pairs", code="too_many_pairs") from error
    except DiskError as error:
        log.error("%s", error)
        raise WireError(503, "the service cannot write to its disk: its log says why", code="disk") from error
