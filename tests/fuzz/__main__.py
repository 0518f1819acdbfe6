"""Hostile input for everything that reads what others wrote: `PYTHONPATH=.:tests python -m fuzz [ENTRY ...] [--inputs N N]`.

Each entry point gets valid artefacts with one to three changes. Such an input is refused by a PyargsError of one line that
names the file or field, or it is accepted, gives numbers, and is the same when it is saved and read again. It runs, imports,
fetches and opens nothing of elsewhere, and takes no more time and memory than its size allows. Anything else is a violation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

CHEAP = {
    "tuned file": ("reading", "tuned_file", ("tuned",)),
    "tuned beside a model": ("reading", "tuned_beside", ("tuned",)),
    "record of a stage": ("reading", "stage", ("config",)),
    "result of evaluate": ("reading", "results", ("publish/card",)),
    "keys of a service": ("reading", "keys", ("serve/keys",)),
    "users' table": ("reading", "users", ("types", "user_ids")),
    "safetensors file": ("reading", "tensors", ("files",)),
    "pairs, JSON": ("reading", "pairs", ("data/schema", "data/sources", "data/preferences")),
    "pairs, parquet": ("reading", "parquet", ("data/schema", "data/sources", "data/preferences")),
    "head of a GGUF file": ("reading", "gguf", ("lm/bits",)),
    "settings of a model": ("reading", "settings_of_a_model", ("lm/inert",)),
    "settings of a method": ("reading", "configs", ("config", "training/config")),
    "kinds of values": ("reading", "described_kinds", ("config",)),
    "bodies of requests": ("asking", "bodies", ("serve/wire", "serve/plan")),
    "arguments of ops": ("asking", "ops", ("ops/*",)),
}
"""Entry points that take a few milliseconds: the module here, its function, and the modules of pyargs that it is about."""
LOADING = {
    "reward model": ("models", "reward", ("models/folder", "models/reward_model", "lm/lora", "types")),
    "token reward": ("models", "token", ("models/folder", "models/token_reward", "lm/lora")),
    "user policy, soft prompts": ("models", "soft", ("models/folder", "models/user_policy", "types")),
    "user policy, demonstrations": ("models", "icl", ("models/folder", "models/user_policy", "models/demonstrations")),
    "language model": ("models", "language_model", ("lm/loading", "lm/inert")),
    "GGUF file": ("models", "gguf_model", ("lm/loading", "lm/bits")),
    "GGUF file as blocks": ("models", "gguf_blocks", ("lm/loading", "lm/bits", "lm/stack/keep", "lm/stack/pack")),
    "running service": ("asking", "service", ("serve/app", "serve/wire", "serve/plan", "serve/answers", "serve/users")),
}
"""Those that load or run a model."""
SECONDS, MEMORY = 30.0, 3 << 30
"""The most that one input may take, and that a process may take beyond what it has when it begins."""


def prepared(name: str):
    import importlib

    module, function, _ = (CHEAP | LOADING)[name]
    found = importlib.import_module(f"fuzz.{module}")
    return getattr(found, function, None) or found.of_kind(function)


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> dict:
    """Tries so many inputs at an entry point; counts, and each kind of violation with its first input."""
    from fuzz.guard import Guard, Violation, limit_memory
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from pyargs.errors import PyargsError

    own, outside = folder / "own", folder / "outside"
    for one in (own, outside):
        one.mkdir(parents=True)
    attempt, names = prepared(name)(own, outside)
    found = {"inputs": 0, "refused": 0, "accepted": 0, "violations": {}}
    (outside / "trap.py").write_text("raise SystemExit('it was run')\n")
    guard = Guard(folder.parent, outside)
    limit_memory(MEMORY)

    def note(kind: str, what: str, error: BaseException) -> None:
        same = found["violations"].setdefault(kind, {"times": 0, "input": what[:1500], "error": f"{error!r}"[:600]})
        same["times"] += 1

    @settings(
        max_examples=inputs, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @seeded(seed)
    @given(st.randoms(use_true_random=False))
    def one(random) -> None:
        said = []
        found["inputs"] += 1
        try:
            with guard.watching(SECONDS), contextlib.redirect_stderr(io.StringIO()):
                attempt(random, said)
        except PyargsError as error:
            found["refused"] += 1
            text = str(error)
            if len(text) < 10 or len(text) > 2000 or "\n" in text:
                note("a message of no line", str(said), error)
            elif not any(part in text for part in names):
                note(f"a message that names nothing: {text[:40]}", str(said), error)
            elif "not enough memory" in text:
                note("memory was asked for", str(said), error)
        except Violation as error:
            note(str(error).partition(" ")[0] + place(error), str(said), error)
        except Exception as error:
            note(f"{type(error).__name__}{place(error)}", str(said), error)
        except BaseException as error:  # a panic of Rust's, say
            if isinstance(error, KeyboardInterrupt) or type(error).__module__.startswith("hypothesis"):
                found["inputs"] -= 1
                raise
            note(f"{type(error).__name__}{place(error)}", str(said), error)
        else:
            found["accepted"] += 1

    began = time.perf_counter()
    one()
    guard.close()
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def place(error: BaseException) -> str:
    """Where in pyargs it was raised, or was called from."""
    ours = [one for one in traceback.extract_tb(error.__traceback__) if f"{os.sep}pyargs{os.sep}" in one.filename]
    last = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    return f" at {Path(last.filename).name}:{last.lineno}"


def covered(name: str, data: Path) -> float | None:
    """Percent of the branches of the modules that an entry point is about."""
    from coverage import Coverage

    found = Coverage(data_file=str(data))
    found.load()
    include = [f"*/pyargs/{module}.py" for module in (CHEAP | LOADING)[name][2]]
    out = data.with_suffix(".json")
    found.json_report(include=include, outfile=str(out))
    totals = json.loads(out.read_text())["totals"]
    return round(100 * totals["covered_branches"] / max(1, totals["num_branches"]), 1)


def alone(name: str, inputs: int, seed: int) -> dict:
    """An entry point in a process of its own, with the coverage of branches where the package `coverage` is there."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "coverage", Path(folder) / "found.json"
        words = [
            sys.executable,
            "-m",
            "fuzz",
            name,
            "--inputs",
            str(inputs),
            str(inputs),
            "--seed",
            str(seed),
            "--here",
            str(out),
        ]
        try:
            import coverage  # noqa: F401

            words[1:3] = ["-m", "coverage", "run", "--branch", "--source=pyargs", f"--data-file={data}", "-m", "fuzz"]
        except ModuleNotFoundError:
            pass
        ended = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).returncode
        if not out.exists():
            return {"inputs": 0, "refused": 0, "accepted": 0, "violations": {f"the process ended with {ended}": {}}}
        found = json.loads(out.read_text())[name]
        return found | {"branches": covered(name, data) if data.exists() else None}


def here(names: list[str], counts: tuple[int, int], seed: int) -> Iterator[tuple[str, dict]]:
    """Entry points one after the other in this process: name and counts of each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYARGS_CACHE"] = os.environ["HF_HOME"] = f"{folder}/cache"
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{folder}/hypothesis"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch

        torch.set_num_threads(1)
        for number, name in enumerate(names):
            yield name, fuzz(name, counts[name in LOADING], seed, Path(folder) / str(number))


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENTRY", help="default: all")
    parser.add_argument(
        "--inputs", type=int, nargs=2, default=(50_000, 2_000), help="of a cheap entry point; of a loading one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for counts and violations")
    parser.add_argument("--here", type=Path, help="as --out, but all in this process")
    args = parser.parse_args()
    names = args.names or [*CHEAP, *LOADING]
    if unknown := set(names) - {*CHEAP, *LOADING}:
        parser.error(f"no entry point {min(unknown)}; there are: {', '.join([*CHEAP, *LOADING])}")
    found = {}
    for name, one in here(names, args.inputs, args.seed) if args.here else ():
        found[name] = one
        args.here.write_text(json.dumps(found, indent=1))
    for name in () if args.here else names:
        found[name] = alone(name, args.inputs[name in LOADING], args.seed)
        print(f"{name}: {line(found[name])}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1))
    wrong = {name: one["violations"] for name, one in found.items() if one["violations"]}
    for name, several in wrong.items():
        for kind, what in several.items():
            print(f"{name}: {kind}\n  {what}", file=sys.stderr)
    return 1 if wrong else 0


def line(found: dict) -> str:
    branches = "branches not measured" if found.get("branches") is None else f"{found['branches']} % of branches"
    counts = f"{found['inputs']} inputs, {found['refused']} refused, {found['accepted']} accepted"
    return f"{counts}, {len(found['violations'])} kinds of violations, {branches}, {found.get('seconds')} s"


if __name__ == "__main__":
    sys.exit(main())
