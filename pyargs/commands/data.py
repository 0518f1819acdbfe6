"""Build data sets from their sources, check them, and show what they hold: users, pairs, splits, lengths, hash."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    which = "demo, synthetic, ... (see `list`), or the path of a .jsonl[.gz] or .parquet file or of a built folder"
    show = actions.add_parser("show", help="counts, lengths and hash of one data set")
    show.add_argument("name", help=which)
    show.add_argument("--source", help="the file or folder, for data that the package does not carry")
    show.add_argument("--train-test", type=float, help="share of each train user's prompts to set aside (default 0.2)")
    show.add_argument("--seed", type=int, help="seed of that choice, or of the data themselves for synthetic (default 0)")
    check = actions.add_parser(
        "check", help="find leaks, wrong types and artefacts, and score without the users; exit code 1 at a problem"
    )
    check.add_argument("name", help=which)
    check.add_argument("--source", help="the file or folder, for data that the package does not carry")
    check.add_argument(
        "--embedder", default="minilm", help="sentence encoder of the cosine; none leaves it out (default minilm)"
    )
    build = actions.add_parser("build", help="make a data set from its source: parquet, a card, counts and hashes")
    _add_build(build, argv)
    actions.add_parser("list", help="the data sets by name")


def _add_build(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs import prepare
    from pyargs.config import add_options

    if argv[:1] != ["build"]:
        return
    first = argparse.ArgumentParser(add_help=False)  # a first look for the name, which may come after flags with values
    for word in ("name", "--source", "--out"):
        first.add_argument(word, nargs="?")
    name = first.parse_known_args(argv[1:])[0].name
    parser.add_argument("name", choices=prepare.names(), help="the data set; `pyargs data build NAME --help` lists its flags")
    parser.add_argument("--source", required=True, help="local file or folder, or 'hub': the set's official place")
    parser.add_argument("--out", required=True, help="folder for the built set")
    if name in prepare.names():
        add_options(parser.add_argument_group(name), prepare.config(name))


def run(args: argparse.Namespace) -> dict:
    from pyargs import data, prepare
    from pyargs.prepare.statistics import statistics

    if args.action == "list":
        return {"data_sets": data.names(), "built_from_a_source": prepare.names()}
    if args.action == "build":
        return _build(args)
    if args.action == "check":
        return _check(args)
    options = {name: value for name in ("train_test", "seed") if (value := getattr(args, name)) is not None}
    dataset = data.load(args.name, args.source, **options)
    return {"name": args.name, "source": args.source, **options} | statistics(dataset)


def _build(args: argparse.Namespace) -> dict:
    from dataclasses import asdict
    from pathlib import Path

    from pyargs import files, prepare
    from pyargs.config import from_args
    from pyargs.errors import PyargsError

    config = from_args(prepare.config(args.name), args)
    source = Path(args.source)
    if args.source != "hub" and source.is_dir() and source.resolve() in Path(args.out).resolve().parents:
        raise PyargsError(f"--out {args.out} lies inside the source {source}: choose another folder.")
    key = files.stage_key(
        {"stage": "data", "name": args.name, **asdict(config)},
        {"source": files.sha256(source) if args.source != "hub" and source.exists() else args.source},
    )
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}
    try:
        found = prepare.build(args.name, args.source, args.out, config)
    except PyargsError:
        files.beside(args.out, "stage.json").unlink(missing_ok=True)  # nothing that a later run could continue
        raise
    for problem, rows in found["check"]["problems"].items():
        print(
            f"pyargs data: {args.out} has a problem: {problem}: {rows['count']}, such as {rows['first'][0]}", file=sys.stderr
        )
    return files.record(args.out, key, **{name: value for name, value in found.items() if name not in ("how", "name")})


def _check(args: argparse.Namespace) -> dict:
    import json
    from pathlib import Path

    from pyargs import data
    from pyargs.data import preferences
    from pyargs.errors import PyargsError
    from pyargs.prepare.check import report

    if args.name in data.names():
        rows = ((f"{args.name}, row {number}", row) for number, row in enumerate(data.load(args.name, args.source), 1))
    elif args.source is not None:
        raise PyargsError(f"No data set '{args.name}'. For a file of your own, give its path alone.")
    else:
        rows = preferences.read(Path(args.name))
    found = report(rows, embedder=None if args.embedder == "none" else args.embedder)
    if found["problems"]:
        print(json.dumps(found, indent=1), flush=True)
        listed = "; ".join(f"{name}: {rows['count']}" for name, rows in found["problems"].items())
        raise PyargsError(f"{args.name} has problems: {listed}. The report on stdout names the first rows of each.")
    return found
