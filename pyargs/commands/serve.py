"""Answer many users over HTTP, in OpenAI's wire format: pyargs serve MODEL --policy NAME."""

from __future__ import annotations

import argparse

LOOPBACK = ("127.0.0.1", "localhost")


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_backend, add_model, add_policy, positive

    add_model(parser, "folder of `pyargs train` or `pyargs adapt`; without one the policy answers alone", nargs="?")
    add_policy(parser)
    add_backend(parser)
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at, 0 takes a free one (default %(default)s)")
    parser.add_argument("--name", help="what calls say as `model` (default: the name of the model's folder)")
    parser.add_argument("--api-keys", metavar="FILE", help="who may ask, and for whom: a file of `pyargs key`")
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="calls may add, change and delete users, whom this SQLite file keeps; made when missing",
    )
    parser.add_argument("--max-rows", type=positive, default=8, help="requests that are answered at a time (default 8)")
    parser.add_argument(
        "--max-waiting", type=positive, default=64, help="requests that may wait; more are refused (default 64)"
    )
    parser.add_argument(
        "--prefill-tokens",
        type=positive,
        help="the most tokens of prompts that a step reads (default: 32 on a CPU, where more are read no faster; else 512)",
    )
    parser.add_argument(
        "--shutdown-seconds", type=positive, default=30, help="how long running answers may go on after SIGTERM (default 30)"
    )
    parser.add_argument("--on", choices=["ray"], help="replicas on a Ray cluster, in place of this process alone")
    parser.add_argument("--replicas", type=positive, help="engines that share the requests, on Ray (default 1)")


def run(args: argparse.Namespace) -> None:
    from pyargs.errors import PyargsError, extra

    if args.model is None and args.policy is None:  # before what takes seconds
        raise PyargsError("name the folder of a model and the --policy that it guides, or --policy alone")
    if args.on == "ray":
        return run_on_ray(args)
    if args.replicas is not None:
        raise PyargsError("--replicas are on a cluster: add --on ray")
    with extra("serve", "the service"):
        import uvicorn
    import signal
    import socket
    import sys

    app = application(args)
    state = app.state
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would name users
        lifespan="off",
        timeout_graceful_shutdown=args.shutdown_seconds,
    )
    # uvicorn raises the signal once more when it has ended, for whoever was there before: nobody, so that this goes on.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with socket.create_server((args.host, args.port)) as listening:
            host, port = listening.getsockname()
            address = f"http://{host}:{port}/v1"
            print(f"serving {state.model} ({state.worker.engine.backend}) at {address}", file=sys.stderr, flush=True)
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        if state.adapting is not None:
            state.adapting.stop()
        state.worker.stop()


def run_on_ray(args: argparse.Namespace) -> None:
    import os
    from functools import partial
    from pathlib import Path

    from pyargs.errors import extra

    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # before ray is imported: each request has its line in the log
    with extra("ray", "the service on Ray"):
        import ray  # noqa: F401
    from pyargs.serve.ray import ELSE, deploy

    keys_of(args)
    for name in ("model", "policy", "backbone", "api_keys", "users"):  # replicas have another working folder
        value = getattr(args, name)
        if value is not None and (name == "users" or Path(value).exists()):
            setattr(args, name, str(Path(value).resolve()))
    deploy(
        partial(application, args),
        model=name_of(args),
        host=args.host,
        port=args.port,
        replicas=args.replicas or 1,
        most=args.max_rows + args.max_waiting + ELSE,
        seconds=args.shutdown_seconds,
        users=args.users and args.model and (args.users, args.model, args.backbone),
    )


def application(args: argparse.Namespace, *, metrics=None, shared=None):
    """The application of a command line, whose worker runs. shared: opens the users of a worker where others own them."""
    from pyargs.decode.engine import Engine
    from pyargs.decode.pair import load_pair
    from pyargs.models.folder import locate
    from pyargs.serve.adapting import identity, open_users
    from pyargs.serve.app import make_app
    from pyargs.serve.metrics import log_to_stderr
    from pyargs.serve.users import make_router
    from pyargs.serve.worker import Worker

    keys = keys_of(args)
    log_to_stderr()
    before = None if None in (args.users, args.model) else identity(locate(args.model))
    policy, model = load_pair(args.policy, args.model, dtype=args.dtype, backbone=args.backbone)
    part = args.prefill_tokens or (32 if policy.device.type == "cpu" else 512)
    engine = Engine(policy, model, backend=args.backend, max_rows=args.max_rows, prefill_tokens=part)
    worker = Worker(engine, max_waiting=args.max_waiting)
    adapting = None
    if args.users is not None:
        if shared is not None:
            adapting = shared(worker, args.model, before)
        else:
            adapting = open_users(args.users, worker, args.model, args.backbone, before)
    first = [] if adapting is None else [adapting.current]
    routers = [make_router(worker, adapting)]
    app = make_app(worker, model=name_of(args), metrics=metrics, keys=keys, routers=routers, first=first)
    app.state.adapting = adapting
    return app


def name_of(args: argparse.Namespace) -> str:
    """What calls say as `model`."""
    from pathlib import Path

    return args.name or Path(args.policy if args.model is None else args.model).resolve().name


def keys_of(args: argparse.Namespace):
    """Who may ask; None where only this machine may."""
    from pyargs.errors import PyargsError
    from pyargs.serve.keys import Keys

    if args.api_keys is None and args.host not in LOOPBACK:
        raise PyargsError(f"without --api-keys a service is for this machine alone: --host {' or '.join(LOOPBACK)}")
    return None if args.api_keys is None else Keys(args.api_keys)
