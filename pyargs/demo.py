"""The demonstration: from pairs of the embedded users to guided answers, measured. `pyargs demo` prints and reports it."""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import torch

from pyargs.data import demo as data
from pyargs.data import of_split
from pyargs.decode import args, reference
from pyargs.decode.prompts import load_pair
from pyargs.decode.request import check
from pyargs.errors import extra
from pyargs.files import writing
from pyargs.lm.tokenize import encode_prompt, left_pad
from pyargs.methods import global_rm, lore
from pyargs.metrics.perplexity import perplexity
from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, trainer
from pyargs.tune import Tuning, tune

with extra("demo", "the demonstration"):
    import matplotlib
    from matplotlib import pyplot as plt
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

NEW_TOKENS = 40
CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


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
    tuned = tune(model, policy, part("train_test"), tuning)
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
            "unguided": _mean([data.attribute(name, text) for text in unguided["texts"]]),
            "guided": _mean([data.attribute(name, text) for text in own["texts"]]),
            **_paired(own["texts"], unguided["texts"], name),
            "perplexity": moved,
            "perplexity_ratio": moved / plain,
            "winner_is_favourite": 100 * _mean([float(slot == 0) for row in own["slots"] for slot in row]),
        }
        users[user]["moved"] = bool(
            users[user]["low"] * sign > 0 and users[user]["high"] * sign > 0 and users[user]["perplexity_ratio"] <= 2
        )
    result = {
        "method": "lore", "backbone": backbone, "trained_users": trained, "new_users": new, "shown": users,
        "accuracy": _accuracies(model, shared, policy, part("train_test"), part("query"), tuned),
        "tuned": tuned, "unguided_perplexity": plain, "weight_0": _weight_0(policy, unguided),
        "speed": _speed(policy, model, asked[:4], list(shown), tuned["reward_weight"]),
        "answers": {str(user or "unguided"): dict(zip(asked, found["texts"], strict=True)) for user, found in answers.items()},
        "moved": sum(user["moved"] for user in users.values()),
    }  # fmt: skip
    lap("measure")
    result["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    return result


def _answer(policy, model, asked: list[str], users: list[str], weight: float) -> dict:
    """One batch of all prompts for all users and, as the weight 0 rows, for nobody; the first prompt is shown as it grows."""
    groups = [None, *users]
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in asked]
    ids, mask = left_pad(encoded * len(groups), pad_id=0)
    rows = [user or users[0] for user in groups for _ in asked]
    weights = [0.0 if user is None else weight for user in groups for _ in asked]
    grown = [[] for _ in groups]

    def table() -> Table:
        shown = Table(title=asked[0], title_justify="left", show_lines=True)
        shown.add_column("for")
        shown.add_column("answer")
        for user, tokens in zip(groups, grown, strict=True):
            who = "unguided" if user is None else f"{user}: {data.describe(user)}"
            shown.add_row(who, model.tokenizer.decode(tokens, skip_special_tokens=True))
        return shown

    with Live(table(), console=CONSOLE, refresh_per_second=4, transient=False) as live:

        def stream(tokens) -> None:
            for group, token in enumerate(tokens[:: len(asked)].tolist()):
                grown[group].append(token)  # stop tokens and padding are special tokens, which the table leaves out
            live.update(table())

        decoded = args.generate(
            policy, model, ids, mask, rows, reward_weight=weights, max_new_tokens=NEW_TOKENS, token_callback=stream
        )
    texts, tokens = decoded.texts(model.tokenizer), decoded.answers()
    slots = [row[: len(own)] for row, own in zip(decoded.slots.tolist(), tokens, strict=True)]
    cut = lambda values, i: values[i * len(asked) : (i + 1) * len(asked)]  # noqa: E731
    return {
        user: {"prompts": encoded, "texts": cut(texts, i), "tokens": cut(tokens, i), "slots": cut(slots, i)}
        for i, user in enumerate(groups)
    }


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def _paired(guided: list[str], unguided: list[str], name: str) -> dict:
    """Mean difference guided - unguided of the attribute over the prompts, with a paired 95% t interval."""
    from scipy.stats import ttest_rel

    values = [[data.attribute(name, text) for text in texts] for texts in (guided, unguided)]
    if values[0] == values[1]:
        return {"difference": 0.0, "low": 0.0, "high": 0.0}
    interval = ttest_rel(*values).confidence_interval(0.95)
    return {"difference": _mean(values[0]) - _mean(values[1]), "low": float(interval.low), "high": float(interval.high)}


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
    ids, mask = left_pad([encode_prompt(model.tokenizer, prompt) for prompt in asked], pad_id=0)
    rows = [users[i % len(users)] for i in range(len(asked))]
    request = check(
        policy, model, ids, mask, rows, reward_weight=weight, num_candidates=10, max_new_tokens=16, eos_token_id=[],
        pad_token_id=None, do_sample=False, temperature=1.0, seed=0, eos_reward="before", tokenizer=None, token_callback=None,
    )  # fmt: skip
    seconds, tokens = {"decoder": [], "reference": []}, {}
    for _ in range(2):
        for name, loop in (("decoder", args.decode), ("reference", reference.decode)):
            start = time.perf_counter()
            tokens[name] = loop(policy, model, request).tokens
            seconds[name].append(time.perf_counter() - start)
    made = tokens["decoder"].numel()
    return {
        "rows": len(rows), "tokens": made,
        "decoder_tokens_per_second": made / min(seconds["decoder"]),
        "reference_tokens_per_second": made / min(seconds["reference"]),
        "same_tokens": bool(torch.equal(tokens["decoder"], tokens["reference"])),
    }  # fmt: skip


def verdict(result: dict) -> str:
    count, moved = len(result["shown"]), result["moved"]
    told = (
        f"For {moved} of {count} users the attribute moved in the wanted direction beyond its interval, "
        "at no more than twice the perplexity."
    )
    return told if moved >= 3 else f"{told} That is fewer than the 3 that this demo aims at."


def print_table(result: dict, out: Path) -> None:
    table = Table(title="What was generated, per user (unguided -> guided)")
    for column in ("user", "wants", "attribute", "unguided", "guided", "difference (95%)", "perplexity", "moved"):
        table.add_column(column, justify="left" if column in ("user", "wants", "attribute") else "right")
    for user, row in result["shown"].items():
        table.add_row(
            f"{user} ({row['kind']})", row["taste"], row["attribute"], f"{row['unguided']:.2f}", f"{row['guided']:.2f}",
            f"{row['difference']:+.2f} ({row['low']:+.2f}, {row['high']:+.2f})",
            f"{row['perplexity']:.2f} (x{row['perplexity_ratio']:.2f})", "yes" if row["moved"] else "no",
        )  # fmt: skip
    table.add_row("nobody (weight 0)", "", "", "", "", "0 by construction", f"{result['unguided_perplexity']:.2f} (x1.00)", "")
    CONSOLE.print(table)
    table = Table(title="Accuracies in percent")
    names = ("pairs", "RM", "RM global", "policy base", "policy personal", "centred", "all")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for name, row in result["accuracy"].items():
        values = [v for key, v in row.items() if key != "tie_rate"]
        table.add_row(name, str(values[0]), *(f"{value:.1f}" for value in values[1:]))
    CONSOLE.print(table)
    speed, same = result["speed"], result["weight_0"]
    CONSOLE.print(
        f"{speed['decoder_tokens_per_second']:.1f} tokens/s, reference loop {speed['reference_tokens_per_second']:.1f} "
        f"({speed['rows']} rows; same tokens: {'yes' if speed['same_tokens'] else 'NO'}). "
        f"Weight 0 equals greedy generate on {same['same_as_greedy_generate']} of {same['prompts']} prompts. "
        f"Weight {result['tuned']['relative']:g} / reward_std. {result['seconds']['all']:.0f} s in all."
    )
    CONSOLE.print(verdict(result), style="bold")
    CONSOLE.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def write_report(path: Path, result: dict) -> None:
    """A self-contained HTML page: the tables, the plots and every answer."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    page = Environment(loader=PackageLoader("pyargs", "."), autoescape=select_autoescape(default=True)).get_template(
        "demo.html.j2"
    )
    with writing(path) as temporary:
        temporary.write_text(page.render(result=result, verdict=verdict(result), plots=_plots(result)), encoding="utf-8")


def _plots(result: dict) -> dict[str, str]:
    """PNGs as data URLs: each user's attribute prompt by prompt, and what each weight costs."""
    matplotlib.use("Agg")
    shown = result["shown"]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.4), constrained_layout=True)
    for axis, (user, row) in zip(axes, shown.items(), strict=True):
        before = [data.attribute(row["attribute"], text) for text in result["answers"]["unguided"].values()]
        after = [data.attribute(row["attribute"], text) for text in result["answers"][user].values()]
        for one, two in zip(before, after, strict=True):
            axis.plot([0, 1], [one, two], color="#9bb", marker="o", markersize=4, linewidth=1)
        axis.plot([0, 1], [_mean(before), _mean(after)], color="#b33", marker="o", linewidth=2.5)
        axis.set_xticks([0, 1], ["unguided", "guided"])
        axis.set_xlim(-0.3, 1.3)
        axis.set_title(f"{user} ({row['kind']})\nwants {row['taste']}", fontsize=10)
        axis.set_ylabel(row["attribute"].replace("_", " "))
    users = _png(figure)
    grid = result["tuned"]["grid"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    relative = [point["relative"] for point in grid]
    axes[0].plot(relative, [point["perplexity"] for point in grid], marker="o", color="#377")
    axes[0].axhline(
        result["tuned"]["max_perplexity"] * result["tuned"]["unguided_perplexity"],
        color="#b33",
        linestyle="--",
        linewidth=1,
        label="bound",
    )
    axes[0].set_ylabel("perplexity of the answers")
    axes[0].legend()
    for name, colour in (("paper", "#377"), ("centred", "#b83"), ("all", "#75a")):
        axes[1].plot(relative, [point["policy_accuracy"][name] for point in grid], marker="o", color=colour, label=name)
    axes[1].set_ylabel("policy accuracy, percent")
    axes[1].legend()
    for axis in axes:
        axis.set_xlabel("weight in units of 1 / reward_std")
        axis.axvline(result["tuned"]["relative"], color="#999", linewidth=1)
    return {"users": users, "weights": _png(figure)}


def _png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
