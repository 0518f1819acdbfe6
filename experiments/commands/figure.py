"""Draw a figure of the paper from the cells of an evaluation, with the paper's points beside ours."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from experiments.commands import add_results

    parser.add_argument(
        "figure",
        choices=["1", "2", "3"],
        metavar="N",
        help="1: RM against policy accuracy; 2: ROUGE and BERTScore; 3: ROUGE-1 by demonstrations",
    )
    add_results(parser)
    parser.add_argument("--out", help=".png or .svg file (default: figure-N.png)")


def run(args: argparse.Namespace) -> dict:
    from experiments.figures import figure, save

    out = args.out or f"figure-{args.figure}.png"
    made, about = figure(args.figure, args.results, args.profile)
    save(made, out)
    return {"figure": args.figure, "out": out, **about}
