"""The demonstration: from pairs of the embedded users to guided answers, measured."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pyargs import learn
from pyargs.data import demo as data
from pyargs.data import of_split
from pyargs.decode.engine import Engine
from pyargs.decode.pair import load_pair
from pyargs.demo.page import CONSOLE, mean
from pyargs.errors import extra
from pyargs.lm.tokenize import left_pad
from pyargs.methods import lore
from pyargs.metrics.perplexity import perplexities
from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.training import adapt

with extra("demo", "the demonstration"):
    from rich.live import Live
    from rich.table import Table

NEW_TOKENS = 32
MIN_P = 0.05
"""A token that is less than a twentieth as likely as the favourite is no candidate: a third of the passes is saved."""
TRAINED, JUDGED = 48, 16
"""Prompts that are trained on, and whose pairs are ranked: of 88 and 32, so that the demonstration takes a minute or two."""


def run(out: Path, shown: dict[str, str], *, backbone: str, prompts: int) -> dict:
    """Everything that the demo measures, as JSON. shown: user -> "trained" or "new"; the model goes to a folder of `out`."""
    started, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    pairs = data.load()
    newcomers = [user for user, kind in shown.items() if kind == "new"]
    train = _about(of_split(pairs, "train"), data.prompts("train")[:TRAINED])
    support, query = (of_split(pairs, split).filter(lambda row: row["user_id"] in newcomers) for split in ("support", "query"))
    CONSOLE.rule("train and adapt")
    # Token averages: a head that learns only from the last of 40 tokens has little to say about the others.
    config = lore.Config(backbone=backbone, freeze_backbone=True, pool="mean")
    model = learn.train("lore", train, config)
    trained = len(model.users)
    new = adapt.adapt(model, support)
    model.save_pretrained(out / "lore")
    lap("train and adapt")

    asked = data.prompts("query")[:prompts]
    CONSOLE.rule(f"answer {len(asked)} prompts for {len(shown)} users in one batch")
    policy, model = load_pair(backbone, model)
    answers, weight = _answer(policy, model, asked, list(shown))
    lap("answer")

    CONSOLE.rule("measure")
    unguided = answers[None]
    base, *moved = perplexities(policy, unguided["prompts"], [found["tokens"] for found in answers.values()])
    users = {}
    for (user, kind), perplexity in zip(shown.items(), moved, strict=True):
        name, sign = data.users()[user]
        own = answers[user]
        users[user] = {
            "kind": kind,
            "taste": data.describe(user),
            "attribute": name,
            "wanted": sign,
            "pairs": sum(part["user_id"].count(user) for part in (train[:], support[:])),
            "unguided": mean([data.attribute(name, text) for text in unguided["texts"]]),
            "guided": mean([data.attribute(name, text) for text in own["texts"]]),
            **_paired(own["texts"], unguided["texts"], name),
            "perplexity": perplexity,
            "perplexity_ratio": perplexity / base,
            "winner_is_favourite": 100 * mean([float(slot == 0) for row in own["slots"] for slot in row]),
        }
        users[user]["moved"] = bool(
            users[user]["low"] * sign > 0 and users[user]["high"] * sign > 0 and users[user]["perplexity_ratio"] <= 2
        )
    result = {
        "method": "lore",
        "backbone": backbone,
        "trained_users": trained,
        "new_users": new,
        "reward_weight": weight,
        "shown": users,
        "accuracy": _accuracy(model, policy, _about(query, data.prompts("query")[:JUDGED]), weight),
        "unguided_perplexity": base,
        "weight_0": _weight_0(policy, unguided),
        "answers": {str(user or "unguided"): dict(zip(asked, found["texts"], strict=True)) for user, found in answers.items()},
        "moved": sum(user["moved"] for user in users.values()),
    }
    lap("measure")
    result["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    return result


def _about(pairs, prompts: list[str]):
    """The pairs of these prompts."""
    return pairs.filter(lambda row: row["prompt"] in prompts)


def _answer(policy, model, asked: list[str], users: list[str]) -> tuple[dict, float]:
    """One batch of all prompts for all users and, as the weight 0 rows, for nobody; the first prompt is shown as it grows.
    And the raw weight of strength 1."""
    readers = [None, *users]
    engine = Engine(policy, model, max_rows=len(readers) * len(asked))
    numbers = {
        user: [
            engine.submit(
                prompt,
                user or users[0],
                strength=float(user is not None),
                num_candidates=10 if user else 1,
                min_p=MIN_P if user else 0.0,
                max_new_tokens=NEW_TOKENS,
            )
            for prompt in asked
        ]
        for user in readers
    }
    grown = {own[0]: [] for own in numbers.values()}  # by the number of each user's first request

    def table() -> Table:
        shown = Table(title=asked[0], title_justify="left", show_lines=True)
        shown.add_column("for")
        shown.add_column("answer")
        for user, own in numbers.items():
            who = "unguided" if user is None else f"{user}: {data.describe(user)}"
            shown.add_row(who, model.tokenizer.decode(grown[own[0]], skip_special_tokens=True))
        return shown

    with Live(table(), console=CONSOLE, refresh_per_second=4, transient=False) as live:
        while engine.busy:
            for event in engine.step():
                if event.number in grown:
                    grown[event.number].append(event.token)  # the table leaves stop tokens out
            live.update(table())
    CONSOLE.line()
    found = {user: [engine.answer(number) for number in own] for user, own in numbers.items()}
    parts = {"prompts": "prompt", "texts": "text", "tokens": "tokens", "slots": "slots"}
    return {
        user: {name: [getattr(answer, part) for answer in own] for name, part in parts.items()} for user, own in found.items()
    }, engine.raw_weight()


def _paired(guided: list[str], unguided: list[str], name: str) -> dict:
    """Mean difference guided - unguided of the attribute over the prompts, with a paired 95% t interval."""
    from scipy.stats import ttest_rel

    values = [[data.attribute(name, text) for text in texts] for texts in (guided, unguided)]
    if values[0] == values[1]:
        return {"difference": 0.0, "low": 0.0, "high": 0.0}
    interval = ttest_rel(*values).confidence_interval(0.95)
    return {"difference": mean(values[0]) - mean(values[1]), "low": float(interval.low), "high": float(interval.high)}


def _accuracy(model, policy, pairs, weight: float) -> dict:
    """How often the chosen response of new users' pairs ranks first, in percent: by the reward, and by the decoder's score."""
    scores = pair_scores(model, policy, pairs)
    score = policy_accuracy(scores, weight)
    return {
        "pairs": len(pairs),
        "reward_model": rm_accuracy(scores.reward, scores.users)["accuracy"],
        "policy_unguided": score["base"]["accuracy"],
        "policy_guided": score["paper"]["accuracy"],
    }


def _weight_0(policy, unguided: dict) -> dict:
    """The control: transformers' own greedy generate must give the tokens of the weight 0 rows."""
    ids, mask = left_pad(unguided["prompts"], pad_id=0)
    with torch.no_grad():
        own = policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[
            :, ids.shape[1] :
        ]
    same = sum(row[: len(tokens)] == tokens for row, tokens in zip(own.tolist(), unguided["tokens"], strict=True))
    return {"prompts": len(ids), "same_as_greedy_generate": same}
