"""Train on the embedded users, adapt new ones, and answer prompts for four of them beside the unguided model."""

from __future__ import annotations

import argparse

# Two users of the training and two new ones, with tastes of three kinds.
SHOWN = {"ada": "trained", "cora": "trained", "noah": "new", "paul": "new"}


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("--out", default="demo-output", help="folder for the model, result.json and report.html")
    parser.add_argument("--prompts", type=int, default=8, help="prompts to answer, 3 to 32 (default 8)")
    parser.add_argument("--backbone", default="smollm2-135m", help="policy and backbone of the reward model")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from pyargs import files
    from pyargs.demo import page
    from pyargs.demo.run import run as measure
    from pyargs.errors import PyargsError

    if not 3 <= args.prompts <= 32:
        raise PyargsError(f"--prompts is 3 to 32 (an interval needs some), got {args.prompts}")
    out = Path(args.out)
    result = measure(out, SHOWN, backbone=args.backbone, prompts=args.prompts)
    result["provenance"] = files.provenance(0)
    files.write_json(out / "result.json", result)
    page.write_report(out / "report.html", result)
    page.print_table(result, out)  # for a person; the numbers are in result.json
