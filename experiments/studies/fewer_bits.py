"""What weights in fewer bits do to answers and to RM accuracy, beside float32.

    python -m experiments.studies.fewer_bits [--prompts 32] [--pairs 150] [--shared DIR] [--work DIR] [--out FILE]

The models and prompts of `fewer_candidates`: LoRE on frozen SmolLM2-135M guides it at strength 1. Policy and reward model rest
on the same weights, so that both are in the dtype (bfloat16: the policy alone). Greedy, 10 candidates.

same: answers that are float32's; tokens: the share before the first that differs. perplexity: of the policy in this dtype on
float32's answers, and on what users wrote or chose. RM accuracy: of the query pairs, with the backbone in this dtype. ROUGE-1:
against what the user wrote or chose. Differences to float32 with 95% intervals over users. A cell is written when it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from experiments.studies import fewer_candidates as candidates
from pyargs import files
from pyargs.data import of_split
from pyargs.decode.engine import Engine
from pyargs.decode.pair import load_pair
from pyargs.lm.tokenize import encode_response
from pyargs.metrics.overlap import rouge
from pyargs.scoring import response_logprobs

OUT = candidates.HERE / "results/fewer_bits.json"
PAIRS = 200  # of the query split
DTYPES = ("float32", "bfloat16", "int8", "file")


def cell(folder: Path, dtype: str, data, rows: list[dict], given: list[list[int]] | None) -> dict:
    """What is measured with one dtype. given: float32's answers, None where these are float32's."""
    started = time.perf_counter()
    engine = Engine(*load_pair("smollm2-135m", str(folder), dtype=dtype))
    policy, model = engine.pair.policy, engine.pair.model
    prompts, users = [row["prompt"] for row in rows], [row["user_id"] for row in rows]
    how = dict(strength=1.0, num_candidates=10, max_new_tokens=candidates.TOKENS)
    answers = engine.generate(prompts, users, progress=dtype, **how)
    encoded = [one.prompt for one in answers]
    written = [encode_response(engine.pair.tokenizer, row["chosen"]) for row in rows]
    texts = [[own or [0], wrote] for own, wrote in zip(given or [one.tokens for one in answers], written, strict=True)]
    found = response_logprobs(policy, list(zip(encoded, texts, strict=True)))
    pairs = of_split(data, "query")
    pairs = pairs.select(range(min(PAIRS, len(pairs))))
    rewards = model.pair_scores(pairs)[1]
    return {
        "users": users,
        "tokens": [one.tokens for one in answers],
        "log_perplexity": [round(-own.mean().item(), 5) for own, _ in found],
        "log_perplexity_written": [round(-wrote.mean().item(), 5) for _, wrote in found],
        "rouge1": [round(v, 3) for v in rouge([one.text for one in answers], [row["chosen"] for row in rows])["rouge1_each"]],
        "pair_users": list(pairs["user_id"]),
        "right": [100.0 * one for one in (rewards[:, 0] > rewards[:, 1]).tolist()],
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": files.provenance(0),
    }


def table(result: dict) -> str:
    """What was found, in Markdown."""
    lines = [
        "| set | dtype | same answers | tokens | log perplexity | of what was written | ROUGE-1 | RM accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in candidates.ROWS:
        if (right := result.get(f"{row} / float32")) is None:
            continue
        for dtype in DTYPES:
            if (one := result.get(f"{row} / {dtype}")) is None:
                continue
            both = list(zip(one["tokens"], right["tokens"], strict=True))
            same = sum(a == b for a, b in both) / len(both)
            before = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair))) for pair in both]  # noqa: B905
            agree = sum(before) / sum(len(b) for _, b in both)
            names = ("log_perplexity", "log_perplexity_written", "rouge1")
            if one is right:
                cells = [f"{sum(right[name]) / len(right[name]):.3f}" for name in (*names, "right")]
            else:
                cells = [candidates.difference(one, right, name) for name in names]
                by_pair = [{**cell, "users": cell["pair_users"]} for cell in (one, right)]
                cells.append(candidates.difference(*by_pair, "right"))
            lines.append(f"| {row} | {dtype} | {100 * same:.0f}% | {100 * agree:.0f}% | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    def begin(folder: Path, data, rows: list[dict], done: dict) -> Callable[[str], dict]:
        return lambda dtype: cell(folder, dtype, data, rows, done["float32"]["tokens"] if "float32" in done else None)

    candidates.study(__doc__, OUT, DTYPES, begin, table)


if __name__ == "__main__":
    main()
