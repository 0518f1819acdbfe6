"""A decode step of two checkouts of this project in turns, in one run: what a change costs.

    python benchmarks/before_after.py BEFORE AFTER [--json FILE] [--rounds 8] [--steps 24] [--threads N]

Each folder is a checkout with its extension built in place. Each runs the loop "pyargs" of its own benchmarks/bench_decode.py,
on the same models and prompts, in a process of its own, and waits while the other one is timed. `after/before` is the median
over the rounds of the ratio of their median steps; `spread` is half the distance between its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CASES = [(1, 64), (1, 256), (8, 64), (8, 256)]
WORKER = """
import json, sys
import torch
import bench_decode as bench
torch.set_num_threads(int(sys.argv[1]))
policy, tokenizer, model, merged = bench.models("smollm2-135m", torch.float32)
print("ready", flush=True)
for line in sys.stdin:
    rows, length, steps = json.loads(line)
    ids, users = bench.prompts(tokenizer, rows, length), [bench.USERS[i % len(bench.USERS)] for i in range(rows)]
    clock = bench.Clock()
    found = bench.loops(policy, model, merged, ids, users, steps)["pyargs"](clock)
    print(json.dumps([clock.step(), found.tokens.tolist()]), flush=True)
"""


class Checkout:
    """A process that times steps in a checkout."""

    def __init__(self, folder: Path, threads: int):
        path = os.pathsep.join(map(str, (folder.resolve(), folder.resolve() / "benchmarks")))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(threads)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while (said := self.process.stdout.readline().strip()) != "ready":
            if self.process.poll() is not None:
                sys.exit(f"{folder} cannot be timed: {said}")

    def step(self, *case: int) -> tuple[float, list]:
        """Seconds of a step, and the tokens."""
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def commit(folder: Path) -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    from timing import hardware, hardware_line, table

    load, both = os.getloadavg()[0], [Checkout(folder, args.threads) for folder in (args.before, args.after)]
    results = []
    for rows, length in CASES:
        seconds, same = ([], []), True
        for _ in range(args.rounds + 1):  # the first warms up
            found = [one.step(rows, length, args.steps) for one in both]
            same &= found[0][1] == found[1][1]
            for kept, (value, _) in zip(seconds, found, strict=True):
                kept.append(value)
        before, after = (values[1:] for values in seconds)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        results.append(
            {
                "B": rows,
                "T": length,
                "before ms": round(1e3 * statistics.median(before), 2),
                "after ms": round(1e3 * statistics.median(after), 2),
                "after/before": round(statistics.median(ratios), 3),
                "spread": round((high - low) / 2, 3),
                "same tokens": same,
            }
        )
        print(
            table(results[-1:], list(results[-1])) if len(results) == 1 else " | ".join(map(str, results[-1].values())),
            flush=True,
        )
    record = {
        "commits": [commit(args.before), commit(args.after)],
        "threads": args.threads,
        "load before": round(load, 2),
        "steps": results,
        "hardware": hardware(),
    }
    print(table(results, list(results[0])))
    print(hardware_line(record["hardware"]))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
