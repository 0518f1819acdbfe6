"""What Tables 2-12 hold: which rows, which measures, which of the paper's policies, which correlations."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from experiments import results
from experiments.tables.render import OURS, PLAIN

SCALES = {  # the paper's policies by data set; Tables 9-12 have one each
    "TLDR": ("135M", "360M", "1.7B"),
    "PRISM": ("0.5B", "1.5B", "3B", "7B"),
    "Pref-LaMP": ("0.5B", "1.5B", "3B", "7B"),
}

LORA = ("Global RM, LoRA", "LoRE, LoRA")
SCORERS = ("word overlap", "MiniLM cosine")
UNGUIDED = "ARGS, weight 0"
OWN_POLICY = "P-DPO"  # trained from the reward models' backbone, whatever policy the table is about
ALONE = (OWN_POLICY, "Zero-Shot", "ICL", "ICL-RAG")  # rows that answer without a reward
GUIDES = ("GenARM", "Global RM", "Global RM-v2", "LoRE", "LoRE-Alt", "MPU", "MPU-Avg", "PReF", "VPL")
TLDR_EIGHT = tuple(row for row in GUIDES if row != "LoRE-Alt")
PRISM_EIGHT = tuple(row for row in GUIDES if row != "GenARM")
LAMP = (*GUIDES[:7], "PAL", *GUIDES[7:], *ALONE)


class Metric(NamedTuple):
    """measure: cell -> number, as in experiments.results. needs: what a row must have. paper: name of the paper's column."""

    heading: str
    measure: results.Measure
    needs: str
    parts: tuple[str, ...] = OURS
    paper: str | None = None
    digits: int = 2


METRICS = {
    "rm_accuracy": Metric("RM acc.", results.rm_accuracy, "reward", paper="rm_accuracy"),
    "rm_ties": Metric("ties", results.ties(results.rm_accuracy), "reward", PLAIN),
    "policy_accuracy": Metric("policy acc. (paper's form)", results.policy_accuracy, "policy", paper="policy_accuracy"),
    "policy_ties": Metric("ties", results.ties(results.policy_accuracy), "policy", PLAIN),
    **{
        f"policy_accuracy_{form}": Metric(f"policy acc. ({words})", partial(results.policy_accuracy, normalize=form), "policy")
        for form, words in (("centred", "centred"), ("all", "all normalised"))
    },
    "weight": Metric("weights", results.weight, "weight", ()),
    "rouge1": Metric("ROUGE-1", partial(results.text, name="rouge1"), "text", paper="rouge1"),
    "rougeL": Metric("ROUGE-L", partial(results.text, name="rougeL"), "text", paper="rougeL"),
    "bertscore": Metric("BERTScore-F1", partial(results.text, name="bertscore"), "text", paper="bertscore"),
    "perplexity": Metric("perplexity", partial(results.text, name="perplexity"), "text", PLAIN),
    "words": Metric("words", partial(results.text, name="words"), "text", PLAIN, digits=1),
    "cut": Metric("cut", partial(results.text, name="cut"), "text", PLAIN, digits=1),
    "win_rate": Metric("win rate", results.win_rate, "win", paper="win_rate"),
    "win_ties": Metric("ties", results.ties(results.win_rate), "win", PLAIN),
    "win_tokens": Metric("tokens", partial(results.win_tokens, side=0), "win", PLAIN, digits=1),
    "zero_shot_tokens": Metric("tokens, zero-shot", partial(results.win_tokens, side=1), "win", PLAIN, digits=1),
    "same": Metric("same as zero-shot", partial(results.text, name="same_as_zero_shot"), "win", PLAIN, digits=1),
}
SHARED = ("rm_accuracy", "rm_ties")  # of the reward model alone: the same for every policy
FORMS = ("policy_accuracy", "policy_accuracy_centred", "policy_accuracy_all")
ACCURACIES = ("rm_accuracy", *FORMS)  # what one query of each user can be taken of


def has(row: str) -> set[str]:
    """What a row has to show: reward, policy, weight, text, win."""
    if (
        row in SCORERS or row.split(",")[0] == "PAL"
    ):  # PAL-B depends on user and prompt together: it can not guide, the paper prints '-'
        return {"reward"}
    if row == UNGUIDED or row.split(",")[0] in ALONE:
        return {"policy", "text"}
    return {"reward", "policy", "weight", "text", "win"}


def trained(row: str) -> bool:
    """Is something trained for the row, so that its seeds differ in more than what they draw?"""
    return row not in (UNGUIDED, *SCORERS) and row.split(",")[0] not in ALONE[1:]


class Spec(NamedTuple):
    """title; data: the paper's data set; rows in the paper's order; metrics; scales: the paper's policies that are shown.

    nearest: our largest policy is shown where none stands beside the scale. subset: one pair per user. pairs: which measures
    are correlated below the table (x, y); over: the methods of that; printed: the table of the paper that prints them.
    """

    title: str
    data: str
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    scales: tuple[str, ...] = ()
    nearest: bool = False
    subset: bool = False
    pairs: tuple[tuple[str, str], ...] = ()
    over: tuple[str, ...] = ()
    printed: str = ""
    note: str = ""


POLICY = (*FORMS, "weight")
RM_POLICY = (("rm_accuracy", "policy_accuracy"), ("rm_accuracy", "policy_accuracy_all"))
WITH_ROUGE = (
    ("rm_accuracy", "rouge1"),
    ("policy_accuracy", "rouge1"),
    ("policy_accuracy_all", "rouge1"),
    ("win_rate", "rouge1"),
)
PRISM_ROWS = ("LoRE", "LoRE-Alt", "MPU", "MPU-Avg", "PAL", "PReF", "VPL", "Global RM", "Global RM-v2")
BERTSCORE = "BERTScore depends on its model, and the paper does not name its own: ours ({bertscore}) does not compare with it."

SPECS = {
    "2": Spec(
        "RM accuracy and policy accuracy on TLDR", "TLDR",
        ("LoRE", "MPU", "MPU-Avg", "P-DPO", "PAL", "PReF", "VPL", "GenARM", "Global RM", "Global RM-v2", "Zero-Shot"),
        ("rm_accuracy", "rm_ties", *POLICY), SCALES["TLDR"], pairs=RM_POLICY, over=TLDR_EIGHT, printed="2",
        note="Zero-Shot is the paper's row Prior: the policy's own mean log-prob.",
    ),
    "3": Spec("RM accuracy on PRISM, one query of each user", "PRISM", PRISM_ROWS, ("rm_accuracy", "rm_ties"), subset=True),
    "4": Spec(
        "RM accuracy and policy accuracy on Pref-LaMP", "Pref-LaMP", (*LAMP[:10], "ICL"),
        ("rm_accuracy", "rm_ties", "policy_accuracy", "policy_ties", *FORMS[1:], "weight"), ("3B",),
        nearest=True, pairs=RM_POLICY, over=GUIDES,
    ),
    "5": Spec(
        "Win rate over zero-shot answers, judged by the row's own reward model, on Pref-LaMP", "Pref-LaMP", GUIDES,
        ("win_rate", "win_ties", "same", "win_tokens", "zero_shot_tokens", "weight"), SCALES["Pref-LaMP"],
        note="A tie is no win; `same as zero-shot` is the share of answers that guidance did not change. A reward model "
        "judges what it has guided itself: the rate says nothing about quality.",
    ),
    "6": Spec(
        "Kendall's tau-b with ROUGE-1 on Pref-LaMP", "Pref-LaMP", GUIDES, (), SCALES["Pref-LaMP"],
        pairs=WITH_ROUGE, over=GUIDES, printed="6",
    ),
    "7": Spec(
        "Policy accuracy on PRISM, one query of each user", "PRISM",
        ("LoRE", "PReF", "VPL", "Global RM", "Global RM-v2", "MPU", "MPU-Avg", "LoRE-Alt"),
        ("rm_accuracy", *POLICY), SCALES["PRISM"], subset=True, pairs=RM_POLICY, over=PRISM_EIGHT, printed="7",
    ),
    "8": Spec("RM accuracy on PRISM, all queries", "PRISM", PRISM_ROWS, ("rm_accuracy", "rm_ties")),
    **{
        str(number): Spec(
            f"All measures on Pref-LaMP, policy beside the paper's Qwen2.5-{scale}-Instruct", "Pref-LaMP",
            LAMP if scale == "0.5B" else tuple(row for row in LAMP if row != "PAL"),  # the paper has PAL in Table 9 alone
            ("rm_accuracy", *POLICY, "rouge1", "rougeL", "bertscore", "perplexity", "words", "cut"), (scale,),
            pairs=WITH_ROUGE, over=GUIDES, printed="6", note=BERTSCORE,
        )
        for number, scale in zip(range(9, 13), SCALES["Pref-LaMP"], strict=True)
    },
}  # fmt: skip
