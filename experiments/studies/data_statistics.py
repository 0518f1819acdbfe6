"""What every data set holds, beside the paper's: users, pairs, lengths, similarity of the two responses, user-blind scorers.

    python -m experiments.studies.data_statistics [SET ...] [--shared ../shared/data] [--work output/data]

Sets that have a source are built first (`pyargs data build`, into --work; the full pref_lamp embeds 27,000 abstracts, once, 20
minutes on two cores). A set that was done is done again only if its data changed; results/data_statistics.json holds numbers
only, and tables/data_statistics.md is made from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments import rules
from pyargs import data, files, prepare
from pyargs.config import check_fields
from pyargs.lm.embed import embed
from pyargs.metrics.blind import blind, contents, sample
from pyargs.prepare.statistics import spread, statistics

HERE = Path(__file__).parents[1]
OUT, TABLE = HERE / "results/data_statistics.json", HERE / "results/data_statistics.md"
EXPECTED = HERE / "expected/data_statistics.json"

# row -> (data set, where in --shared, options of its build or, without a build, of load)
SETS = {
    "pref_lamp": ("pref_lamp", "pref_lamp_like", {"embedder": "minilm"}),
    "pref_lamp, 40 users": ("pref_lamp", "pref_lamp_like/ci", {"embedder": "minilm"}),
    "pref_lamp, 40 users, policy's titles": (
        "pref_lamp",
        "pref_lamp_like/ci",
        {"embedder": "minilm", "negatives": "policy", "dtype": "bfloat16"},
    ),
    "hh_rlhf_users, length": ("hh_rlhf_users", "hh_rlhf_users", {"users": "length"}),
    "hh_rlhf_users, two types": ("hh_rlhf_users", "hh_rlhf_users", {"users": "two_types"}),
    "persona_statements": ("persona_statements", "persona_statements", {}),
    "pandalm_annotators": ("pandalm_annotators", "pandalm_annotators", {}),
    "200 simulated users over persona's pairs": (
        "preferences",
        "persona_statements/prefs.jsonl.gz",
        {"simulated_users": 200, "simulated_new_users": 20, "labels_per_pair": 50, "by": "pair"},
    ),
}


def load(name: str, source: Path, options: dict, work: Path):
    """The set as a Dataset, and the counts of its build where it has one."""
    if name not in prepare.names():
        return data.load(name, source, **options), None
    settings = prepare.config(name)(**options)
    check_fields(settings)
    out = work / files.short_hash([name, str(source), options])
    if not (out / "dataset.json").is_file():
        prepare.build(name, source, out, settings)
    return data.load(out), files.read_json(out / "dataset.json")["counts"]


def measure(dataset) -> dict:
    rows = sample(len(dataset))
    some = dataset.select(rows)
    one, two = (embed("minilm", some[side][:], progress=True) for side in ("chosen", "rejected"))
    return {
        **statistics(dataset),
        "blind": blind(*(dataset[name][:] for name in ("prompt", "chosen", "rejected", "user_id"))),
        "cosine_of_the_responses": {**spread([round(float(c), 4) for c in (one * two).sum(1)]), "n": len(rows)},
        "content_words": spread([len(text.split()) for text in contents(dataset["prompt"][:])]),
    }


def table(found: dict, paper: dict) -> str:
    lines = [
        "# Data sets",
        "",
        "`python -m experiments.studies.data_statistics`. Means; a train user's pairs are those of train and train_test. "
        "LaMP-5 itself is not to be had here: `pref_lamp` is built from a stand-in, ACL and arXiv papers in its format.",
        "",
        "| set | train users | pairs each | adapt users | support + query each | words of prompt, chosen, rejected | "
        "cosine of the two responses | users per pair |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in paper.items():
        if "train_users" in s:
            lines.append(
                f"| *{name}, paper* | {s['train_users']} | {s['train_prefs_per_user']} | {s['adapt_users']} | "
                f"{s['adapt_prefs_per_user']} (support) | | | |"
            )
        else:
            lines.append(
                f"| *{name}, paper* | {s['unique_users']} | {s['avg_samples_per_user']} | | | | | {s['users_per_triple']} |"
            )
    for name, s in found.items():
        of = {split: (v["users"], v["pairs"]) for split, v in s["splits"].items()}
        train, adapt = ([of[x] for x in names if x in of] for names in (("train", "train_test"), ("support", "query")))
        each = [f"{sum(p for _, p in part) / part[0][0]:.1f}" if part else "" for part in (train, adapt)]
        halves = f"{each[1]} ({' + '.join(f'{p / u:.1f}' for u, p in adapt)})" if adapt else ""
        words = ", ".join(f"{s['words'][side]['mean']:.0f}" for side in ("prompt", "chosen", "rejected"))
        lines.append(
            f"| {name} | {train[0][0] if train else ''} | {each[0]} | {adapt[0][0] if adapt else ''} | {halves} | {words} | "
            f"{s['cosine_of_the_responses']['mean']:.2f} | {s['users_per_pair']['mean']:.1f} |"
        )
    scorers = list(dict.fromkeys(name for s in found.values() for name in s["blind"]))
    lines += [
        "",
        "## What scorers reach that do not know the user",
        "",
        "Accuracy in percent where more is better / less is better (the rest are ties); `word_overlap` is the share of the "
        "response's different words that stand in the prompt, `minilm_cosine` the similarity of both (2,000 pairs).",
        "",
        f"| set | {' | '.join(scorers)} |",
        f"|---|{'---|' * len(scorers)}",
    ]
    for name, s in found.items():
        cells = [f"{s['blind'][x]['accuracy']:.1f} / {s['blind'][x]['reversed']:.1f}" for x in scorers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for rule in rules.RULES:
        about = {
            name: {"set": s["data_set"], "row": "", "values": {}, "key": {"recipe": s.get("recipe", 2)}}
            for name, s in found.items()
            if s["options"].get("negatives") != "policy"
        }
        if behind := [name for name, one in about.items() if rule in rules.older(one)]:
            lines += ["", f"Made by the older rule: {rule.before}. {'; '.join(behind)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="rows to measure (default: all): " + "; ".join(SETS))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=HERE.parent / "output/data")
    args = parser.parse_args()
    found = files.read_json(OUT)["sets"] if OUT.exists() else {}
    for row in args.sets or SETS:
        name, where, options = SETS[row]
        if not (args.shared / where).exists():
            print(f"{row}: no data at {args.shared / where}: skipped")
            continue
        dataset, counts = load(name, args.shared / where, options, args.work)
        if found.get(row, {}).get("sha256") != data.content_hash(dataset):
            made = {"data_set": name, "options": options, "counts": counts, "recipe": rules.NEWEST}
            found[row] = {**made, **measure(dataset)}
            print(f"{row}: {len(dataset)} pairs of {found[row]['users']} users")
        files.write_json(
            OUT,
            {
                "command": "python -m experiments.studies.data_statistics",
                "sets": {r: found[r] for r in SETS if r in found},
                "provenance": {k: v for k, v in files.provenance(0).items() if k != "command"},
            },
        )
    files.write_text(TABLE, table({r: found[r] for r in SETS if r in found}, files.read_json(EXPECTED)))


if __name__ == "__main__":
    main()
