"""RM accuracy of every method on users with known tastes (simulated users over real statements), with the bounds to beat.

    python -m experiments.studies.persona_statements [--only METHOD ...] [--seeds 0 1 2] [--data FILE]

60 train users and 20 new ones each have a sign for each of ten attributes; a pair sets a statement with the attribute against
one without. A scorer that does not know the user can do no better than to guess each attribute's sign: `blind best` is the
best such guess for the query pairs themselves, which no method can know. A cell (method, seed) is written when it is done and
not done twice, unless its settings or the data are others; the table is made from the cells. Needs
../shared/data/persona_statements/prefs.jsonl.gz.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from experiments import rules
from pyargs import files
from pyargs.data import of_split, preferences
from pyargs.metrics.bootstrap import user_interval
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.training import adapt, hooks, trainer

HERE = Path(__file__).parents[1]
DATA = HERE.parent.parent / "shared/data/persona_statements/prefs.jsonl.gz"
OUT = HERE / "results/persona_statements.json"
TABLE = HERE / "results/persona_statements.md"

FROZEN = {"freeze_backbone": True}
METHODS = {  # row: (method, fields that are not its defaults)
    "Global RM v1": ("global_rm", FROZEN),
    "Global RM v2": ("global_rm", {**FROZEN, "pool": "mean"}),
    "LoRE": ("lore", FROZEN),
    "LoRE-Alt": ("lore", {**FROZEN, "alternate": True, "rank": 20}),
    "PReF": ("pref", FROZEN),
    "PAL-A": ("pal", {**FROZEN, "variant": "A", "epochs": 5}),
    "PAL-B": ("pal", {**FROZEN, "variant": "B", "epochs": 5}),
    "VPL": ("vpl", FROZEN),
    "MPU": ("mpu", FROZEN),
    "MPU-Avg": ("mpu", {**FROZEN, "pool": "mean"}),
    "zero-shot": ("icl", {"shots": 0}),
    "ICL": ("icl", {"shots": 2}),
    "ICL-RAG": ("icl", {"shots": 2, "retrieve": "minilm"}),
    "GenARM": ("genarm", {"epochs": 0.1}),
    "P-DPO": ("pdpo", {"epochs": 0.1, "adapt_steps": 5}),
}
BLIND = {"Global RM v1", "Global RM v2", "zero-shot", "GenARM"}  # rows that do not know the user
PERSONAL = [name for name in METHODS if name not in BLIND]


def cell(name: str, seed: int, data, data_hash: str) -> dict:
    """Trains and adapts one method; per-user accuracies on the new users' query pairs."""
    method, fields = METHODS[name]
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = trainer.train(method, data, hooks.method(method).Config(seed=seed, **fields))
        adapt.adapt(model, data)
    query = of_split(data, "query")
    if hasattr(model, "pair_scores"):
        scores = model.pair_scores(query)[1]
    else:
        total, length = model.pair_logprobs(query)
        scores = total / length
    right = defaultdict(list)
    for user, correct in zip(query["user_id"], (scores[:, 0] > scores[:, 1]).tolist(), strict=True):
        right[user].append(correct)
    return {
        **{key: value for key, value in rm_accuracy(scores, query["user_id"]).items() if key in ("accuracy", "tie_rate", "n")},
        "each": {user: round(100 * sum(values) / len(values), 2) for user, values in right.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "warnings": sorted({str(w.message) for w in caught if "PReF" in str(w.message)}),
        "fields": fields,
        "data": data_hash,
        "provenance": files.provenance(seed),
        "recipe": rules.NEWEST,
    }


def bounds(source: Path, data) -> dict:
    """Accuracies that need no model: of the train users' majority, and the best and worst that knowing the attribute gives."""
    matching = {row["pair_id"]: row["statement_matching"] for row in files.read_jsonl(source.with_name("pairs.jsonl.gz"))}
    votes = {split: Counter() for split in ("train", "query")}
    for row in data:
        if row["split"] in votes:
            votes[row["split"]][row["attribute"], 1 if row["chosen"] == matching[row["pair_id"]] else -1] += 1
    attributes = sorted({attribute for attribute, _ in votes["query"]})
    total = sum(votes["query"].values())
    majority = {a: 1 if votes["train"][a, 1] >= votes["train"][a, -1] else -1 for a in attributes}
    return {
        "coin": 50.0,
        "train majority": 100 * sum(votes["query"][a, majority[a]] for a in attributes) / total,
        "blind worst": 100 * sum(min(votes["query"][a, s] for s in (1, -1)) for a in attributes) / total,
        "blind best": 100 * sum(max(votes["query"][a, s] for s in (1, -1)) for a in attributes) / total,
    }


def interval(cells: list[dict]) -> tuple[float, float, float]:
    """Mean over users of each one's accuracy, all seeds of a user together, and its 95% interval over users."""
    found = user_interval({user: [cell["each"][user] for cell in cells] for user in cells[0]["each"]})
    return found["mean"], found["low"], found["high"]


def older(name: str, cell: dict) -> list[rules.Rule]:
    """The rules that came after a cell and touch it (cells that note none are of recipe 2)."""
    about = {"row": name, "set": "persona_statements", "method": METHODS[name][0], "fields": cell["fields"], "values": {}}
    return rules.older({**about, "key": {"recipe": cell.get("recipe", 2)}})


def table(result: dict) -> str:
    best = result["bounds"]["blind best"]
    lines = [
        "# Users with known tastes: RM accuracy on the query pairs of 20 new users",
        "",
        f"`python -m experiments.studies.persona_statements`; {result['pairs']} pairs of {result['users']} users to train on, "
        f"{result['support']} support and {result['query']} query pairs of the new ones. SmolLM2-135M, its backbone frozen "
        "(GenARM, P-DPO: LoRA). Settings are those that are not the methods' defaults. Mean over the new users with the 95% "
        "interval over them (bootstrap, widened for few users), all seeds of a user together; then each seed's.",
        "",
        "| row | settings | accuracy | 95% interval | seeds | knows the user | beats every blind scorer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in result["bounds"].items():
        lines.append(f"| *{name}* | | {value:.1f} | | | no | |")
    for name in METHODS:
        cells = [result["cells"][key] for key in sorted(result["cells"]) if key.rpartition(" / ")[0] == name]
        settings = ", ".join(f"{k}={v}" for k, v in METHODS[name][1].items() if k != "freeze_backbone")
        if not cells:
            lines.append(f"| {name} | {settings} | not run | | | | |")
            continue
        mean, low, high = interval(cells)
        seeds = ", ".join(f"{c['accuracy']:.1f}" for c in cells)
        beats = "" if name in BLIND else "**yes**" if low > best else "no"
        knows = "no" if name in BLIND else "yes"
        lines.append(f"| {name} | {settings} | {mean:.1f} | {low:.1f} to {high:.1f} | {seeds} | {knows} | {beats} |")
    lines += [
        "",
        f"`blind best` ({best:.1f}%) is the most that any scorer that ignores the user, yet knows the attribute, can get on "
        "these query pairs; `train majority` follows the sign that most train users have.",
    ]
    behind = defaultdict(set)
    for key, one in result["cells"].items():
        for rule in older(key.rpartition(" / ")[0], one):
            behind[rule.before].add(key.rpartition(" / ")[0])
    for before, rows in behind.items():
        lines += ["", f"Made by the older rule: {before}. {', '.join(sorted(rows))}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if not options.data.is_file():
        raise SystemExit(f"no {options.data}: this experiment needs the shared data")
    data = preferences.load(options.data, train_test=0.0)
    part = {split: of_split(data, split) for split in ("train", "support", "query")}
    result = files.read_json(OUT) if OUT.exists() else {"cells": {}}
    result |= {
        "data": files.sha256(options.data),
        "bounds": bounds(options.data, data),
        "users": len(set(part["train"]["user_id"])),
        "pairs": len(part["train"]),
        "support": len(part["support"]),
        "query": len(part["query"]),
    }
    for name in options.only:
        for seed in options.seeds:
            old = result["cells"].get(f"{name} / {seed}")
            if old is None or old["fields"] != METHODS[name][1] or old["data"] != result["data"] or older(name, old):
                result["cells"][f"{name} / {seed}"] = cell(name, seed, data, result["data"])
                found = result["cells"][f"{name} / {seed}"]
                print(f"{name}, seed {seed}: {found['accuracy']:.1f} in {found['seconds']} s", flush=True)
                files.write_json(OUT, result)
    files.write_json(OUT, result)
    files.write_text(TABLE, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
