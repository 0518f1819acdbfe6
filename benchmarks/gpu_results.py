"""FOLDER/gpu.json, the one file for all that `benchmarks/gpu.sh` finds. What is found again replaces the old, the rest stays.

    python benchmarks/gpu_results.py FOLDER STAGE EXIT_CODE SECONDS < LOG

notes how a stage ended; the benchmarks add their numbers by `add`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyargs.files import provenance, read_json, write_json

KEPT = 60  # last lines of a stage's log


def note(folder: Path, stage: str, code: int, seconds: int, log: str) -> None:
    """How a stage of gpu.sh ended."""
    result = _read(folder)
    lines = log.strip().splitlines()[-KEPT:]
    result.setdefault("stages", {})[stage] = {"exit": code, "seconds": seconds, "log": lines}
    write_json(folder / "gpu.json", result)


def add(folder: Path, name: str, found: dict, key: tuple[str, ...]) -> None:
    """Numbers under a name: `found["rows"]` take the place of rows with the same values of `key`; other rows stay."""
    result = _read(folder)
    new = {_values(row, key) for row in found["rows"]}
    rows = [row for row in result.get(name, {}).get("rows", []) if _values(row, key) not in new]
    write_json(folder / "gpu.json", result | {name: found | {"rows": rows + found["rows"], "provenance": provenance()}})


def _read(folder: Path) -> dict:
    path = folder / "gpu.json"
    return read_json(path) if path.exists() else {}


def _values(row: dict, key: tuple[str, ...]) -> tuple:
    return tuple(row.get(name) for name in key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage")
    parser.add_argument("code", type=int)
    parser.add_argument("seconds", type=int)
    options = parser.parse_args()
    note(options.folder, options.stage, options.code, options.seconds, sys.stdin.read())


if __name__ == "__main__":
    main()
