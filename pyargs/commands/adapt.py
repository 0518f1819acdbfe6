"""Add new users to a trained model from their support pairs: pyargs adapt MODEL --data NAME_OR_FILE --out FOLDER."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_data, add_model

    add_model(parser, "folder of `pyargs train`")
    parser.add_argument("--out", required=True, help="folder for the model with the new users")
    parser.add_argument("--adapt-steps", type=int, help="steps of the adaptation (default: the method's)")
    parser.add_argument("--method", help="the method's .py file, if the model was trained with one; it is run")
    parser.add_argument("--again", action="store_true", help="adapt known users anew, from these pairs alone")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, with sizes, and stop")
    add_data(parser)


def run(args: argparse.Namespace) -> dict:
    from pyargs import files, tuned
    from pyargs.commands import load_data
    from pyargs.data import content_hash, of_split
    from pyargs.lm import hub
    from pyargs.models import load_model
    from pyargs.models.folder import locate
    from pyargs.training import adapt

    rows = of_split(load_data(args), "support")
    method = hub.identity(args.method)
    key = files.stage_key(
        {"stage": "adapt", "steps": args.adapt_steps, **({"again": True} if args.again else {})},
        {"data": content_hash(rows), "model": files.sha256(args.model), **({} if method is None else {"method": method})},
    )
    plan = {"new_users": len(set(rows["user_id"])), "pairs": len(rows), "out": args.out}
    if args.dry_run:
        return plan
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}
    model = load_model(args.model, backbone=args.backbone)
    adapt.adapt(model, rows, steps=args.adapt_steps, method=args.method, again=args.again)
    model.save_pretrained(args.out)
    tuned.keep(locate(args.model), args.out)
    if not model.known_users:
        plan["new_users"] = 0  # the same for everyone: nobody had to be added
    return files.record(
        args.out,
        key,
        **plan,
        users=len(model.known_users),
        provenance=files.provenance(model.about.get("fields", {}).get("seed")),
    )
