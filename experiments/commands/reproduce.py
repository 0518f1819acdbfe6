"""Run the paper's grid: every row, seed, policy and data set of a profile; a killed run continues.

A cell is one row, seed and policy on one data set. Its stages are `pyargs train`, `adapt`, `tune`, `decode`, `evaluate`, whose
files are in --work; its numbers and generations, without any text of the data, go to --results as one JSON file, which is made
again only if its settings or its data change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from experiments.commands import RESULTS
    from experiments.profiles import PROFILES
    from pyargs.commands import positive

    root = RESULTS.parents[1]
    parser.add_argument("profile", choices=PROFILES, help="smoke: 2 minutes; cpu: hours on two cores; gpu, paper: with GPUs")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows of the tables to run (default: all)")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="data sets to run (default: all of the profile)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds to run (default: the profile's)")
    parser.add_argument(
        "--cells",
        type=part,
        metavar="I/N",
        help="only part I of N, I from 0 to N - 1: what a job of an array runs; the files in --results are merged by name",
    )
    parser.add_argument("--workers", type=positive, help="processes of this machine (default: the profile's)")
    parser.add_argument("--on", choices=["ray"], help="a Ray cluster, in place of this machine alone")
    parser.add_argument("--address", help="of the cluster (default: that of RAY_ADDRESS, or one of this machine alone)")
    parser.add_argument("--shared", type=Path, default=root.parent / "shared/data", help="where the data lie")
    parser.add_argument("--work", type=Path, default=root / "output/reproduce", help="models and other stages' files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the cells' files go")
    parser.add_argument("--dry-run", action="store_true", help="print cells, sizes and estimated hours, and stop")


def part(word: str) -> tuple[int, int]:
    """An argparse type: which of how many parts."""
    number, _, of = word.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, as 0/4 to 3/4, got {word}")
    return int(number), int(of)


def run(args: argparse.Namespace) -> dict | None:
    import json
    import os
    from functools import partial

    from experiments import grid, reproduce
    from experiments.profiles import PROFILES
    from pyargs.errors import PyargsError

    if args.on and args.workers:
        raise PyargsError("--workers are of this machine; Ray runs as many cells as the cluster has room for: leave it out")
    if args.address and not args.on:
        raise PyargsError("--address is of a cluster: add --on ray")
    asked = grid.chosen(args.profile, args.only, args.sets, args.seeds)
    if args.cells:
        asked = grid.shard(asked, *args.cells)
    if not asked:
        return {"cells": 0, "run_now": 0, "failed": []}  # there are more parts than models
    places = reproduce.Places(args.shared, args.work, args.results)
    workers = args.workers or PROFILES[args.profile]["workers"]
    if args.dry_run:
        return reproduce.plan(asked, places, min(workers, os.cpu_count() or 1))
    if args.on:
        from experiments import on_ray

        run_cells = partial(on_ray.run_all, address=args.address)
    else:
        run_cells = partial(grid.run_here, workers=workers)
    found = grid.run_grid(asked, places, run_cells)
    if not found["failed"]:
        return found
    print(json.dumps(found, indent=1), flush=True)
    sys.exit(1)
