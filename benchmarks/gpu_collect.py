"""Puts what `benchmarks/gpu.sh` measured into benchmarks/results/<gpu>.json, with commit and versions."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from timing import hardware

from pyargs.files import provenance, read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the stages wrote")
    parser.add_argument("--dry-run", action="store_true", help="only says what would be written")
    options = parser.parse_args()
    parts = {name: options.folder / f"{name}.json" for name in ("kernels", "decode")}
    texts = {name: options.folder / f"{name}.txt" for name in ("test", "sanitize")}
    result = {"hardware": hardware(), "provenance": provenance()}
    result |= {name: read_json(path) for name, path in parts.items() if path.exists()}
    result |= {name: path.read_text().strip().splitlines()[-12:] for name, path in texts.items() if path.exists()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    target = Path(__file__).with_name("results") / (re.sub(r"\W+", "-", gpu.lower()).strip("-") + ".json")
    if options.dry_run or gpu == "no gpu":
        print(f"would write {', '.join(result)} to {target.relative_to(Path.cwd())}")
    else:
        write_json(target, result)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
