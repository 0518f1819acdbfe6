"""Remove users from a model, with their vectors or demonstrations: pyargs forget MODEL USER ... --out FOLDER."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_model

    add_model(parser, "folder of `pyargs train` or `pyargs adapt`; it stays as it is")
    parser.add_argument("users", nargs="+", metavar="USER", help="their ids")
    parser.add_argument("--out", required=True, help="folder for the model without them")


def run(args: argparse.Namespace) -> dict:
    from pyargs import files
    from pyargs.models import forget, load_model

    key = files.stage_key({"stage": "forget", "users": args.users}, {"model": files.sha256(args.model)})
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}
    model = load_model(args.model, backbone=args.backbone)
    forget(model, args.users)
    model.save_pretrained(args.out)
    return files.record(
        args.out,
        key,
        out=args.out,
        users=len(model.known_users),
        provenance=files.provenance(model.about.get("fields", {}).get("seed")),
    )
