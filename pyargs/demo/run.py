"""The demonstration: from pairs of the embedded users to guided answers, measured."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pyargs.data import demo as data
from pyargs.data import of_split
from pyargs.decode import reference
from pyargs.decode.engine import Engine
from pyargs.decode.pair import load_pair
from pyargs.demo.page import CONSOLE, mean
from pyargs.errors import extra
from pyargs.lm.tokenize import left_pad
from pyargs.methods import global_rm, lore
from pyargs.metrics.perplexity import perplexity
from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, trainer
from pyargs.tune import Tuning, engine_for, tune

with extra("demo", "the demonstration"):
    from rich.live import Live
    from rich.table import Table

NEW_TOKENS = 40


def run(out: Path, shown: dict[str, str], *, backbone: str, prompts: int) -> dict:
    """Everything that the demo measures, as JSON. shown: user -> "trained" or "new"; the models go to folders of `out`."""
    started, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    pairs = data.load()
    part = lambda *splits: of_split(pairs, *splits)  # noqa: E731
    CONSOLE.rule("train and adapt")
    # Token averages: a head that learns only from the last of 40 tokens has little to say about the others.
    fields = dict(backbone=backbone, freeze_backbone=True, pool="mean")
    trainer.train("global_rm", pairs, global_rm.Config(**fields)).save_pretrained(out / "global_rm")
    model = trainer.train("lore", pairs, lore.Config(**fields))
    trained = len(model.users)
    new = adapt.adapt(model, pairs)
    model.save_pretrained(out / "lore")
    lap("train and adapt")

    CONSOLE.rule("choose the weight on the seen users' held-out prompts")
    policy, model = load_pair(backbone, str(out / "lore"))
    shared = RewardModel.from_pretrained(out / "global_rm", backbone=policy.get_decoder(), tokenizer=model.tokenizer)
    tuning = Tuning(objective="fluency", grid=[0.0, 0.5, 1.0, 1.25, 1.5], prompts=8, batch_size=8, max_new_tokens=NEW_TOKENS)
    tuned = tune(engine_for(policy, model, tuning), part("train_test"), tuning)
    lap("choose the weight")

    CONSOLE.rule(f"answer {prompts} prompts for {len(shown)} users in one batch")
    asked = data.prompts("query")[:prompts]
    answers = _answer(policy, model, asked, list(shown), tuned["reward_weight"])
    lap("answer")

    CONSOLE.rule("measure")
    unguided = answers[None]
    plain = perplexity(policy, unguided["prompts"], unguided["tokens"])
    users = {}
    for user, kind in shown.items():
        name, sign = data.users()[user]
        own = answers[user]
        moved = perplexity(policy, own["prompts"], own["tokens"])
        users[user] = {
            "kind": kind,
            "taste": data.describe(user),
            "attribute": name,
            "wanted": sign,
            "pairs": sum(u == user for u in part("train", "support")["user_id"]),
            "unguided": mean([data.attribute(name, text) for text in unguided["texts"]]),
            "guided": mean([data.attribute(name, text) for text in own["texts"]]),
            **_paired(own["texts"], unguided["texts"], name),
            "perplexity": moved,
            "perplexity_ratio": moved / plain,
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
        "shown": users,
        "accuracy": _accuracies(model, shared, policy, part("train_test"), part("query"), tuned),
        "tuned": tuned,
        "unguided_perplexity": plain,
        "weight_0": _weight_0(policy, unguided),
        "speed": _speed(policy, model, asked[:4], list(shown), tuned["reward_weight"]),
        "answers": {str(user or "unguided"): dict(zip(asked, found["texts"], strict=True)) for user, found in answers.items()},
        "moved": sum(user["moved"] for user in users.values()),
    }
    lap("measure")
    result["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    return result


def _answer(policy, model, asked: list[str], users: list[str], weight: float) -> dict:
    """One batch of all prompts for all users and, as the weight 0 rows, for nobody; the first prompt is shown as it grows."""
    groups = [None, *users]
    engine = Engine(policy, model, max_rows=len(groups) * len(asked))
    numbers = {
        user: [
            engine.submit(prompt, user or users[0], reward_weight=0.0 if user is None else weight, max_new_tokens=NEW_TOKENS)
            for prompt in asked
        ]
        for user in groups
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
    found = {user: [engine.answer(number) for number in own] for user, own in numbers.items()}
    parts = {"prompts": "prompt", "texts": "text", "tokens": "tokens", "slots": "slots"}
    return {
        user: {name: [getattr(answer, part) for answer in own] for name, part in parts.items()} for user, own in found.items()
    }


def _paired(guided: list[str], unguided: list[str], name: str) -> dict:
    """Mean difference guided - unguided of the attribute over the prompts, with a paired 95% t interval."""
    from scipy.stats import ttest_rel

    values = [[data.attribute(name, text) for text in texts] for texts in (guided, unguided)]
    if values[0] == values[1]:
        return {"difference": 0.0, "low": 0.0, "high": 0.0}
    interval = ttest_rel(*values).confidence_interval(0.95)
    return {"difference": mean(values[0]) - mean(values[1]), "low": float(interval.low), "high": float(interval.high)}


def _accuracies(model, shared, policy, seen, query, tuned) -> dict:
    found = {}
    for name, rows in (("seen users, held-out prompts", seen), ("new users, query prompts", query)):
        scores = pair_scores(model, policy, rows)
        ranked = rm_accuracy(scores.reward, scores.users)
        everyone = pair_scores(shared, policy, rows).reward
        guided = policy_accuracy(scores, tuned["reward_weight"], centre=tuned["centre"])
        found[name] = {
            "pairs": len(rows),
            "rm_accuracy": ranked["accuracy"],
            "rm_accuracy_global": rm_accuracy(everyone, scores.users)["accuracy"],
            "policy_accuracy_base": guided["base"]["accuracy"],
            "policy_accuracy_personal": guided["paper"]["accuracy"],
            "policy_accuracy_personal_centred": guided["centred"]["accuracy"],
            "policy_accuracy_personal_all": guided["all"]["accuracy"],
            "tie_rate": ranked["tie_rate"],
        }
    return found


def _weight_0(policy, unguided: dict) -> dict:
    """The control: transformers' own greedy generate must give the tokens of the weight 0 rows."""
    ids, mask = left_pad(unguided["prompts"], pad_id=0)
    with torch.no_grad():
        own = policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[
            :, ids.shape[1] :
        ]
    same = sum(row[: len(tokens)] == tokens for row, tokens in zip(own.tolist(), unguided["tokens"], strict=True))
    return {"prompts": len(ids), "same_as_greedy_generate": same}


def _speed(policy, model, asked, users, weight) -> dict:
    """Tokens per second of the decoder and of the reference loop on the same rows, in turns; and whether the tokens agree."""
    rows, steps = [users[i % len(users)] for i in range(len(asked))], 16
    wish = {"reward_weight": weight, "max_new_tokens": steps, "stop": []}
    engine = Engine(policy, model, max_rows=len(rows))
    requests = [engine.pair.request(prompt, user, **wish) for prompt, user in zip(asked, rows, strict=True)]

    def decoder() -> list[list[int]]:
        return [answer.tokens for answer in Engine(policy, model, max_rows=len(rows)).generate(asked, rows, **wish)]

    def copies() -> list[list[int]]:
        found = reference.answers(policy, model, requests, vocabulary=engine.pair.vocabulary)
        return [one.tokens for one in found]

    loops = {"decoder": decoder, "reference": copies}
    seconds, tokens = {"decoder": [], "reference": []}, {}
    for _ in range(2):
        for name, loop in loops.items():
            start = time.perf_counter()
            tokens[name] = loop()
            seconds[name].append(time.perf_counter() - start)
    made = len(rows) * steps
    return {
        "rows": len(rows),
        "tokens": made,
        "decoder_tokens_per_second": made / min(seconds["decoder"]),
        "reference_tokens_per_second": made / min(seconds["reference"]),
        "same_tokens": tokens["decoder"] == tokens["reference"],
    }
