"""What fewer candidates do to guided answers: candidates a step, rewards, perplexity and ROUGE, beside all ten.

    python -m experiments.studies.fewer_candidates [--only SET ...] [--prompts 32] [--pairs 150] [--out FILE]

LoRE (frozen SmolLM2-135M, the mean over tokens) learns the users of two sets, and guides SmolLM2-135M at strength 1 on the new
users' query prompts: the titles of pref_lamp_like/ci and the statements of persona_statements. `min_p` leaves out what is less
likely than so many times the likeliest; `reward_clip` bounds w r, and skips what cannot win then. Greedy, 10 candidates.

candidates: how many a step tries, and the share of steps with one. perplexity: under the policy. reward: the mean over an
answer's tokens, in units of reward_std, of the unclipped head. ROUGE-1: against what the user wrote or chose. same: answers
that are those with all ten. Differences to all ten have 95% intervals over users. A cell is written when it is done, and not
done twice. Speed is `benchmarks/bench_candidates.py`'s.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pyargs
from pyargs import files
from pyargs.data import load, of_split
from pyargs.decode.engine import Engine
from pyargs.methods import lore
from pyargs.metrics.bootstrap import user_difference
from pyargs.metrics.overlap import rouge

HERE = Path(__file__).parents[1]
OUT = HERE / "results/fewer_candidates.json"
SHARED = HERE.parent.parent / "shared/data"
ROWS = {"pref_lamp": "pref_lamp_like/ci", "persona_statements": "persona_statements"}  # set -> where in --shared
TOKENS, SUPPORT = 24, 8  # of an answer; pairs of each new user
ALL = "all ten"
WISHES = {
    ALL: {},
    **{f"min_p {p}": {"min_p": p} for p in (0.01, 0.02, 0.05, 0.1, 0.2)},
    **{f"reward_clip {c}": {"reward_clip": c} for c in (0.5, 1.0)},
}
K = 10


def trained(rows, folder: Path, pairs: int) -> None:
    """Makes the model of a set, once: of `pairs` train pairs, drawn, and adapted to the first SUPPORT of each new user."""
    if not (folder / "config.json").is_file():
        train, support, count = of_split(rows, "train").shuffle(seed=0), of_split(rows, "support"), Counter()
        kept = [i for i, user in enumerate(support["user_id"]) if count.update([user]) or count[user] <= SUPPORT]
        model = pyargs.train(
            "lore", train.select(range(min(pairs, len(train)))), lore.Config(freeze_backbone=True, pool="mean")
        )
        pyargs.adapt(model, support.select(kept))
        model.save_pretrained(folder)


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
    started, model = time.perf_counter(), engine.pair.model
    prompts, users = [row["prompt"] for row in rows], [row["user_id"] for row in rows]
    how = dict(strength=1.0, num_candidates=K, max_new_tokens=tokens, logprobs=K)
    answers = engine.generate(prompts, users, progress=str(wish or ALL), **how, **wish)
    tried = [sum(one.reward is not None for one in step.candidates) for answer in answers for step in answer.told]
    rewards = [answer.rewards for answer in answers]
    if "reward_clip" in wish:  # those of the answers are clipped
        some = [(one.prompt, [one.tokens or one.prompt[-1:]]) for one in answers]
        rewards = [[own.item()] for (own,) in model.score(some, users)]
    unit = 1 / engine.raw_weight(1.0)
    return {
        "candidates": statistics.mean(tried),
        "alone": tried.count(1) / len(tried),
        "users": users,
        "tokens": [one.tokens for one in answers],
        "reward": [round(statistics.mean(own or [0.0]) / unit, 4) for own in rewards],
        "rouge1": [round(v, 3) for v in rouge([a.text for a in answers], [row["chosen"] for row in rows])["rouge1_each"]],
        "log_perplexity": [round(-statistics.mean([s.logprob for s in one.told] or [0.0]), 4) for one in answers],
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
                f"{math.exp(statistics.mean(one['log_perplexity'])):.1f} | {' | '.join(means)} |"
            )
    return "\n".join(lines) + "\n"


def study(about: str | None, out: Path, names: Iterable[str], begin: Callable, table: Callable[[dict], str]) -> None:
    """The command line of a study that measures each set under several names: what is done already stays.

    begin(folder of the set's model, its rows, prompts that are asked, the set's cells so far by name) gives measure(name).
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="SET", help=", ".join(ROWS))
    parser.add_argument("--prompts", type=int, default=32, help="of each set (default 32)")
    parser.add_argument("--pairs", type=int, default=150, help="to train on, of each set (default 150)")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--work", type=Path, default=files.cache_dir() / "fewer_candidates")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    result = files.read_json(options.out) if options.out.exists() else {}
    sizes = {"prompts": options.prompts, "pairs": options.pairs}
    if result.setdefault("sizes", sizes) != sizes:
        raise SystemExit(f"{options.out} has cells of {result['sizes']}: name another --out")
    for row in options.only:
        done = {name: result[f"{row} / {name}"] for name in names if f"{row} / {name}" in result}
        left = [name for name in names if name not in done]
        if not left:
            continue
        place = options.shared / ROWS[row]
        if not place.exists():
            raise SystemExit(f"no {place}: this experiment needs the shared data")
        data = load(row, place)
        folder = options.work / files.short_hash([row, options.pairs, SUPPORT])
        trained(data, folder, options.pairs)
        measure = begin(folder, data, asked(data, options.prompts), done)
        for name in left:
            result[f"{row} / {name}"] = done[name] = measure(name)
            files.write_json(options.out, result)
            print(f"{row}, {name}: {done[name]['seconds']} s", flush=True)
    print(table(result))


def main() -> None:
    def begin(folder: Path, _, rows: list[dict], __) -> Callable[[str], dict]:
        engine = Engine("smollm2-135m", pyargs.load_model(folder))
        return lambda name: cell(engine, rows, WISHES[name], TOKENS)

    study(__doc__, OUT, WISHES, begin, table)


if __name__ == "__main__":
    main()
