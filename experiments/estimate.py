"""Sizes of cells in tokens, and how long cells of that size took: the dry run of `reproduce`."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import NamedTuple

from pyargs import data
from pyargs.config import add_options, from_args
from pyargs.training import hooks
from pyargs.training.config import epochs

PER_WORD = 1.3  # tokens of SmolLM2 per word of the abstracts of pref_lamp_like/ci (1.27; of the titles 1.58)
BACKWARD = 3  # a training step costs about three passes
GPU_MINUTES = 30  # what a session on a lent GPU has


def sizes(rows) -> dict:
    """Pairs by split, users, and the mean tokens of a prompt and of a response, by its words."""
    prompts = [p if isinstance(p, str) else " ".join(turn["content"] for turn in p) for p in rows["prompt"][:]]
    words = sum(len(p.split()) for p in prompts), sum(len(r.split()) for side in ("chosen", "rejected") for r in rows[side][:])
    return {
        "pairs": dict(Counter(rows["split"])),
        "users": len(set(rows["user_id"])),
        "prompt_tokens": round(PER_WORD * words[0] / len(rows)),
        "response_tokens": round(PER_WORD * words[1] / 2 / len(rows)),
    }


def counted(row: dict) -> dict:
    """The same from a row of results/data_statistics.json, for a set that is not built yet."""
    words = {name: row["words"][name]["mean"] for name in ("prompt", "chosen", "rejected")}
    return {
        "pairs": {split: of["pairs"] for split, of in row["splits"].items()},
        "users": row["users"],
        "prompt_tokens": round(PER_WORD * words["prompt"]),
        "response_tokens": round(PER_WORD * (words["chosen"] + words["rejected"]) / 2),
    }


def tokens(row, settings: dict, size: dict) -> int:
    """Tokens that go through a language model for one cell, a training step's counted three times.

    row: (method, fields) or None; settings: those of the set. What a frozen backbone and the policy give for the pairs is
    computed once for all cells, and not counted.
    """
    pairs = {split: size["pairs"].get(split, 0) for split in data.SPLITS}
    prompt, response = size["prompt_tokens"], size["response_tokens"]
    pair = prompt + 2 * response
    flags = settings["decode"]
    length = _number(flags or [], "--max-new-tokens", 64)
    answers = min(pairs["query"], _number(flags or [], "--limit", pairs["query"])) if flags is not None else 0
    if row is None:
        return answers * 2 * (prompt + length)
    method, fields = row
    config = hooks.method(method).Config(**fields)
    if method == "icl":
        shown = config.shots * (min(prompt, config.content_tokens) + 2 * response)
        return pairs["query"] * (pair + shown) + answers * (2 * prompt + shown + 2 * length)
    frozen, total = getattr(config, "freeze_backbone", False), 0
    if not frozen:
        total += pairs["query"] * pair
        passes = 2 if method == "pdpo" else 1  # its user's and the generic user's
        total += round(BACKWARD * passes * epochs(config) * pairs["train"] * pair)
        total += BACKWARD * config.adapt_steps * pairs["support"] * pair if method == "pdpo" else pairs["support"] * pair
    if method == "pal":
        return total
    if method != "pdpo":
        from pyargs.tune import Tuning  # with the whole decoder: seconds that each worker would wait for

        parser = argparse.ArgumentParser()
        add_options(parser, Tuning)
        tuning = from_args(Tuning, parser.parse_args(settings["tune"]))
        weights = 1 if tuning.objective == "policy_accuracy" else len(tuning.grid)
        total += 2 * min(tuning.prompts, pairs["train_test"]) * (prompt + tuning.max_new_tokens) * weights
        total += 0 if frozen else pairs["train_test"] * pair
    return total + answers * 4 * (prompt + length)  # written by policy and reward model, judged by both


class Left(NamedTuple):
    """A cell that is still to be made: its name, stages, what it trains ("head", "language model", "nothing"), tokens (None
    without the data), the seconds that the same row took with another seed, and, if it exists, why it is made again."""

    name: str
    stages: tuple
    trains: str
    tokens: int | None
    seconds: float | None
    again: tuple = ()


def trains(row) -> str:
    if row is None or row[0] == "icl":
        return "nothing"
    return "head" if row[1].get("freeze_backbone") else "language model"


def plan(left: list[Left], measured: list[tuple[str, int, float]], workers: int = 1) -> dict:
    """What the remaining cells take. measured: what finished rows train, their tokens and seconds; workers: how many share
    them.

    Hours come from the seconds of the same row, else from the tokens per second of rows that train the same; cells without
    are counted. If none is measured, the plan says which rate would be enough.
    """
    sums: dict[str, list[float]] = {}
    for kind, tokens, seconds in measured:
        if tokens and seconds:
            of = sums.setdefault(kind, [0, 0.0])
            of[0], of[1] = of[0] + tokens, of[1] + seconds
    rates = {kind: tokens / seconds for kind, (tokens, seconds) in sums.items()}
    total, missing = sum(one.tokens or 0 for one in left), sum(one.tokens is None for one in left)

    def needs(one: Left) -> float | None:
        if one.seconds or not one.stages:
            return one.seconds or 0.0
        return one.tokens / rates[one.trains] if one.tokens and one.trains in rates else None

    seconds = [needs(one) for one in left]
    unknown, hours = seconds.count(None), sum(filter(None, seconds)) / workers / 3600
    lines = [
        {
            "cell": one.name,
            "stages": list(one.stages),
            "tokens": one.tokens,
            "minutes": took and round(took / 60, 1),
            **({"made_again": list(one.again)} if one.again else {}),
        }
        for one, took in zip(left, seconds, strict=True)
    ]
    found = {
        "cells": lines,
        "tokens": total,
        "cells_without_data": missing,
        "cells_without_estimate": unknown,
        "workers": workers,
        "tokens_per_second": {kind: round(rate) for kind, rate in rates.items()},
        "hours": round(hours, 2) if rates or not unknown else None,
        "fits_30_minutes_of_a_gpu": None if unknown else hours < GPU_MINUTES / 60,
    }
    if not rates and total and not missing:
        found["note"] = (
            f"no cell of this profile has been measured: {total / 60 / GPU_MINUTES:.0f} tokens/s would fit 30 minutes"
        )
    return found


def _number(flags: list[str], name: str, default: int) -> int:
    return int(flags[flags.index(name) + 1]) if name in flags else default
