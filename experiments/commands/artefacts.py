"""Make folders for the hub from the cells: answers, and trained models with their users where these lie on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from experiments.commands import RESULTS
    from experiments.profiles import PROFILES

    root = RESULTS.parents[1]
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells (default: the committed ones)")
    parser.add_argument("--profile", choices=PROFILES, help="profile whose cells are taken (default: all)")
    parser.add_argument("--work", type=Path, default=root / "output/reproduce", help="where `reproduce` left the models")
    parser.add_argument("--out", type=Path, default=root / "build/artefacts", help="for the folders; the salt is OUT.salt")


def run(args: argparse.Namespace) -> dict:
    from experiments import artefacts, reproduce

    places = reproduce.Places(Path("nowhere"), args.work, args.results)
    return artefacts.build(places, args.out, args.profile)
