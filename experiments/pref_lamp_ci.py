"""Gathers the files of runs/pref_lamp.sh into one JSON: numbers, ids and our own generations, no text of the authors.

python experiments/pref_lamp_ci.py runs/output/pref_lamp > experiments/results/pref_lamp_ci.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pyargs.files import read_json, read_jsonl


def main(folder: Path) -> dict:
    found = {
        "command": "runs/pref_lamp.sh",
        "data": "pref_lamp_like/ci, prefs_minilm.jsonl.gz",
        "methods": {},
        "generations": {},
    }
    for method in ("global_rm", "lore"):
        result = read_json(folder / f"{method}-result.json")
        tuned, trained = read_json(folder / f"{method}-tune.json"), read_json(folder / f"{method}-train.json")
        found["methods"][method] = {
            "train": {k: trained[k] for k in ("pairs", "users", "steps", "trained_parameters", "config")},
            "tune": tuned,
            "result": result["values"],
            "inputs": result["inputs"],
        }
        found["provenance"] = {name: value for name, value in result["provenance"].items() if name != "command"}
    for file in sorted(folder.glob("*.jsonl")):
        found["generations"][file.stem] = [{k: row[k] for k in ("user_id", "pair_id", "text")} for row in read_jsonl(file)]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1, ensure_ascii=False))
