"""Every verb where no extra is installed: each works, or ends with one line that names the extra it needs.

    python without_extras.py FOLDER [--model smollm2-135m] [--hide]

`.ci/core` runs it where the optional packages are missing; tests/test_extras.py hides them. It needs nothing of the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path

OPTIONAL = (
    *("bert_score", "bm25s", "fastapi", "lm_eval", "matplotlib", "prometheus_client", "pydantic", "ray", "requests", "rich"),
    *("sentence_transformers", "sklearn", "uvicorn", "vllm"),
)


def pairs() -> list[dict]:
    """Of three users, one of them new: each wants what is long, or what is short."""
    rows = []
    for number in range(6):
        for user, splits in (("ann", ("train",)), ("bob", ("train",)), ("cid", ("support", "query"))):
            texts = [f"Yes, number {number}.", f"Yes, and number {number} is worth a longer answer."]
            rows.append(
                {
                    "user_id": user,
                    "prompt": f"What about number {number}?",
                    "chosen": texts[user == "ann"],
                    "rejected": texts[user != "ann"],
                    "split": splits[number % len(splits)],
                }
            )
    return rows


def verbs(model: str) -> list[tuple[str, str | None]]:
    """Command lines and the extra that each needs; those that need none work, in this order."""
    data = "--data pairs.jsonl"
    few = f"{data} --limit 2 --max-new-tokens 4"
    guided = f"--policy {model} --reward-weight 1"
    answers = f"evaluate lore {guided} {data} --generations answers.jsonl"
    return [
        ("env", None),
        ("models list", None),
        ("data list", None),
        ("data show pairs.jsonl", None),
        ("data check pairs.jsonl --embedder none", None),
        ("data check pairs.jsonl", "evaluate"),
        ("data build preferences --source pairs.jsonl --embedder none --out built", None),
        ("data build tldr --source hub --embedder none --out tldr", "prepare"),
        ("data build pref_lamp --source hub --embedder minilm --out lamp", "evaluate"),
        (f"train lore {data} --backbone {model} --freeze-backbone --rank 2 --out seen", None),
        (f"adapt seen {data} --out lore", None),
        (f"tune lore --policy {model} --data pairs.jsonl --prompts 2 --max-new-tokens 4 --out tune.json", None),
        (f"decode lore {guided} {few} --out answers.jsonl", None),
        (f"decode lore {guided} {few} --on ray --out ray.jsonl", "ray"),
        (f"{answers} --out result.json", None),
        (f"{answers} --bertscore minilm --out scored.json", "evaluate"),
        ("forget lore cid --out forgotten", None),
        ("push lore me/lore --data three --data-licence CC0-1.0 --users hashed --out staged", None),
        (f"train global_rm {data} --backbone tiny-random --epochs 1 --out trained", None),
        (f"train icl {data} --backbone tiny-random --shots 2 --retrieve bm25 --out bm25", None),
        (f"adapt bm25 {data} --out bm25-cid", None),
        (f"decode bm25-cid {few} --out bm25.jsonl", "evaluate"),
        (f"train icl {data} --backbone tiny-random --shots 2 --retrieve minilm --out near", None),
        (f"adapt near {data} --out near-cid", None),
        (f"decode near-cid {few} --out near.jsonl", "evaluate"),
        ("demo --out demo", "demo"),
        ("key keys.json ops --admin", None),
        (f"serve lore --policy {model}", "serve"),
        (f"serve lore --policy {model} --on ray", "ray"),
    ]


def outcome(line: str, extra: str | None) -> str | None:
    """What is wrong with how a verb ends, or None."""
    from pyargs import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(line.split())
        except SystemExit as error:  # of argparse
            code = error.code
    said = err.getvalue().strip()
    if extra is None:
        return None if code == 0 else f"ended with {code}: {said}"
    named = code == 1 and said.endswith(f"Fix: pip install 'pyargs[{extra}]'") and "Traceback" not in said
    return None if named else f"ended with {code} without naming {extra}: {said}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny-random")
    parser.add_argument("--hide", action="store_true", help="make the optional packages look missing")
    args = parser.parse_args()
    if args.hide:
        sys.modules.update(dict.fromkeys(OPTIONAL))  # None: Python's own way of saying that there is no such module
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    wrong = 0
    for line, extra in verbs(args.model):
        problem = outcome(line, extra)
        print(f"{'FAILED' if problem else 'ok':<7}{f'needs {extra}' if extra else 'works':<15} pyargs {line}", flush=True)
        if problem:
            print(problem, flush=True)
            wrong += 1
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
