"""Make a key for `pyargs serve --api-keys FILE`: pyargs key FILE NAME --admin, or --users ID ..."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument(
        "file", help="JSON file of hashed keys, made when it is missing; a running service does not read it again"
    )
    parser.add_argument("name", help="what the key is called in the file")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--admin", action="store_true", help="a key for all users, and for the metrics")
    kind.add_argument(
        "--users", nargs="+", metavar="ID", help="ids that the key is for; 'shop-*' is all that begin with shop-"
    )


def run(args: argparse.Namespace) -> dict:
    from pyargs.serve import keys

    return {"name": args.name, "key": keys.new(args.file, args.name, admin=args.admin, users=args.users or ())}
