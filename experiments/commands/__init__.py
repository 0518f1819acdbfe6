"""The paper's evaluation: run its grid, make its tables, figures and report."""

from __future__ import annotations

import argparse
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def add_results(parser: argparse.ArgumentParser) -> None:
    """The flags that say which results a table or figure is made from."""
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the cells (default: the committed ones, experiments/results)"
    )
    parser.add_argument(
        "--profile",
        choices=["paper", "gpu", "cpu", "smoke"],
        help="profile whose cells are read (default: the first of paper, gpu, cpu, smoke that has the data set's)",
    )
