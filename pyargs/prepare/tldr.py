"""Reddit summaries with users who want them longer or shorter: the TL;DR comparisons of OpenAI, relabelled as in PAL.

Source: `openai/summarize_from_feedback`, comparisons (Stiennon et al. 2020): JSON Lines `comparisons/*.json`, or the hub's
parquet. The workers are real, their preferences are not: seven of the ten train workers prefer the longer summary, three
the shorter (Li et al. 2024; Chen et al. 2024), and so do 22 and 9 of the 31 workers to adapt to.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyargs.config import option
from pyargs.data import schema, sources
from pyargs.errors import PyargsError, extra
from pyargs.prepare.folder import Built

INSTRUCTION = "Summarize the following post in one or two sentences: "
LICENCE = "comparisons: Modified MIT (OpenAI 2020); Reddit posts of the TL;DR corpus: CC BY 4.0"
REPOSITORY = "openai/summarize_from_feedback"
SEED = 42  # of PAL's splits
# The ten workers with most rows, in order, and PAL's 31 new workers (data/cache of RamyaLab/pluralistic-alignment).
TRAIN_WORKERS = (
    "KZL1qeRzHNYSfDAuOctL1iyVV8WC5N ZzGCcAhvqF0HnKxNsUjtJFadcZdyZj p4Oh7rUGyLe1EpilJFWr9sPDpkO016 "
    "qo6WIyEh27cwAjWpA3Q60J7NaDxzQJ zKV8BFGy60O0q7102ALF84S6Jo5i4q i8YiBZlrYmlkkChr5b9BUKvDO6lR1d "
    "M3icahkfAtC9CJrtKgQ7qvyZ5SD8wC HNzkrs9geGu1YMMfZ5Qvdt0ZaCthfB Jxv4hxfb9zTVa5nsMDFlnjSX5LZ8MK "
    "UhQipwcpQmiGJmScocXOGOKyCBaFUg"
).split()
NEW_WORKERS = (
    "RMwrIV50cNusBthNvLs1wSNdqFpQAg M4bdOszgybjO2qg2Dth5I1GOYAvE7V gMlGeJl1vsMERrbmC7W717zpVevUh8 "
    "OKFDIsAZl6Qa0m9x26f5Ao4S0uc7Ca uvzut5OK2bvei9zoCDdktcfLENYioY iL7GfrbN2PeB3KInidqSxUdxYcTZmG "
    "BYcMzzjuFgaA59QDKoAgY07PyyG0qC p7cM83bE3XsWlS9lTIvYCNfCVgOeTK rmgbTjW1stlproQnuHE2bUpK78Jxle "
    "FCzllSEpfOHCBBEJqq4VeHRQR5JdoX P2p07Up4eJyvxrrVYgwtb60krbFbxI qNGw27c8LHVPn31uJvjg3k0MZQcqQv "
    "thott7XepukYSbOL2QgSlyXd0rgHvr 3AFaFd3w9NjDGnO51kupLyK1N44DQ2 I2enBRrckFHw3KjJRSfKgsBwg4tmZy "
    "D8z53gLFLFqhZowaegbtxmSGa0jqv0 a0nhcJKlk2aO06xuBTMkeHdx8MDY5w EeOYhWlpz7e45kXvg0RrfkjalZgkiz "
    "a7zXgbkuY6lk3vdt0q2Qf7SrZQgZ86 9UQLCFxeYndGNfHEUP3yRt8XZhrrPr 9YhRKOwkljIQ3NKf5CCV7BGjOcdPHu "
    "mjwVX7RHTcfOfLTYGdBvms3vy8LTtP 7FbjqRA85D0kaKh9cHs5BlfTGRQ3gM ISkqTUKflxjg9CBXeghrNug5YTZ3zS "
    "r3rJgaEN7p04d65VAVAejoMN02DsM9 7rETShtxBTLBtbJKVyfpUYUNJjQAOC 9HS4pwiJ58yNGPK9vPujWyDapy5e0k "
    "JwYQFRg76uas70g5HPUxA0jq6sEIo1 44Z8ttpKcY6Kr1sNymNnBA0nL0h4dZ aCMzb5a4UFnlycf71vTCuPTLxeDhTB "
    "sC4a4UNRMSYCGopXr3K8znnyna6TVh"
).split()
SHORTER = {*TRAIN_WORKERS[3:6], *NEW_WORKERS[22:]}
PARTS = {"train": "train", "valid1": "validation", "valid2": "validation", "validation": "validation"}  # of `split`
FULL = {"train rows": 92858, "validation rows": 86086}  # printed by public notebooks; then these must come out, too
EXPECTED = {
    "train rows kept": 38487,
    "validation rows kept": 16294,
    "rows of the ten workers": 23299,
    "validation rows of the ten workers": 4921,
}


@dataclass
class Config:
    support: int = option(100, "pairs of each new worker to adapt to; the rest is query (paper)", least=1)
    embedder: str = option("minilm", "sentence encoder of the cosine on the card; none leaves it out")


def build(source: str, config: Config) -> Built:
    """Pairs of the ten train workers (train, train_test) and the 31 new ones (support, query), as methods of PAL split them.

    source: the original folder (its `comparisons`, plain or .gz), a folder of the hub's parquet files, or "hub". Kept are rows
    whose two policies contain "sup" and neither "ppo" nor "cnn". Pairs of equal length in characters have no label and go
    before the splits are drawn. train: 90% of the ten workers' train rows; the other 10% share their posts and are not used.
    train_test: the ten workers' validation rows, the seen users' test split on which the paper chooses the weight (F.2). On
    the full source the published counts are asserted. Raises PyargsError: damaged or foreign files, a new worker with too few
    pairs.
    """
    draw = _drawing()
    if source == "hub":
        source = sources.from_hub(REPOSITORY, ["comparisons/**"], revision="refs/convert/parquet")
    paths = _paths(sources.local(source))
    counts: Counter[str] = Counter()
    kept: dict[str, list[dict]] = {"train": [], "validation": []}
    workers: Counter[str] = Counter()
    before: set[str] = set()
    for path in paths:
        for place, row in sources.rows(path):
            part, row = _row(place, row)
            counts[f"{part} rows"] += 1
            content = repr(row)
            counts["rows that are there before (the same worker, post and summaries)"] += content in before
            before.add(content)
            policies = [summary["policy"] for summary in row["summaries"]]
            if not all("sup" in policy and "ppo" not in policy and "cnn" not in policy for policy in policies):
                continue
            counts[f"{part} rows kept"] += 1
            if part == "train":
                workers[row["worker"]] += 1
            if row["post"]:
                kept[part].append(row)
            else:
                counts["rows without a post"] += 1

    ten, seen_test = ([row for row in rows if row["worker"] in TRAIN_WORKERS] for rows in kept.values())
    counts["rows of the ten workers"] = len(ten)
    counts["validation rows of the ten workers"] = len(seen_test)
    full = all(counts[name] == count for name, count in FULL.items())
    if full:
        _expect({name: counts[name] for name in EXPECTED}, EXPECTED)
        _expect([worker for worker, _ in workers.most_common(10)], TRAIN_WORKERS)

    def pairs(rows: list[dict]) -> list[dict]:
        found = [pair for row in rows if (pair := _pair(row))]
        counts["pairs of equal length (or with an empty summary) dropped"] += len(rows) - len(found)
        return found

    train, shares_posts = _stratified(draw, pairs(ten))
    counts["pairs that PAL holds out of the train rows, not used"] = len(shares_posts)
    splits = {"train": train, "train_test": pairs(seen_test), "support": [], "query": []}
    for worker in NEW_WORKERS:
        own = pairs([row for row in kept["validation"] if row["worker"] == worker])
        support, query = _support(draw, own, worker, config.support)
        splits["support"] += support
        splits["query"] += query
    counts["train pairs"] = len(train)
    longer = sum(worker not in SHORTER for worker in NEW_WORKERS)
    notes = [
        "The labels are a rule on length in characters, not the workers' choices. A reward that always prefers the longer "
        f"summary is right for {longer} of the {len(NEW_WORKERS)} new workers; without users hardly more can be had.",
        "train_test holds the ten workers' rows of the validation files (the paper's test split of seen users). New workers "
        "judge some of the same pairs there.",
        f"Prompt: '{INSTRUCTION}' and the post.",
    ]
    if not full:
        notes.append(
            f"Not the full source ({FULL['train rows']} + {FULL['validation rows']} rows): nothing could be asserted."
        )
    return Built([row | {"split": split} for split, rows in splits.items() for row in rows], dict(counts), notes, paths)


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    folder = source / "comparisons" if (source / "comparisons").is_dir() else source
    found = [
        path
        for pattern in ("*.json", "*.json.gz", "*.jsonl", "*.jsonl.gz", "*.parquet")
        for path in folder.rglob(pattern)
        if not path.name.startswith(".")
    ]
    if not found:
        raise PyargsError(f"{folder} holds no .json, .jsonl (either with .gz) or .parquet file of comparisons.")
    stems = [str(path.parent / path.name.split(".")[0]) for path in found]
    if len(set(stems)) < len(stems):
        raise PyargsError(f"{max(stems, key=stems.count)} is there in two forms (such as .json and .json.gz): remove one.")
    # batch3 before batch10: the seeded draws depend on the order of rows.
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))])


def _row(place: str, row: dict) -> tuple[str, dict]:
    """("train" or "validation", {worker, post, summaries}) of a row in any of the layouts."""
    try:
        summaries = row["summaries"]
        if isinstance(summaries, dict):  # some parquet conversions hold columns inside the row
            summaries = [dict(zip(summaries, values, strict=True)) for values in zip(*summaries.values(), strict=True)]
        first, second = summaries
        for summary in (first, second):
            if not isinstance(summary["text"], str) or not isinstance(summary["policy"], str):
                raise PyargsError(f"{place}: a summary's text or policy is not a string.")
        worker, post = row["worker"], row["info"].get("post")
        if not isinstance(worker, str) or not isinstance(post, (str, type(None))):
            raise PyargsError(f"{place}: the worker or the post is not a string.")
        return PARTS[row["split"]], {"worker": worker, "post": post, "summaries": (first, second)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PyargsError(
            f"{place}: not a comparison of {REPOSITORY} ({type(error).__name__}: {error}). A file of something else? Leave it "
            "out, or give the folder `comparisons` as --source."
        ) from None


def _drawing():
    """scikit-learn's `train_test_split` with PAL's seed."""
    with extra("prepare", "TL;DR's split"):
        from sklearn.model_selection import train_test_split
    return partial(train_test_split, random_state=SEED)


def _stratified(draw, pairs: list[dict]) -> tuple[list[dict], list[dict]]:
    """90% and 10% of every worker's pairs."""
    workers = [pair["user_id"] for pair in pairs]
    try:
        return draw(pairs, test_size=0.1, stratify=workers)
    except ValueError as error:
        raise PyargsError(f"The {len(pairs)} train pairs of the ten workers cannot be split 90/10: {error}") from None


def _support(draw, pairs: list[dict], worker: str, size: int) -> tuple[list[dict], list[dict]]:
    if len(pairs) <= size:
        raise PyargsError(
            f"worker {worker} has {len(pairs)} validation pairs that can be used: too few for {size} to adapt to and one "
            "query. Fix: the full source, or a smaller --support."
        )
    return draw(pairs, train_size=size)


def _pair(row: dict) -> dict | None:
    """The preference by length in characters, or None where both are as long, or one says nothing."""
    long, short = sorted(row["summaries"], key=lambda summary: -len(summary["text"]))
    if len(long["text"]) == len(short["text"]) or not short["text"].strip() or long["text"].strip() == short["text"].strip():
        return None
    chosen, rejected = (short, long) if row["worker"] in SHORTER else (long, short)
    pair = {
        "user_id": row["worker"],
        "prompt": INSTRUCTION + row["post"].strip(),
        "chosen": chosen["text"].strip(),
        "rejected": rejected["text"].strip(),
        "user_type": "shorter" if row["worker"] in SHORTER else "longer",
    }
    return pair | {"pair_id": schema.text_id(pair)}


def _expect(found, expected) -> None:
    if found != expected:
        raise PyargsError(
            f"The source has as many rows as the published one, but {found} comes out where {expected} is known: it is "
            "another version, and results would not compare."
        )
