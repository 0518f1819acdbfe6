"""Make a table of the paper from the cells of an evaluation: ours beside the paper's numbers, and what is still missing."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from experiments.commands import add_results

    names = [*map(str, range(1, 13)), "same-content"]
    parser.add_argument(
        "table", choices=names, metavar="N", help="1 to 12, or same-content (ours: where content can not decide)"
    )
    add_results(parser)
    parser.add_argument(
        "--format",
        default="markdown",
        choices=["markdown", "latex", "csv"],
        help="csv has the numbers alone (default markdown)",
    )
    parser.add_argument("--out", help="file for the table (default: stdout)")


def run(args: argparse.Namespace) -> dict | None:
    from experiments.tables import table
    from experiments.tables.render import FORMATS
    from pyargs import files

    made, about = table(args.table, args.results, args.profile)
    text = FORMATS[args.format](made)
    if args.out is None:
        print(text, end="", flush=True)
        return None
    files.write_text(args.out, text)
    return {"table": args.table, "out": args.out, **about}
