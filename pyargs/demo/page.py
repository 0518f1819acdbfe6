"""What the demonstration shows: a table in the terminal, and a page with the plots and every answer."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from pyargs.data import demo as data
from pyargs.errors import extra
from pyargs.files import writing

with extra("demo", "the demonstration"):
    import matplotlib
    from matplotlib import pyplot as plt
    from rich.console import Console
    from rich.table import Table

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def verdict(result: dict) -> str:
    count, moved = len(result["shown"]), result["moved"]
    told = (
        f"For {moved} of {count} users the attribute moved in the wanted direction beyond its interval, "
        "at no more than twice the perplexity."
    )
    return told if moved >= 3 else f"{told} That is fewer than the 3 that this demo aims at."


def print_table(result: dict, out: Path) -> None:
    table = Table(title="What was generated, per user (unguided -> guided)")
    for column in ("user", "wants", "unguided", "guided", "difference (95%)", "perplexity", "moved"):
        table.add_column(column, justify="left" if column in ("user", "wants") else "right")
    for user, row in result["shown"].items():
        table.add_row(
            f"{user} ({row['kind']})",
            row["taste"],
            f"{row['unguided']:.2f}",
            f"{row['guided']:.2f}",
            f"{row['difference']:+.2f} ({row['low']:+.2f}, {row['high']:+.2f})",
            f"{row['perplexity']:.2f} (x{row['perplexity_ratio']:.2f})",
            "yes" if row["moved"] else "no",
        )
    table.add_row("nobody", "", "", "", "0", f"{result['unguided_perplexity']:.2f} (x1.00)", "")
    CONSOLE.print(table)
    rank, same = result["accuracy"], result["weight_0"]
    CONSOLE.print(
        f"Of {rank['pairs']} pairs of new users, the reward ranks {rank['reward_model']:.0f}% as the user does, the guided "
        f"policy {rank['policy_guided']:.0f}%, the unguided one {rank['policy_unguided']:.0f}%."
    )
    CONSOLE.print(
        f"Weight 0 gave the tokens of greedy generate on {same['same_as_greedy_generate']} of {same['prompts']} prompts. "
        f"{result['seconds']['all']:.0f} s in all."
    )
    CONSOLE.print(verdict(result), style="bold")
    CONSOLE.print(f"Every answer and the plots: {out / 'report.html'}", soft_wrap=True)
    CONSOLE.print(f"All numbers: {out / 'result.json'}. The model: {out / 'lore'}", soft_wrap=True)


def write_report(path: Path, result: dict) -> None:
    """A self-contained HTML page: the tables, the plots and every answer."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    page = Environment(loader=PackageLoader("pyargs.demo", "."), autoescape=select_autoescape(default=True)).get_template(
        "page.html.j2"
    )
    with writing(path) as temporary:
        temporary.write_text(page.render(result=result, verdict=verdict(result), plot=_plot(result)), encoding="utf-8")


def _plot(result: dict) -> str:
    """A PNG as a data URL: each user's attribute prompt by prompt."""
    matplotlib.use("Agg")
    shown = result["shown"]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.4), constrained_layout=True)
    for axis, (user, row) in zip(axes, shown.items(), strict=True):
        before = [data.attribute(row["attribute"], text) for text in result["answers"]["unguided"].values()]
        after = [data.attribute(row["attribute"], text) for text in result["answers"][user].values()]
        for one, two in zip(before, after, strict=True):
            axis.plot([0, 1], [one, two], color="#9bb", marker="o", markersize=4, linewidth=1)
        axis.plot([0, 1], [mean(before), mean(after)], color="#b33", marker="o", linewidth=2.5)
        axis.set_xticks([0, 1], ["unguided", "guided"])
        axis.set_xlim(-0.3, 1.3)
        axis.set_title(f"{user} ({row['kind']})\nwants {row['taste']}", fontsize=10)
        axis.set_ylabel(row["attribute"].replace("_", " "))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
