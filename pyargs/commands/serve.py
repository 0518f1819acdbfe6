"""Answer many users over HTTP, in OpenAI's wire format: pyargs serve MODEL --policy NAME."""

from __future__ import annotations

import argparse

LOOPBACK = ("127.0.0.1", "localhost")


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_backend, add_model, add_policy, positive

    add_model(parser, "folder of `pyargs train` or `pyargs adapt`")
    add_policy(parser)
    add_backend(parser)
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at, 0 takes a free one (default %(default)s)")
    parser.add_argument("--name", help="what calls say as `model` (default: the name of the model's folder)")
    parser.add_argument("--max-rows", type=positive, default=8, help="requests that are answered at a time (default 8)")
    parser.add_argument(
        "--max-waiting", type=positive, default=64, help="requests that may wait; more are refused (default 64)"
    )
    parser.add_argument(
        "--shutdown-seconds", type=positive, default=30, help="how long running answers may go on after SIGTERM (default 30)"
    )


def run(args: argparse.Namespace) -> None:
    from pyargs.errors import PyargsError, extra

    if args.host not in LOOPBACK:
        raise PyargsError(f"without keys a service is for this machine alone: --host {' or '.join(LOOPBACK)}")
    with extra("serve", "the service"):
        import uvicorn
    import logging
    import signal
    import socket
    import sys
    from pathlib import Path

    from pyargs.decode.engine import Engine
    from pyargs.decode.pair import load_pair
    from pyargs.serve.app import make_app
    from pyargs.serve.worker import Worker

    policy, model = load_pair(args.policy, args.model, dtype=args.dtype, backbone=args.backbone)
    engine = Engine(policy, model, backend=args.backend, max_rows=args.max_rows)
    name = args.name or Path(args.model).resolve().name
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("pyargs.serve")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    log.propagate = False
    with socket.create_server((args.host, args.port)) as listening:
        worker = Worker(engine, max_waiting=args.max_waiting)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(worker, model=name),
                log_config=None,
                access_log=False,  # it would name users
                lifespan="off",
                timeout_graceful_shutdown=args.shutdown_seconds,
            )
        )
        # uvicorn raises the signal once more when it has ended, for whoever was there before: nobody, so that this goes on.
        signal.signal(signal.SIGTERM, lambda *_: None)
        host, port = listening.getsockname()[:2]
        print(f"serving {name} ({engine.backend}) at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        try:
            server.run(sockets=[listening])
        finally:
            worker.stop()
