"""Push a trained model to the Hugging Face hub, without its users unless that is asked for: pyargs push FOLDER REPO.

What is pushed is the head, the LoRA adapter and a card, not the backbone; others load it with `pyargs.load_model(REPO)`.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("folder", help="of `pyargs train` or `pyargs adapt`; it stays as it is")
    parser.add_argument("repo", help="name on the hub: OWNER/NAME")
    parser.add_argument("--data", required=True, help="what the model was trained on, in words for the card, or a hub name")
    parser.add_argument("--data-licence", required=True, help="the licence of that data, such as CC-BY-4.0")
    parser.add_argument(
        "--users",
        choices=["none", "hashed", "named"],
        default="none",
        help="none: left out (default); hashed: by a salted hash of their ids, the salt is printed; named: by their ids, with "
        "their texts where the model shows such",
    )
    parser.add_argument("--users-repo", metavar="REPO", help="push the users to this private repository instead")
    parser.add_argument("--results", nargs="+", metavar="FILE", default=(), help="of `pyargs evaluate`, for the card")
    parser.add_argument("--base-model", metavar="NAME", help="what others call the backbone, if it was trained from a folder")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--out", metavar="DIR", help="write what would be pushed to DIR (users apart: DIR.users), and stop")


def run(args: argparse.Namespace) -> dict:
    from pyargs.files import beside
    from pyargs.publish.pushing import push_to_hub
    from pyargs.publish.staging import stage

    said = {name: getattr(args, name) for name in ("data", "data_licence", "users", "users_repo", "results", "base_model")}
    if args.out is None:
        return push_to_hub(args.folder, args.repo, private=args.private or None, **said)
    apart = beside(args.out, "users") if args.users_repo else None
    return {"out": args.out, **stage(args.folder, args.out, users_out=apart, repo=args.repo, **said)}
