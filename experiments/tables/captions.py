"""What stands around the numbers of a table: whose data and policy they are, how to read them, what is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from string import ascii_lowercase

from experiments import profiles, results, rules
from experiments.tables.render import MISSING, Column
from experiments.tables.specs import GUIDES, METRICS, OWN_POLICY, SCALES, UNGUIDED, Spec

# How to read a column, by its metric.
COLUMNS = {
    "policy_accuracy": "Policy accuracy in the paper's form sums log pi + w r over the tokens of guided rows, and takes the "
    "mean log-prob of rows that answer by themselves; sums prefer short responses. `centred`: the same with r minus its mean "
    "per token on the seen users' held-out pairs, since a constant would count once per token. `all normalised`: means "
    "throughout.",
    "cut": "Cut: percent of the answers that ran into the token limit.",
    "weight": "Weights: the chosen ones in units of 1 / reward_std, one for each seed; 0 means that the reward is not used.",
}
SUBSET = (
    "One query of each user, as in the paper: a fixed seed draws it, and it is the same in all rows (Table 8 has all "
    "queries). Ties are those of all queries."
)
WIDENED = (
    "Intervals resample users and are as much wider as so few users need (Student's t over the normal): one may end above 100."
)
INTERVALS = (
    "In brackets the 95% interval: whole methods are resampled, each with all of its seeds. Undefined: fewer than 3 points, "
    "or one side is constant. The paper does not say what its points are; its numbers fit method x seed."
)


def caption(title: str, cells: list[dict], profile: str, data: str | None, beside: dict[str, str | None]) -> str:
    """Title; then profile, the data's own name, the policies beside the paper's, and which backbones were trained."""
    if not cells:
        return f"{title}. Profile {profile} has no cells of it: the paper's numbers alone."
    names = " and ".join(sorted({c.get("data") or c["set"] for c in cells}))
    stands = "" if data is None or profile == "paper" else f", which stands in for the paper's {data}"
    frozen, trained = backbones(cells)
    backbone = ""
    if frozen:
        backbone = f" The reward models' backbone is frozen{f', but trained with LoRA in {listed(trained)}' * bool(trained)}."
    elif trained:
        backbone = " Backbones are trained with LoRA."
    return f"{title}. Ours: profile {profile}; data {names}{stands}; {_policies(cells, beside)}.{backbone}"


def _policies(cells: list[dict], beside: dict[str, str | None]) -> str:
    used = {policy: scale for scale, policy in beside.items() if policy}
    if beside and not used:
        return f"no policy beside the paper's {listed(beside)}"
    dtypes = {c["policy"]: c.get("dtype") for c in cells}
    shown = []
    for policy, scale in (used or dict.fromkeys(results.policies(cells), "")).items():
        dtype = f" ({dtypes[policy]})" if dtypes[policy] else ""
        shown.append(policy + dtype + (f" beside the paper's {scale}" if scale else ""))
    return f"{'policy' if len(shown) == 1 else 'policies'} {listed(shown)}"


def backbones(cells: list[dict]) -> tuple[list[str], list[str]]:
    """The rows whose models have a frozen backbone, and those trained with LoRA; rows without training are in neither."""
    frozen, trained = set(), set()
    for cell in cells:
        if cell.get("method") not in (None, "icl"):
            (frozen if (cell.get("fields") or {}).get("freeze_backbone") else trained).add(cell["row"])
    return sorted(frozen), sorted(trained)


def reading(spec: Spec, cells: list[dict]) -> list[str]:
    """How to read a table with methods in its rows."""
    said = [
        f"{counted(cells)}Percent; mean ± sample std over seeds [95% interval over users]; {MISSING}: missing, see below; "
        f"empty: the row has no such value. {WIDENED}"
    ]
    said += [SUBSET] if spec.subset else []
    said += [text for key, text in COLUMNS.items() if key in spec.metrics]
    own = [c["policy"] for c in cells if c["row"] == OWN_POLICY]
    if own and OWN_POLICY in spec.rows and spec.scales not in ((), SCALES[spec.data][:1]):
        said.append(f"{OWN_POLICY} is a policy of its own, trained from {own[0]}: its row is the same beside every policy.")
    if any(c["row"] == "VPL, mu" for c in cells):
        said.append(
            "VPL: latents scaled to the length that they have in training; `VPL, mu`: the encoder's means as they are."
        )
    if spec.note:
        generations = [c["values"].get("generations") or {} for c in cells]
        models = sorted({one["bertscore_model"] for one in generations if one.get("bertscore_model")})
        said.append(spec.note.format(bertscore="; ".join(models) or "none yet"))
    said += [text] if "same" in spec.metrics and (text := rounding(cells)) else []
    if "cut" in spec.metrics and (cut := [row for row in dict.fromkeys(c["row"] for c in cells) if _mostly_cut(row, cells)]):
        said.append(
            f"More than half of the answers are cut off by the token limit: {listed(cut)}. ROUGE is then about cut answers."
        )
    return said if cells else said[len(said) - bool(spec.note) :]


def marked(rows: list[dict], cells: list[dict], ranked: Iterable[dict] = ()) -> tuple[list[Column], list[str]]:
    """Letters for what must be said of the rows' cells (`rules.marks`), written into the rows, with their column and notes.

    Both are empty where nothing must be said. Of cells of other rows nothing is said; without rows the notes are about all
    cells.
    """
    shown = {row["row"] for row in rows} or {cell["row"] for cell in cells}
    found = rules.marks(*([cell for cell in some if cell["row"] in shown] for some in (cells, ranked)))
    notes = []
    for letter, (text, of) in zip(ascii_lowercase, found.items(), strict=False):
        whose = "All rows" if shown == set(of) else "; ".join(with_seeds(of))
        notes.append(f"{f'{letter}: ' if rows else ''}{text}. {whose}.")
        for row in rows:
            if row["row"] in of:
                row["marks"] = f"{row.get('marks', '')} {letter}".strip()
    return [Column("marks", "see")] if rows and notes else [], notes


def _mostly_cut(row: str, cells: list[dict]) -> bool:
    found = results.summary([c for c in cells if c["row"] == row], METRICS["cut"].measure)
    return found is not None and found["mean"] > 50


def counted(cells: list[dict]) -> str:
    """Users, queries and generated answers behind the numbers, from the first cells that tell."""
    accuracies = ((c["values"].get("rm_accuracy") or {}).get("each") for c in cells)
    answers = ((c["values"].get("generations") or {}).get("n") for c in cells)
    each, count = next(filter(None, accuracies), None), next(filter(None, answers), None)
    said = [f"{len(each)} users", f"{sum(map(len, each.values()))} queries"] if each else []
    said += [f"{count} generated answers"] if count else []
    return f"{', '.join(said)}. " if said else ""


def controls(cells: list[dict], paper: dict | None, scale: str) -> list[str]:
    """What the decoder does without a reward, and demonstrations beside the best reward: ROUGE-1, ours and the paper's.

    cells: those of the one policy that stands beside the paper's `scale`.
    """
    derived = (paper or {}).get("derived") or {}
    own = {row: [c for c in cells if c["row"] == row] for row in {c["row"] for c in cells}}
    rouge = METRICS["rouge1"].measure
    means = {row: found["mean"] for row in GUIDES if (found := results.summary(own.get(row, []), rouge))}
    best = max(means, key=means.get, default=None)
    gains = (derived.get("args_minus_zeroshot_rouge1") or {}).get(scale)
    rag = (derived.get("icl_rag_minus_best_reward_rouge1") or {}).get(scale)
    asked = {  # what: (row, other row, the paper's)
        "Decoding by ARGS with weight 0 minus Zero-Shot, ROUGE-1 (the same policy, no reward)": (
            UNGUIDED,
            "Zero-Shot",
            f"the paper's rows that look unguided: {min(gains.values()):+g} to {max(gains.values()):+g}" if gains else "",
        ),
        f"ICL-RAG minus the best guided row ({best}), ROUGE-1": ("ICL-RAG", best, f"the paper's: {rag:+g}" if rag else ""),
    }
    said = []
    for what, (row, other, printed) in asked.items():
        if found := results.difference(own.get(row, []), own.get(other, []), rouge):
            interval = f" [{found['low']:+.2f} to {found['high']:+.2f}]" if found["low"] is not None else ""
            rounded = f" {rounding(cells)}".rstrip() if other == "Zero-Shot" else ""
            said.append(f"{what}: {found['mean']:+.2f}{interval}{'; ' if printed else ''}{printed}.{rounded}")
    return said


def rounding(cells: list[dict]) -> str:
    """What differences from Zero-Shot contain where two decoders may round differently, and how much; "" in float32, and
    where no answer of a row that does not guide is another than Zero-Shot's."""
    dtypes = sorted({c.get("dtype") or "unknown precision" for c in cells} - {"float32"})
    if not dtypes:
        return ""
    same = {
        f"{c['row']}, seed {c['seed']}": one["value"]
        for c in cells
        if c["values"].get("relative") == 0 and (one := results.text(c, "same_as_zero_shot"))
    }
    if same and min(same.values()) == 100:
        return ""
    unguided = "; ".join(f"{row}: {value:.1f} percent" for row, value in same.items())
    return (
        f"Differences from Zero-Shot may contain the rounding of {listed(dtypes)}: two decoders can differ without a reward; "
        f"`same as zero-shot` of a row whose chosen weight is 0 measures it ({unguided or 'no such row here'})."
    )


def missing(
    lacking: dict[str, list[str]],
    rows: Iterable[str],
    cells: list[dict],
    profile: str,
    data: str | None,
    beside: dict[str, str | None],
) -> list[str]:
    """A line for each set of rows that lack the same, and for seeds, with the commands that make them.

    lacking: row -> headings; rows: all that the table shows.
    """
    if not cells:
        what = f"no cells for {data}" if data else "no such cells"
        return [f"Missing: all of ours. Profile {profile} has {what}; {makes_all(profile)}."]
    said = []
    without = [scale for scale, policy in beside.items() if policy is None]
    if without:
        said.append(
            f"Missing: a policy of ours beside the paper's {listed(without)}. Profile {profile} has "
            f"{listed(results.policies(cells))}; `{results.command('paper')}` makes the paper's own."
        )
        if len(without) == len(beside):
            return said
    groups: dict[tuple[str, ...], list[str]] = {}
    for row, headings in lacking.items():
        groups.setdefault(tuple(headings) if any(c["row"] == row for c in cells) else (), []).append(row)
    sets = {c["set"] for c in cells}
    for headings, alike in groups.items():
        what = f"{'; '.join(headings)} of " if headings else ""
        said.append(f"Missing: {what}{listed(alike)}. {_sentence(makes(profile, alike, sets))}")
    begun = {c["row"] for c in cells} & set(rows)
    absent = profiles.seeds(c for c in profiles.absent(profile, cells) if c["set"] in sets and c["row"] in begun)
    if absent:
        said.append(f"Missing: {'; '.join(with_seeds(absent))}. {_sentence(makes(profile, absent, sets))}")
    return said


def makes_all(profile: str) -> str:
    return f"`{results.command(profile)}` makes what this profile has, `{results.command('paper')}` the paper's own sets"


def makes(profile: str, rows: Collection[str], sets: Iterable[str], data: str | None = None) -> str:
    """What makes rows of these sets: a command of the profile, and of a larger one for rows that it does not run there.

    data: the paper's data set that they stand for, which says the sets where there are none yet.
    """
    here, sets = runs(profile, rows, sets, data)
    others = [row for row in rows if row not in here]
    said = [f"`{results.command(profile, here, sets)}`"] if here else []
    stands = {one["stands_for"] for one in profiles.planned(profile) if one["set"] in sets} | {data}
    for larger in results.PROFILES[: results.PROFILES.index(profile)][::-1] if others else ():
        there = {one["row"]: one["set"] for one in profiles.planned(larger) if one["stands_for"] in stands - {None}}
        if both := [row for row in others if row in there]:
            run = results.command(larger, both, sorted({there[row] for row in both}))
            said.append(f"profile {profile} does not run {listed(both)} on these data, `{run}` does")
            others = [row for row in others if row not in there]
    if others:
        said.append(f"no profile runs {listed(others)} on these data (experiments/profiles.py)")
    return "; ".join(said)


def runs(profile: str, rows: Iterable[str], sets: Iterable[str], data: str | None = None) -> tuple[list[str], list[str]]:
    """Those of the rows that a profile runs on these sets, and the sets (those for `data` where there are none)."""
    told = profiles.planned(profile)
    sets = sorted(sets) or sorted({one["set"] for one in told if data is not None and one["stands_for"] == data})
    known = {one["row"] for one in told if one["set"] in sets or not (sets or data)}
    return [row for row in rows if row in known], sets


def with_seeds(lacking: dict[str, list[int]]) -> list[str]:
    """Rows and their seeds: PAL (seeds 1, 2)."""
    return [f"{row} (seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))})" for row, numbers in lacking.items()]


def _sentence(text: str) -> str:
    return text if text.startswith("`") else text[0].upper() + text[1:]


def correlation_notes(spec: Spec, cells: list[dict]) -> list[str]:
    present = [row for row in spec.over if any(c["row"] == row for c in cells)]
    which = f"; with cells: {listed(present) or 'none'}" if len(present) < len(spec.over) else ""
    return [f"Methods: {listed(spec.over)}{which}.", INTERVALS]


def number_or_range(value) -> str:
    """A printed correlation, or the lowest and highest where the paper gives only those."""
    return "" if value is None else f"{value[0]:g} to {value[1]:g}" if isinstance(value, list) else f"{value:g}"


def listed(names: Iterable[str]) -> str:
    """a, b and c; a name with a comma in it is quoted."""
    names = [f'"{name}"' if "," in name else name for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
