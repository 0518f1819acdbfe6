"""Show what a data set or a preference file holds: users, pairs, splits, lengths, hash."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, words: list[str]) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="counts, lengths and hash of one data set")
    show.add_argument("name", help="demo, synthetic, pref_lamp, preferences, or the path of a .jsonl[.gz] or .parquet file")
    show.add_argument("--source", help="the file or folder, for data that the package does not carry")
    show.add_argument("--train-test", type=float, help="share of each train user's prompts to set aside (default 0.2)")
    show.add_argument("--seed", type=int, help="seed of that choice, or of the data themselves for synthetic (default 0)")
    actions.add_parser("list", help="the data sets by name")


def run(args: argparse.Namespace) -> dict:
    from pyargs import data

    if args.action == "list":
        return {"data_sets": data.names()}
    options = {name: value for name in ("train_test", "seed") if (value := getattr(args, name)) is not None}
    dataset = data.load(args.name, args.source, **options)
    return {"name": args.name, "source": args.source, **options} | summary(dataset)


def summary(dataset) -> dict:
    """Counts of a Dataset with the common columns; lengths are in words (split at white space)."""
    from statistics import mean, median

    from pyargs import data

    def words(value) -> int:
        texts = [value] if isinstance(value, str) else [message["content"] for message in value]
        return sum(len(text.split()) for text in texts)

    def spread(values: list) -> dict:
        return {"min": min(values), "median": median(values), "mean": round(mean(values), 2), "max": max(values)}

    table = {name: dataset[name][:] for name in dataset.column_names}
    splits = {}
    for split in data.SPLITS:
        users = [user for user, s in zip(table["user_id"], table["split"], strict=True) if s == split]
        if users:
            counts = [users.count(user) for user in dict.fromkeys(users)]
            splits[split] = {"pairs": len(users), "users": len(counts), "pairs_per_user": spread(counts)}
    prompts = {str(prompt): prompt for prompt in table["prompt"]}
    return {
        "pairs": len(dataset),
        "users": len(set(table["user_id"])),
        "prompts": len(prompts),
        "pair_ids": len(set(table["pair_id"])),
        "columns": dataset.column_names,
        "splits": splits,
        "words": {name: spread([words(value) for value in table[name]]) for name in ("prompt", "chosen", "rejected")},
        "sha256": data.content_hash(dataset),
    }
