"""The paper's Figures 1-3 from the same cells as the tables, with the paper's points as light markers beside ours.

1: RM accuracy against policy accuracy, a panel for each data set and policy. 2: ROUGE-1, ROUGE-L and BERTScore of every
method. 3: ROUGE-1 by the number of demonstrations. The paper's texts are others than ours, so its ROUGE is drawn as the
distance from its own zero-shot level, set off from ours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from experiments import results, rules
from experiments.tables import captions
from experiments.tables.specs import GUIDES, LAMP, LORA, METRICS, OWN_POLICY, SCALES, SPECS, UNGUIDED
from pyargs import files
from pyargs.errors import PyargsError, extra
from pyargs.metrics.correlation import correlate_methods

with extra("experiments", "a figure"):
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

SHOTS = (0, 2, 4, 8, 16)
OVER = {"TLDR": SPECS["2"].over, "PRISM": SPECS["7"].over}  # the methods that the tables correlate; elsewhere GUIDES
ONE_EACH = {spec.data for spec in SPECS.values() if spec.subset}  # data of which the paper takes one query of each user
SYMBOLS = {"kendall": "τ", "spearman": "ρ", "pearson": "r"}
LIGHT = {"color": "#9a9a9a", "linestyle": "none"}


def figure(number: str, folder: str | Path, profile: str | None = None):
    """Figure "1", "2" or "3" as a matplotlib Figure, and {"profile", "missing": rows without a value, "command"}.

    profile and the paper's numbers: as in tables.table. Raises PyargsError when there is nothing of ours to draw.
    """
    cells = results.read(folder)
    _, numbers = results.of_paper(folder)
    paper = numbers["tables"] if numbers else {}
    draw = {"1": _scatter, "2": _quality, "3": _shots}[number]
    profile = results.choose_profile(cells, "PRISM" if number == "1" else "Pref-LaMP", profile)
    made, missing = draw([c for c in cells if c["profile"] == profile], paper, profile)
    data = None if number == "1" else "Pref-LaMP"
    here, sets = captions.runs(profile, missing, (), data)
    return made, {"profile": profile, "missing": missing, "command": results.command(profile, here, sets) if here else None}


def save(made, path: str | Path) -> None:
    """Writes .png or .svg; the same figure gives the same bytes."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise PyargsError(f"{path}: a figure is a .png or a .svg file")
    with files.writing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "pyargs"}):
        made.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


# --- Figure 1


def _scatter(cells: list[dict], paper: dict, profile: str):
    panels, missing = [], {}
    for data in (*SCALES, None):  # None: our own sets
        for name in sorted({c["set"] for c in cells if c["stands_for"] == data}):
            own = [c for c in cells if c["set"] == name]
            beside = results.match(SCALES.get(data, ()), results.policies(own))
            scales = {policy: scale for scale, policy in beside.items() if policy}
            for policy in results.policies(own):
                there = [c for c in own if c["policy"] == policy]
                sides = [results.rm_accuracy, results.policy_accuracy]
                if data in ONE_EACH:
                    sides = [results.one_per_user(side) for side in sides]
                points = results.points(there, (*GUIDES, *LORA), *sides)
                if lacks := [row for row in captions.runs(profile, GUIDES, [name])[0] if row not in points]:
                    missing[f"{name}, {policy}" if len(results.policies(own)) > 1 else name] = lacks
                if points:
                    panels.append(
                        (
                            _title_of(name, data, profile),
                            data,
                            policy,
                            points,
                            _printed_points(data, scales.get(policy), paper),
                        )
                    )
    if not panels:
        raise PyargsError(f"Figure 1 needs RM and policy accuracies; {captions.makes(profile, GUIDES, ())}")
    lacking = [row for row in GUIDES if any(row in rows for rows in missing.values())]
    lacks = f"Missing: {'; '.join(f'in {name} {captions.listed(rows)}' for name, rows in missing.items())}." if missing else ""
    plt = _pyplot()
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    made, axes = plt.subplots(
        high, wide, figsize=(max(6.0, 4.1 * wide), 4.0 * high + 1.5), layout="constrained", squeeze=False
    )
    colours = _colours((*GUIDES, *LORA))
    for axis, (title, data, policy, points, printed) in zip(axes.flat, panels, strict=False):
        for row, of_paper in printed.items():
            axis.plot(*of_paper, marker="D", markersize=6, fillstyle="none", alpha=0.6, linestyle="none", color=colours[row])
        for row, of_row in points.items():
            axis.plot(*zip(*of_row, strict=True), marker="o", markersize=4, alpha=0.45, linestyle="none", color=colours[row])
            mean = [sum(side) / len(of_row) for side in zip(*of_row, strict=True)]
            axis.plot(*mean, marker="o", markersize=9, linestyle="none", color=colours[row], markeredgecolor="white")
        axis.set_title(f"{title}, {policy}\n{_correlations(points, OVER.get(data, GUIDES))}", fontsize=9, loc="left")
        axis.set_xlabel("RM accuracy, percent")
        axis.set_ylabel("policy accuracy (paper's form)")
        axis.margins(0.08)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    drawn = [row for row in (*GUIDES, *LORA) if any(row in points or row in printed for *_, points, printed in panels)]
    handles = [_handle(marker="o", color=colours[row], label=row) for row in drawn]
    handles += [
        _handle(marker="o", color="#555555", markersize=4, alpha=0.5, label="one seed"),
        _handle(marker="D", fillstyle="none", color="#555555", label="the paper's mean"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=min(5, 2 + wide), fontsize=8, frameon=False)
    _title(
        made,
        f"RM accuracy against policy accuracy; {_stand_ins(cells, profile)}. All queries, but for PRISM one of each user, by "
        "the draw of Tables 3 and 7. Correlations over method x seed as in Tables 2, 4 and 7 (here without the LoRA rows), "
        f"with 95% intervals that resample the methods. {_older(cells, drawn)}{lacks}",
    )
    return made, lacking


def _title_of(name: str, data: str | None, profile: str) -> str:
    return name if data is None else data if profile == "paper" else f"{name} (for {data})"


def _printed_points(data: str | None, scale: str | None, paper: dict) -> dict[str, tuple[float, float]]:
    """The paper's (RM accuracy, policy accuracy) by row, for the policy of that size."""
    tables = {
        "TLDR": "2",
        "PRISM": "7",
        "Pref-LaMP": str(9 + SCALES["Pref-LaMP"].index(scale)) if scale in SCALES["PRISM"] else "",
    }
    found = {}
    for row, values in paper.get(tables.get(data or "", ""), {}).items():
        x, y = values.get("rm_accuracy"), values.get(f"policy_accuracy {scale}")
        if row in GUIDES and x and y:
            found[row] = (x[0], y[0])
    return found


def _correlations(points: dict, over: tuple[str, ...]) -> str:
    found = correlate_methods({row: of_row for row, of_row in points.items() if row in over})["points"]
    lines = []
    for name, symbol in SYMBOLS.items():
        one = found[name]
        value = "undefined" if one["value"] is None else f"{one['value']:.2f}"
        lines.append(f"{symbol} {value}" + (f" [{one['low']:.2f}, {one['high']:.2f}]" if one["low"] is not None else ""))
    return ("   ".join(lines[:2]) + f"\n{lines[2]}   n = {found['n']}").replace("-", "−")


# --- Figure 2


def _quality(cells: list[dict], paper: dict, profile: str):
    cells = results.of_set(cells, profile, "Pref-LaMP")
    there = {c["row"] for c in cells}
    rows = [row for row in (*LAMP, *LORA, UNGUIDED) if row not in ("PAL", "Zero-Shot") and (row in LAMP or row in there)]
    policies = results.policies(cells)
    beside = {policy: scale for scale, policy in results.match(SCALES["Pref-LaMP"], policies).items() if policy}
    metrics = [key for key in ("rouge1", "rougeL", "bertscore") if any(METRICS[key].measure(c) for c in cells)]
    if not metrics:
        raise PyargsError(f"Figure 2 needs generated answers; {captions.makes(profile, rows, (), 'Pref-LaMP')}")
    plt = _pyplot()
    size = (4.3 * len(metrics) + 1.2, 0.36 * len(rows) * max(1, 0.6 * len(policies)) + 2.6)
    made, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", sharey=True, squeeze=False)
    colours = _colours(policies)
    for axis, key in zip(axes[0], metrics, strict=True):
        for number, policy in enumerate(policies):
            own = [c for c in cells if c["policy"] == policy]
            of = lambda row: results.summary([c for c in own if c["row"] == row], METRICS[key].measure)  # noqa: B023, E731
            level = of("Zero-Shot")
            shift = (number - (len(policies) - 1) / 2) * 0.7 / len(policies)
            if level:
                axis.axvline(level["mean"], color=colours[policy], linestyle="--", linewidth=1.2)
                for place, value in _gains(rows, key, beside.get(policy), paper).items():
                    axis.plot(level["mean"] + value, place + shift - 0.16, marker="D", markersize=5, fillstyle="none", **LIGHT)
            for place, row in enumerate(rows):
                if found := of(row):
                    _point(axis, found, place + shift, colours[policy])
        axis.set_xlabel(METRICS[key].heading)
        axis.grid(axis="x", alpha=0.25)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].set_ylim(len(rows) - 0.4, -0.6)
    handles = [_handle(marker="o", color=colours[policy], label=policy) for policy in policies]
    handles += [
        _handle(linestyle="--", color="#555555", label="zero-shot"),
        _handle(marker="D", fillstyle="none", color=LIGHT["color"], label="the paper, as far from its zero-shot level"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    missing = [row for row in rows if _lacks(cells, row, policies, metrics[0])]
    _title(
        made,
        "Generated answers against what the user wrote, mean over seeds with the 95% interval over users; "
        f"{_stand_ins(cells, profile)}. {_older(cells, rows)}{_missing(missing)}",
    )
    return made, missing


def _gains(rows: list[str], key: str, scale: str | None, paper: dict) -> dict[int, float]:
    """The paper's value minus its zero-shot value, by the row's place; none for BERTScore, whose model is not named."""
    printed = paper.get(str(9 + SCALES["Pref-LaMP"].index(scale)), {}) if scale else {}
    level = printed.get("Zero-Shot", {}).get(f"{key} {scale}")
    if not level or key == "bertscore":
        return {}
    given = {place: printed.get(row, {}).get(f"{key} {scale}") for place, row in enumerate(rows)}
    return {place: value[0] - level[0] for place, value in given.items() if value}


# --- Figure 3


def _shots(cells: list[dict], paper: dict, profile: str):
    cells = results.of_set(cells, profile, "Pref-LaMP")
    policies = results.policies(cells)
    beside = {policy: scale for scale, policy in results.match(SCALES["Pref-LaMP"], policies).items() if policy}
    names = {name: [_shots_row(name, shots) for shots in SHOTS] for name in ("ICL", "ICL-RAG")}
    every = list(dict.fromkeys(row for rows in names.values() for row in rows))
    missing = [row for row in every if _lacks(cells, row, policies, "rouge1")]
    if not any(c["row"] in every and METRICS["rouge1"].measure(c) for c in cells):
        raise PyargsError(f"Figure 3 needs generated answers; {captions.makes(profile, every, (), 'Pref-LaMP')}")
    plt = _pyplot()
    size = (4.6 * min(2, len(policies)) + 0.6, 3.8 * -(-len(policies) // 2) + 1.4)
    made, axes = plt.subplots(-(-len(policies) // 2), min(2, len(policies)), figsize=size, layout="constrained", squeeze=False)
    colours = dict(zip(names, ("#1b6ca8", "#c1501f"), strict=True))
    for axis, policy in zip(axes.flat, policies, strict=False):
        own = [c for c in cells if c["policy"] == policy]
        of = lambda row: results.summary([c for c in own if c["row"] == row], METRICS["rouge1"].measure)  # noqa: B023, E731
        level, scale = of("Zero-Shot"), beside.get(policy)
        if level:
            axis.axhline(level["mean"], color="#555555", linestyle="--", linewidth=1)
        for side, (name, rows) in enumerate(names.items()):
            found = {place: one for place, row in enumerate(rows) if (one := of(row))}
            places = [place + (side - 0.5) * 0.12 for place in found]
            axis.plot(places, [one["mean"] for one in found.values()], color=colours[name], linewidth=1.5)
            for place, one in zip(places, found.values(), strict=True):
                _point(axis, one, place, colours[name], vertical=True)
            if level and (gain := _gains([name], "rouge1", scale, paper)):
                place = SHOTS.index(8) + (side - 0.5) * 0.12
                look = {"marker": "D", "markersize": 6, "fillstyle": "none", "linestyle": "none", "alpha": 0.55}
                axis.plot(place, level["mean"] + gain[0], color=colours[name], **look)
        axis.set_title(policy + (f" (the paper's: {scale})" if scale else ""), fontsize=10)
        axis.set_xticks(range(len(SHOTS)), SHOTS)
        axis.set_xlim(-0.4, len(SHOTS) - 0.6)
        axis.set_xlabel("demonstrations")
        axis.set_ylabel("ROUGE-1")
        axis.grid(axis="y", alpha=0.25)
    for axis in list(axes.flat)[len(policies) :]:
        axis.set_axis_off()
    handles = [_handle(marker="o", linestyle="-", color=colour, label=name) for name, colour in colours.items()]
    handles += [
        _handle(linestyle="--", color="#555555", label="zero-shot"),
        _handle(marker="D", fillstyle="none", color="#555555", label="the paper, as far from its zero-shot level"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _title(
        made,
        f"ROUGE-1 by demonstrations, with the 95% interval over users; {_stand_ins(cells, profile)}. "
        f"{_older(cells, every)}{_missing(missing)}",
    )
    return made, missing


def _lacks(cells: list[dict], row: str, policies: list[str], key: str) -> bool:
    """Whether a row has no value with some policy (one that is a policy of its own: at all)."""
    there = {c["policy"] for c in cells if c["row"] == row and METRICS[key].measure(c)}
    return not there if row == OWN_POLICY else not there.issuperset(policies)


def _shots_row(name: str, shots: int) -> str:
    return {0: "Zero-Shot", 8: name}.get(shots, f"{name}, {shots} shots")


# --- what they share


def _pyplot():
    matplotlib.use("Agg")
    pyplot.close("all")
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def _colours(names) -> dict[str, str]:
    """A colour each, the same in every figure with the same names; Okabe-Ito's first, which colour-blind readers can tell."""
    palette = (
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
        "#000000",
        "#8C6D31",
        "#7F3C8D",
        "#A5AA99",
        "#E15759",
    )
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def _point(axis, found: dict, place: float, colour: str, vertical: bool = False) -> None:
    """A mean and its interval over users."""
    around = None if found["low"] is None else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
    x, y = (place, found["mean"]) if vertical else (found["mean"], place)
    bars = {"yerr" if vertical else "xerr": around}
    axis.errorbar(x, y, **bars, marker="o", markersize=5, color=colour, elinewidth=1.2, capsize=2, linestyle="none")


def _handle(**look):
    return Line2D([], [], **{"linestyle": "none", **look})


def _title(made, text: str) -> None:
    width = made.get_size_inches()[0]
    made.suptitle(textwrap.fill(text.rstrip(), int(width * 14.5)), fontsize=8.5, x=0.01, ha="left")


def _stand_ins(cells: list[dict], profile: str) -> str:
    """Whose data they are: "pref_lamp_like/ci in the place of Pref-LaMP"."""
    names = {}
    for cell in cells:
        names.setdefault(cell["set"], (cell.get("data") or cell["set"], cell["stands_for"]))
    place = lambda data: f" in the place of {data}" if data and profile != "paper" else ""  # noqa: E731
    return f"profile {profile}: " + "; ".join(name + place(data) for name, data in names.values())


def _older(cells: list[dict], rows: Iterable[str]) -> str:
    """Which of these rows some cell was made by an older rule of, set by set."""
    said = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name and cell["row"] in rows]
        behind = dict.fromkeys(cell["row"] for cell in own if rules.older(cell))
        if behind:
            every = behind.keys() == {cell["row"] for cell in own}
            said.append(f"{'all' if every else captions.listed(behind)} of {name}")
    return f"Made by older rules, which the tables name: {'; '.join(said)}. " if said else ""


def _missing(rows: list[str]) -> str:
    return f"Missing: {captions.listed(rows)}." if rows else ""
