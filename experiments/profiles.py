"""What the evaluation runs: the rows of the tables, the data sets, the profiles. `reproduce.py` runs it.

A profile: workers (processes), seeds, dtype, sets. A set: stands_for (the paper's data set whose tables it fills; None: an
extra table), about, data (flags of every command; {shared} and {work} are folders), build (flags of `pyargs data build` where
the set has to be made), counted (its row of results/data_statistics.json), needs (what must be there), backbone (of the
reward models), policies, rows (name -> method and the fields that are not its defaults; None: a control that is no method),
once (rows that are run for the first seed only), tune (flags), decode (flags; None: nothing is generated), bertscore (its
model).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from experiments import results

ZERO_SHOT = {"Zero-Shot": ("icl", {"shots": 0})}
HEADS = {
    "Global RM": ("global_rm", {}),
    "Global RM-v2": ("global_rm", {"pool": "mean"}),
    "LoRE": ("lore", {}),
    "LoRE-Alt": ("lore", {"alternate": True, "rank": 20}),
    "MPU": ("mpu", {}),
    "MPU-Avg": ("mpu", {"pool": "mean"}),
    "PAL": ("pal", {"variant": "B"}),
    "PReF": ("pref", {}),
    "VPL": ("vpl", {}),
    "VPL, mu": ("vpl", {"eval_z": "mu"}),
}
LANGUAGE_MODELS = {"GenARM": ("genarm", {}), "P-DPO": ("pdpo", {})}
ICL = {"ICL": ("icl", {"shots": 8}), "ICL-RAG": ("icl", {"shots": 8, "retrieve": "minilm"})}
SHOTS = {
    f"{row}, {shots} shots": ("icl", {**fields, "shots": shots}) for shots in (2, 4, 16) for row, (_, fields) in ICL.items()
}
RETRIEVED = ["ICL-RAG", *(row for row in SHOTS if row.startswith("ICL-RAG"))]  # nothing is drawn: one seed tells all
UNGUIDED = {"ARGS, weight 0": None}
BLIND = {"word overlap": None, "MiniLM cosine": None}


def fields(rows: dict, **more) -> dict:
    return {row: (method, {**own, **more}) for row, (method, own) in rows.items()}


def named(rows: dict, suffix: str, *names: str) -> dict:
    """Some of the rows under other names, so that a trained backbone can stand beside a frozen one."""
    return {f"{row}, {suffix}": rows[row] for row in names}


def two_tastes(rows: dict) -> dict:
    """The paper's settings for TLDR: two latent dimensions; LoRE-Alt was not run there."""
    own = {row: value for row, value in rows.items() if row != "LoRE-Alt"}
    return {row: (m, {**f, "rank": 2} if m in ("lore", "pref", "pal") else f) for row, (m, f) in own.items()}


TITLES = {
    "instruction": "Generate a title for the following abstract of a paper: ",
    "prompt_name": "Abstract",
    "response_name": "title",
    "demonstration_tokens": 5504,
}
WEIGHT_BY_TITLES = ["--objective", "harmonic"]

# -- cpu: two cores, SmolLM2-135M as policy and as backbone of the reward models ------------------------------------------

FROZEN = fields(HEADS, freeze_backbone=True, dtype="bfloat16")


def few_pairs(rows: dict, epochs: float) -> dict:
    """LoRA on part of the pairs, some 26 steps: about 15 minutes on two cores (P-DPO's two steps for new users: 16 more)."""
    return fields(rows, dtype="bfloat16", epochs=epochs, batch_size=8)


CPU = {"backbone": "smollm2-135m", "policies": ["smollm2-135m"]}
CPU_TITLES = few_pairs(
    {"GenARM": LANGUAGE_MODELS["GenARM"], "P-DPO": ("pdpo", {"adapt_steps": 2}), **named(HEADS, "LoRA", "Global RM", "LoRE")},
    200 / 768,
)
# For what is released (`experiments/artefacts.py`): the licence of a set, and whether its users may be named, hashed, or
# neither. Authors are real people; the users of HH-RLHF's replies are constructed.
TITLES_ARE = {"licence": "CC-BY-4.0 (ACL Anthology), CC0-1.0 (arXiv metadata)", "ids": "hashed"}
REPLIES_ARE = {"licence": "MIT (texts of HH-RLHF)", "ids": "named"}
CPU_SETS = {
    "pref_lamp": {
        **CPU, "stands_for": "Pref-LaMP", "needs": "{shared}/pref_lamp_like/ci",
        "data": ["--data", "{work}/data/pref_lamp_ci"],
        "build": ["pref_lamp", "--source", "{shared}/pref_lamp_like/ci", "--embedder", "minilm"],
        "counted": "pref_lamp, 40 users",
        "about": "pref_lamp_like/ci: titles of papers of 30 + 10 authors (ACL, arXiv), neighbours by MiniLM",
        **TITLES_ARE,
        "rows": {**ZERO_SHOT, **FROZEN, **UNGUIDED, **BLIND, **CPU_TITLES, **fields({**ICL, **SHOTS}, **TITLES)},
        "once": [*CPU_TITLES, *SHOTS, "ICL-RAG"],
        "tune": [*WEIGHT_BY_TITLES, "--grid", "0", "0.1", "0.3", "1", "3", "--prompts", "24", "--max-new-tokens", "24"],
        "decode": ["--max-new-tokens", "32"], "bertscore": "minilm",
    },
    "length_prefs": {
        **CPU, "stands_for": "TLDR", "data": ["--data", "hh_rlhf_users", "--source", "{shared}/hh_rlhf_users"],
        "needs": "{shared}/hh_rlhf_users",
        "about": "hh_rlhf_users/length_prefs: replies of HH-RLHF, 10 + 31 users who want longer or shorter ones",
        **REPLIES_ARE,
        "rows": {
            **ZERO_SHOT, **two_tastes(FROZEN), **UNGUIDED, **BLIND,
            **few_pairs({"GenARM": LANGUAGE_MODELS["GenARM"], **named(two_tastes(HEADS), "LoRA", "LoRE")}, 200 / 2400),
        },
        "once": ["GenARM", "LoRE, LoRA"], "tune": ["--prompts", "24", "--max-new-tokens", "24"], "decode": None,
    },
    "two_types": {
        **CPU, "stands_for": "PRISM", "needs": "{shared}/hh_rlhf_users",
        "data": ["--data", "hh_rlhf_users", "--source", "{shared}/hh_rlhf_users/two_types_prefs.jsonl.gz"],
        "about": "hh_rlhf_users/two_types_prefs: dialogues of HH-RLHF, 40 + 20 constructed users who want helpful or harmless",
        **REPLIES_ARE,
        "rows": {**ZERO_SHOT, **FROZEN, **UNGUIDED, **BLIND}, "once": [],
        "tune": ["--prompts", "24", "--max-new-tokens", "24"], "decode": None,
    },
    "same_content": {
        **CPU, "stands_for": None, "needs": "{shared}/pref_lamp_like/ci", "data": ["--data", "{work}/data/same_content"],
        "build": ["pref_lamp", "--source", "{shared}/pref_lamp_like/ci", "--negatives", "policy", "--dtype", "bfloat16",
                  "--embedder", "minilm"],
        "counted": "pref_lamp, 40 users, policy's titles",
        "about": "pref_lamp_like/ci, rejected: SmolLM2-135M's own title of the same abstract", **TITLES_ARE,
        "rows": {**ZERO_SHOT, **FROZEN, **BLIND}, "once": [],
        "tune": ["--prompts", "24", "--max-new-tokens", "24"], "decode": None,
    },
}  # fmt: skip

# -- gpu: all users of the stand-in for Pref-LaMP; LoRA for one seed --------------------------------------------------------

GPU_LORA = fields(
    {
        # 200 steps for new users do not fit calls of ten minutes: the row is marked.
        "GenARM": LANGUAGE_MODELS["GenARM"],
        "P-DPO": ("pdpo", {"adapt_steps": 10}),
        **named(HEADS, "LoRA", "Global RM", "LoRE"),
    },
    dtype="bfloat16",
    epochs=1.0,
)
GPU_SETS = {
    "pref_lamp": {
        **CPU_SETS["pref_lamp"], "data": ["--data", "{work}/data/pref_lamp_like"], "needs": "{shared}/pref_lamp_like",
        "build": ["pref_lamp", "--source", "{shared}/pref_lamp_like", "--embedder", "minilm"], "counted": "pref_lamp",
        "about": "pref_lamp_like: titles of papers of 485 + 126 authors (ACL, arXiv), neighbours by MiniLM",
        "rows": {**ZERO_SHOT, **FROZEN, **UNGUIDED, **BLIND, **GPU_LORA, **fields({**ICL, **SHOTS}, **TITLES)},
        "once": [*GPU_LORA, *SHOTS, "ICL-RAG"],
        "tune": [*WEIGHT_BY_TITLES, "--grid", "0", "0.1", "0.3", "1", "3", "--prompts", "100", "--max-new-tokens", "32",
                 "--batch-size", "64"],
        "decode": ["--max-new-tokens", "32", "--batch-size", "128"],
    },
}  # fmt: skip

# -- paper: its models from the hub, its data from their sources, LoRA everywhere -------------------------------------------

SMOLLM2 = [f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("135M", "360M", "1.7B")]
QWEN = [f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")]
# What the methods' own codes have where the paper is silent and our default is another; the paper's one rate for all LoRA.
ORIGINAL = {
    "lore": {"adapt_init": "randn"},
    "pref": {"votes": "unit", "adapt_init": "randn"},
    "pdpo": {"soft_lr": 5e-5},
    "genarm": {"lora_lr": 5e-5},
}
FULL = {
    row: (method, {**own, **ORIGINAL.get(method, {}), "dtype": "bfloat16"})
    for row, (method, own) in {**HEADS, **LANGUAGE_MODELS}.items()
}
# LoRE's code has two rates for new users: ours on TLDR, and this.
LORE_ON_PRISM = {row: (method, {**own, "adapt_lr": 0.5}) for row, (method, own) in FULL.items() if method == "lore"}
PAPER_SETS = {
    "tldr": {
        "licence": "Modified MIT (OpenAI's comparisons), CC-BY-4.0 (posts)", "ids": "hashed",
        "stands_for": "TLDR", "about": "TL;DR, ten workers and 31 new ones", "backbone": SMOLLM2[0], "policies": SMOLLM2,
        "data": ["--data", "{work}/data/tldr"], "build": ["tldr", "--source", "hub"], "needs": None,
        "rows": {**ZERO_SHOT, **two_tastes(FULL), **UNGUIDED, **BLIND}, "once": [], "tune": [], "decode": None,
    },
    "prism": {
        "licence": "CC-BY-4.0 (what people wrote), CC-BY-NC-4.0 (what models wrote)", "ids": "none",
        "stands_for": "PRISM", "about": "PRISM", "backbone": QWEN[0], "policies": QWEN,
        "data": ["--data", "{work}/data/prism"], "build": ["prism", "--source", "hub"], "needs": None,
        "rows": {**fields({**ZERO_SHOT, **FULL, **LORE_ON_PRISM}, max_length=1024), **UNGUIDED, **BLIND}, "once": [],
        "tune": [], "decode": None,
    },
    "pref_lamp": {
        "licence": "CC-BY-NC-SA-4.0", "ids": "hashed",
        "stands_for": "Pref-LaMP", "about": "Pref-LaMP, 611 authors of LaMP-5", "backbone": QWEN[0], "policies": QWEN,
        "data": ["--data", "{work}/data/pref_lamp"], "needs": None,
        "build": ["pref_lamp", "--source", "hub", "--users", "611"],
        "rows": {**ZERO_SHOT, **FULL, **UNGUIDED, **BLIND, **fields({**ICL, **SHOTS}, **TITLES)}, "once": RETRIEVED,
        "tune": WEIGHT_BY_TITLES, "decode": [], "bertscore": "microsoft/deberta-xlarge-mnli",
    },
}  # fmt: skip

# -- smoke: every row once on planted users with a tiny random model --------------------------------------------------------

SMOKE_SETS = {
    "synthetic": {
        "stands_for": "Pref-LaMP",
        "about": "planted users who disagree as often as they agree",
        "licence": "Apache-2.0, made by pyargs",
        "ids": "named",
        "backbone": "tiny-random",
        "policies": ["tiny-random"],
        "data": ["--data", "synthetic"],
        "needs": None,
        "rows": {
            **ZERO_SHOT,
            **fields(HEADS, freeze_backbone=True, epochs=4.0),
            **UNGUIDED,
            **BLIND,
            **fields(named(HEADS, "LoRA", "Global RM", "LoRE", "LoRE-Alt", "PAL", "VPL"), epochs=1.0),
            "GenARM": ("genarm", {"epochs": 1.0}),
            "P-DPO": ("pdpo", {"epochs": 1.0, "adapt_steps": 2}),
            **fields(ICL, shots=2),
        },
        "once": [],
        "tune": [*WEIGHT_BY_TITLES, "--grid", "0", "1", "--prompts", "8", "--max-new-tokens", "8"],
        "decode": ["--limit", "12", "--max-new-tokens", "8"],
        "bertscore": "minilm",
    },
}

PROFILES = {
    "smoke": {"workers": 2, "seeds": [0], "dtype": "float32", "sets": SMOKE_SETS},
    "cpu": {"workers": 2, "seeds": [0, 1, 2], "dtype": "bfloat16", "sets": CPU_SETS},
    "gpu": {"workers": 1, "gpus": 1, "seeds": [0, 1, 2], "dtype": "bfloat16", "sets": GPU_SETS},
    "paper": {"workers": 1, "gpus": 1, "seeds": [0, 1, 2], "dtype": "bfloat16", "sets": PAPER_SETS},
}

# -- cells: one row with one seed each ---------------------------------------------------------------------------------------


class Cell(NamedTuple):
    profile: str
    set: str
    policy: str
    row: str
    seed: int

    def name(self) -> str:
        return f"{self.set} / {self.policy} / {self.row} / seed {self.seed}"

    def settings(self) -> dict:
        return PROFILES[self.profile]["sets"][self.set]


def cells(profile: str) -> list[Cell]:
    """In the order in which they are run: a set's unguided row first, since the others are compared with it."""
    found = []
    for name, settings in PROFILES[profile]["sets"].items():
        for number, seed in enumerate(PROFILES[profile]["seeds"]):
            for policy in settings["policies"]:
                for row, method in settings["rows"].items():
                    once = row in settings["once"] or method is None or row == "Zero-Shot"
                    own = method is not None and method[0] == "pdpo" and policy != settings["backbone"]
                    if not (once and number) and not own:
                        found.append(Cell(profile, name, policy, row, seed))
    return found


@cache
def planned(profile: str) -> list[dict]:
    """{profile, set, policy, row, seed, stands_for} of every cell that a profile has to have."""
    return [{**cell._asdict(), "stands_for": cell.settings()["stands_for"]} for cell in cells(profile)]


def absent(profile: str, there: Iterable[dict]) -> list[dict]:
    """The cells that a profile has to have and that are not `there`."""
    found = {results.name(cell) for cell in there}
    return [one for one in planned(profile) if results.name(one) not in found]


def seeds(missing: Iterable[dict]) -> dict[str, list[int]]:
    """Absent cells by row: the seeds that lack with some policy."""
    found: dict[str, set[int]] = {}
    for one in missing:
        found.setdefault(one["row"], set()).add(one["seed"])
    return {row: sorted(numbers) for row, numbers in found.items()}
