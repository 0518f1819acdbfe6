"""What tests of the service share: a tiny engine that writes text, a service on a free port, and clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import warnings

import openai
import uvicorn
from conftest import reward_model

from pyargs.decode import strength
from pyargs.decode.engine import Engine
from pyargs.lm.loading import load_lm
from pyargs.serve.app import make_app
from pyargs.serve.worker import Worker

MODEL = "tiny"
USERS = ("ann", "bob", "cid")


def pair(folder: str):
    """A policy and a reward model of three users, in float32. folder: of `synthetic.tiny_lm`."""
    policy, _ = load_lm(folder)
    model = reward_model(policy, users=USERS)
    model.about["reward_std"] = {strength._fingerprint(policy): 0.5}
    return policy, model


def engine(folder: str, *, guided: bool = True, **more) -> Engine:
    policy, model = pair(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the tokenizers are the same is not known
        return Engine(policy, model if guided else None, backend="cpu", **more)


@contextlib.contextmanager
def worker(engine: Engine, **more):
    made = Worker(engine, **more)
    try:
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def served(app, **more):
    """The address of an application that uvicorn serves in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **more))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@contextlib.contextmanager
def service(engine: Engine, *, max_waiting: int = 64, **more):
    """A worker of this engine and the address of its service."""
    with worker(engine, max_waiting=max_waiting) as one, served(make_app(one, model=MODEL, **more)) as address:
        yield one, address


def client(address: str, **more) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, **more)


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]
