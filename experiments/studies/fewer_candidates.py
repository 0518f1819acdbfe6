"""What fewer candidates do to guided answers: candidates a step, rewards, perplexity and ROUGE, beside all ten.

    python -m experiments.studies.fewer_candidates [--prompts 48] [--pairs 300] [--shared DIR] [--work DIR] [--out FILE]

LoRE (frozen SmolLM2-135M, the mean over tokens) learns the users of two sets, and guides SmolLM2-135M at strength 1 on the new
users' query prompts: the titles of pref_lamp_like/ci and the statements of persona_statements. `min_p` leaves out what is less
likely than so many times the likeliest; `reward_clip` bounds w r, and skips what cannot win then. Greedy, 10 candidates.

candidates: how many a step tries, and the share of steps with one. reward: of whole answers, in units of reward_std, by the
unclipped head. perplexity: under the policy. ROUGE-1: against what the user wrote or chose. same: answers that are those with
all ten. Differences to all ten with 95% intervals over users. A cell is written when it is done, and not done twice.
Speed is `benchmarks/bench_candidates.py`'s.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import pyargs
from experiments.studies.data_statistics import SETS, load
from pyargs import files
from pyargs.data import of_split
from pyargs.decode.engine import Engine
from pyargs.methods import lore
from pyargs.metrics.bootstrap import user_difference
from pyargs.metrics.overlap import rouge
from pyargs.metrics.perplexity import perplexity

HERE = Path(__file__).parents[1]
OUT = HERE / "results/fewer_candidates.json"
SHARED = HERE.parent.parent / "shared/data"
ROWS = {"pref_lamp, 40 users": 24, "persona_statements": 24}  # set -> tokens of an answer
ALL = "all ten"
WISHES = {
    ALL: {},
    **{f"min_p {p}": {"min_p": p} for p in (0.01, 0.02, 0.05, 0.1, 0.2)},
    **{f"reward_clip {c}": {"reward_clip": c} for c in (0.5, 1.0)},
}
K = 10


def trained(rows, folder: Path, pairs: int):
    """The model of a set: trained on the first `pairs` of its train rows, spread over users, and adapted; kept in a folder."""
    if not (folder / "config.json").is_file():
        train = of_split(rows, "train").shuffle(seed=0)
        some = train.select(range(min(pairs, len(train))))
        model = pyargs.train("lore", some, lore.Config(freeze_backbone=True, pool="mean"))
        pyargs.adapt(model, of_split(rows, "support"))
        model.save_pretrained(folder)
    return pyargs.load_model(folder)


def asked(rows, count: int) -> list[dict]:
    """Of the new users' query rows with different prompts so many, the users taking turns."""
    several: dict[str, dict] = defaultdict(dict)
    for row in of_split(rows, "query"):
        several[row["user_id"]].setdefault(str(row["prompt"]), row)
    turns = [list(own.values()) for own in several.values()]
    longest = max(map(len, turns))
    return [own[i] for i in range(longest) for own in turns if i < len(own)][:count]


def cell(engine: Engine, rows: list[dict], wish: dict, tokens: int) -> dict:
    """Answers with these settings, and what is measured of each."""
    started = time.perf_counter()
    prompts, users = [row["prompt"] for row in rows], [row["user_id"] for row in rows]
    how = dict(strength=1.0, num_candidates=K, max_new_tokens=tokens, logprobs=K)
    answers = engine.generate(prompts, users, progress=str(wish or ALL), **how, **wish)
    model, tried = engine.pair.model, [
        [sum(one.reward is not None for one in step.candidates) for step in answer.told] for answer in answers
    ]  # fmt: skip
    unit = next(iter(model.about["reward_std"].values()))
    rewards = model.score([(one.prompt, [one.tokens or one.prompt[-1:]]) for one in answers], users)
    steps = [count for own in tried for count in own]
    return {
        "candidates": round(sum(steps) / len(steps), 3),
        "alone": round(sum(count == 1 for count in steps) / len(steps), 4),
        "perplexity": perplexity(engine.pair.policy, [one.prompt for one in answers], [one.tokens for one in answers]),
        "users": users,
        "tokens": [one.tokens for one in answers],
        "reward": [round(own[0].item() / unit, 4) for own in rewards],
        "rouge1": [round(v, 3) for v in rouge([a.text for a in answers], [row["chosen"] for row in rows])["rouge1_each"]],
        "log_perplexity": [
            round(math.log(perplexity(engine.pair.policy, [one.prompt], [one.tokens])), 4) if one.tokens else 0.0
            for one in answers
        ],
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": files.provenance(0),
    }


def difference(one: dict, other: dict, name: str) -> str:
    """Mean difference over the answers, with its interval over users."""

    def by_user(cell: dict) -> dict[str, list[float]]:
        found = defaultdict(list)
        for user, value in zip(cell["users"], cell[name], strict=True):
            found[user].append(value)
        return found

    found = user_difference(by_user(one), by_user(other))
    if found["low"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def table(result: dict) -> str:
    """What was found, in Markdown."""
    lines = [
        "| set | | candidates | one alone | same answers | perplexity | log perplexity | reward | ROUGE-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if (free := result.get(f"{row} / {ALL}")) is None:
            continue
        for name in WISHES:
            if (one := result.get(f"{row} / {name}")) is None:
                continue
            same = sum(a == b for a, b in zip(one["tokens"], free["tokens"], strict=True)) / len(free["tokens"])
            if one is free:
                means = [f"{sum(free[what]) / len(free[what]):.2f}" for what in ("log_perplexity", "reward", "rouge1")]
            else:
                means = [difference(one, free, what) for what in ("log_perplexity", "reward", "rouge1")]
            lines.append(
                f"| {row} | {name} | {one['candidates']:.1f} | {100 * one['alone']:.0f}% | {100 * same:.0f}% | "
                f"{one['perplexity']:.1f} | {' | '.join(means)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="of each set (default 48)")
    parser.add_argument("--pairs", type=int, default=300, help="to train on, of each set (default 300)")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--work", type=Path, default=files.cache_dir() / "fewer_candidates")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    result = files.read_json(options.out) if options.out.exists() else {}
    sizes = {"prompts": options.prompts, "pairs": options.pairs}
    if result.setdefault("sizes", sizes) != sizes:
        raise SystemExit(f"{options.out} has cells of {result['sizes']}: name another --out")
    for row, tokens in ROWS.items():
        left = [name for name in WISHES if f"{row} / {name}" not in result]
        if not left:
            continue
        name, where, how = SETS[row]
        if not (options.shared / where).exists():
            raise SystemExit(f"no {options.shared / where}: this experiment needs the shared data")
        data = load(name, options.shared / where, how, options.work / "data")[0]
        folder = options.work / f"{files.short_hash([row, options.pairs])}"
        engine = Engine("smollm2-135m", trained(data, folder, options.pairs))
        rows = asked(data, options.prompts)
        for name in left:
            result[f"{row} / {name}"] = found = cell(engine, rows, WISHES[name], tokens)
            files.write_json(options.out, result)
            print(f"{row}, {name}: {found['candidates']} candidates a step, {found['seconds']} s", flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
