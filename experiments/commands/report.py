"""Make one HTML page of an evaluation: which claims hold, figures, tables, users and answers."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from experiments.commands import add_results
    from pyargs.commands import add_data

    add_results(parser)
    add_data(parser, required=False)
    parser.add_argument(
        "--out",
        default="report.html",
        help="file for the page (default report.html); with --data it holds texts of the data set",
    )


def run(args: argparse.Namespace) -> dict:
    from experiments import report
    from pyargs.commands import load_data
    from pyargs.errors import PyargsError

    if args.data is None and (args.source is not None or args.data_seed is not None):
        raise PyargsError("--source and --data-seed belong to --data: name the data set whose texts the page may show")
    found = report.report(args.results, args.profile, None if args.data is None else load_data(args))
    report.write(args.out, found)
    grid = found["grid"]
    return {
        "out": args.out,
        "profile": found["profile"],
        "cells": found["summary"]["cells"],
        "missing": grid["cells"] - grid["there"],
        "verdicts": found["verdicts"],
    }
