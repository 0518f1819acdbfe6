"""Made-up cells of an evaluation: what `python -m experiments reproduce` writes, with outcomes drawn by a seed."""

from __future__ import annotations

import random
from pathlib import Path

from experiments import rules
from experiments.__main__ import main
from experiments.results import slug
from experiments.tables.specs import ALONE, LAMP, LORA, SCORERS, UNGUIDED, has
from pyargs import files

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
SETS = {"pref_lamp": "Pref-LaMP", "length_prefs": "TLDR", "two_types": "PRISM", "same_content": None}
SHOTS = [f"{row}, {shots} shots" for row in ("ICL", "ICL-RAG") for shots in (2, 4, 16)]
ROWS = (*LAMP, *LORA, UNGUIDED, *SCORERS)


def accuracy(outcomes: dict[str, str]) -> dict:
    together = "".join(outcomes.values())
    each = [text.count("1") / len(text) for text in outcomes.values()]
    return {
        "accuracy": 100 * together.count("1") / len(together),
        "macro": 100 * sum(each) / len(each),
        "tie_rate": 1.5,
        "n": len(together),
        "users": len(outcomes),
        "each": outcomes,
    }


def cell(row: str, seed: int = 0, **other) -> dict:
    """A whole cell of a row, with what such a row has; `other` replaces keys."""
    draw = random.Random(f"{row} {seed} {other.get('set')} {other.get('policy')}")
    level = random.Random(row).uniform(0.4, 0.95)
    pairs = {f"user {n}": 4 + n % 3 for n in range(8)}

    def made() -> dict:
        return accuracy({u: "".join(str(int(draw.random() < level)) for _ in range(n)) for u, n in pairs.items()})

    kinds, values, answers = has(row), {}, []
    if "reward" in kinds:
        values["rm_accuracy"] = made()
    if "weight" in kinds:
        kind = "global" if "Global" in row or row == "GenARM" else "personal"
        values["policy_accuracy"] = {"base": made(), kind: {name: made() for name in ("paper", "centred", "all", "sum")}}
        values |= {"relative": draw.choice([0, 0.3, 1, 10]), "reward_weight": draw.random()}
    elif row.split(",")[0] in ALONE:
        values["policy_accuracy"] = {"base" if row == "Zero-Shot" else "personal": {"mean": made(), "sum": made()}}
    elif row == UNGUIDED:
        values["policy_accuracy"] = {"base": made(), "weight_0": {"paper": made(), "all": made()}}
    if "text" in kinds:
        answers = [
            {
                "user_id": user,
                "pair_id": f"{user}-{n}",
                "text": "a title",
                "rouge1": 40 * draw.random() * level,
                "rougeL": 30 * draw.random() * level,
                "bertscore": 60 + 10 * draw.random(),
            }
            for user, count in pairs.items()
            for n in range(count)
        ]
        mean = {name: sum(a[name] for a in answers) / len(answers) for name in ("rouge1", "rougeL", "bertscore")}
        values["generations"] = {
            "n": len(answers),
            "empty": 0,
            **mean,
            "bertscore_model": "minilm, layer 6, not rescaled",
            "perplexity": 1 + draw.random(),
            "words": 10 + draw.random(),
            "cut": 20 * draw.random(),
        }
        if "win" in kinds:
            values["generations"]["same_as_zero_shot"] = 100 * draw.random()
            won = made()
            values["generations"]["win_rate"] = {
                "win_rate": won["accuracy"],
                "tie_rate": 2.0,
                "n": len(answers),
                "unscored": 0,
                "tokens": [11.0, 10.5],
                "each": won["each"],
            }
    method = None if row in (UNGUIDED, *SCORERS) else "icl" if row.split(",")[0] in ALONE[1:] else "lore"
    frozen = not row.endswith(", LoRA") and row not in ("GenARM", "P-DPO")
    return {
        "profile": "cpu", "set": "pref_lamp", "stands_for": "Pref-LaMP", "data": "pref_lamp_like/ci, 40 users", "row": row,
        "policy": "smollm2-135m", "backbone": "smollm2-135m", "dtype": "bfloat16", "seed": seed, "method": method,
        "fields": {"freeze_backbone": True} if frozen else {}, "values": values, "answers": answers,
        "key": {"recipe": rules.NEWEST, "data": None, "dtype": "bfloat16", "tune": [], "decode": [], "bertscore": "minilm",
                "row": [row]},
    } | other  # fmt: skip


def write(folder: Path, *cells: dict) -> Path:
    """Writes cells where `python -m experiments reproduce` would; returns the folder."""
    for one in cells:
        path = folder / one["profile"] / one["set"] / slug(one["policy"]) / f"{slug(one['row'])}-{one['seed']}.json"
        files.write_json(path, one)
    return folder


def full(root: Path) -> Path:
    """Results with all sets and rows, three seeds for titles and two elsewhere, beside the committed numbers of the paper."""
    files.write_json(root / "expected/paper.json", files.read_json(ROOT / "experiments/expected/paper.json"))
    for name, data in SETS.items():
        rows = (*ROWS, *SHOTS) if name == "pref_lamp" else ROWS
        for seed in range(3 if name == "pref_lamp" else 2):
            write(root / "results", *(cell(row, seed, set=name, stands_for=data) for row in rows))
    write(root / "results", cell("LoRE", profile="smoke", policy="tiny-random", set="synthetic"))
    files.write_json(root / "results/lora_runs.json", {"not": "a cell"})
    return root / "results"


def row_of(found, name: str) -> dict:
    """The row of a table by its name."""
    return next(row for row in found.rows if row["row"] == name)


def printed(*words, capsys) -> str:
    """What `python -m experiments table` prints."""
    assert main(["table", *map(str, words)]) == 0
    return capsys.readouterr().out
