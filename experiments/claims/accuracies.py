"""Claims about accuracies: what the paper says of TLDR and PRISM, and of the two forms of policy accuracy."""

from __future__ import annotations

from experiments.claims.common import (
    MEASURES,
    SAME_ACCURACY,
    Evidence,
    claim,
    correlation_at_most,
    correlation_changes,
    differences,
    highest_correlation,
    joined,
    printed,
    printed_correlations,
    several,
)
from experiments.claims.verdicts import above, any_of, below, difference, other_than, within
from experiments.tables.specs import PRISM_EIGHT, PRISM_ROWS, SCALES, TLDR_EIGHT, UNGUIDED

# --- TLDR


def tau_range(evidence: Evidence) -> dict:
    return correlation_at_most(
        evidence,
        "tau_range",
        "TLDR",
        TLDR_EIGHT,
        printed_correlations(evidence, "2", "kendall"),
        highest_correlation(evidence, "2", "kendall"),
        "RM accuracy is a poor guide to policy accuracy: Kendall's tau over methods and seeds stays low with every policy.",
    )


def tldr_corr(evidence: Evidence) -> dict:
    return correlation_changes(
        evidence,
        "tldr_corr",
        "TLDR",
        TLDR_EIGHT,
        printed_correlations(evidence, "2", "pearson"),
        below(),
        "The larger the policy, the less RM accuracy says about policy accuracy: Pearson's r falls.",
    )


def tldr_prior(evidence: Evidence) -> dict:
    rows = ("MPU", "MPU-Avg", "PReF")
    found = [differences(evidence, "TLDR", [row], "Zero-Shot", "policy", below()) for row in rows]
    return claim(
        evidence,
        "tldr_prior",
        "paper",
        "TLDR",
        "MPU, MPU-Avg and PReF rank pairs worse than the policy does by itself.",
        [p for row in (*rows, "Zero-Shot") for p in printed(evidence, "2", row, "policy_accuracy")],
        "Holds if the policy accuracy (paper's form) of each of the three lies below that of the policy alone.",
        *joined(found),
    )


def tldr_prior_all(evidence: Evidence) -> dict:
    found = [differences(evidence, "TLDR", [row], "Zero-Shot", "all", below()) for row in ("MPU", "MPU-Avg", "PReF")]
    return claim(
        evidence,
        "tldr_prior_all",
        "implied",
        "TLDR",
        "MPU, MPU-Avg and PReF are worse than the policy alone also where both take means per token, so that length does not "
        "decide.",
        [],
        "Holds if the policy accuracy (all normalised) of each of the three lies below that of the policy alone.",
        *joined(found),
    )


def tldr_lore(evidence: Evidence) -> dict:
    rivals = [row for row in TLDR_EIGHT if row != "LoRE"]
    return claim(
        evidence,
        "tldr_lore",
        "paper",
        "TLDR",
        "LoRE ranks pairs best of all guided rows, with every policy.",
        [p for row in ("LoRE", *rivals) for p in printed(evidence, "2", row, "policy_accuracy")],
        "Holds if LoRE's policy accuracy (paper's form) lies above that of every other guided row.",
        *joined([differences(evidence, "TLDR", ["LoRE"], rival, "policy", above()) for rival in rivals]),
    )


def tldr_pal(evidence: Evidence) -> dict:
    rivals = [row for row in TLDR_EIGHT if row != "PAL"]
    return claim(
        evidence,
        "tldr_pal",
        "paper",
        "TLDR",
        "PAL, which can not guide a decoder, has the most accurate reward model.",
        [p for row in ("PAL", *rivals) for p in printed(evidence, "2", row, "rm_accuracy")],
        "Holds if PAL's RM accuracy lies above that of every guided row.",
        *joined([differences(evidence, "TLDR", ["PAL"], rival, "rm", above()) for rival in rivals]),
    )


# --- PRISM


def prism_global(evidence: Evidence) -> dict:
    rivals = [row for row in PRISM_ROWS if not row.startswith("Global")]
    return claim(
        evidence,
        "prism_global",
        "paper",
        "PRISM",
        "One reward model for everybody beats every personalised one at RM accuracy.",
        [p for row in ("Global RM", *rivals) for p in printed(evidence, "8", row, "rm_accuracy")],
        "Holds if Global RM's accuracy on all queries (the paper's Table 8) lies above that of every personalised row.",
        *joined([differences(evidence, "PRISM", ["Global RM"], rival, "rm", above()) for rival in rivals]),
    )


def prism_tau(evidence: Evidence) -> dict:
    return correlation_at_most(
        evidence,
        "prism_tau",
        "PRISM",
        PRISM_EIGHT,
        printed_correlations(evidence, "7", "kendall"),
        highest_correlation(evidence, "7", "kendall"),
        "RM accuracy is a poor guide to policy accuracy on PRISM, too: Kendall's tau stays low with every policy.",
    )


def prism_corr(evidence: Evidence) -> dict:
    return correlation_changes(
        evidence,
        "prism_corr",
        "PRISM",
        PRISM_EIGHT,
        printed_correlations(evidence, "7", "pearson"),
        above(),
        "On PRISM it is the other way round: Pearson's r rises with the size of the policy.",
    )


def prism_vpl(evidence: Evidence) -> dict:
    rivals = [row for row in PRISM_EIGHT if row != "VPL"]
    found = [differences(evidence, "PRISM", ["VPL"], rival, "policy", above()) for rival in rivals]
    found.append(differences(evidence, "PRISM", ["VPL"], "Global RM", "rm", below()))
    return claim(
        evidence,
        "prism_vpl",
        "paper",
        "PRISM",
        "VPL ranks pairs best when it guides, although its reward model is worse than the global one.",
        [
            *(p for row in ("VPL", "Global RM") for p in printed(evidence, "7", row, "policy_accuracy")),
            *(p for row in ("VPL", "Global RM") for p in printed(evidence, "3", row, "rm_accuracy")),
        ],
        "Holds if VPL's policy accuracy (paper's form) lies above that of every other row, its RM accuracy below Global RM's.",
        *joined(found),
        note="The paper's own Table 7 does not have VPL on top with its two largest policies.",
    )


def prism_bands(evidence: Evidence) -> dict:
    rows, policies = ("VPL", "LoRE-Alt"), evidence.policies("PRISM")
    shown = [p for row in rows for p in printed(evidence, "7", row, "policy_accuracy")]
    numbers = [[v[0] for k, v in evidence.paper["tables"]["7"][row].items() if k.startswith("policy")] for row in rows]
    band = max(max(of_row) - min(of_row) for of_row in numbers)
    found, lacking = [], []
    for row in rows if len(policies) > 1 else ():
        sides = [evidence.of("PRISM", row, policy) for policy in (policies[-1], policies[0])]
        what = f"{row}: policy accuracy with {policies[-1]} minus {policies[0]}"
        one = difference(what, *sides, MEASURES["policy"], within(-band, band))
        found, lacking = (found + [one], lacking) if one else (found, lacking + [row])
    return claim(
        evidence,
        "prism_bands",
        "paper",
        "PRISM",
        "The size of the policy hardly changes policy accuracy.",
        shown,
        f"Holds if each row's policy accuracies with our largest and smallest policy differ by at most {band:.2f} points, "
        "the most that these rows differ by in the paper.",
        found,
        lacking,
        needs=several(policies),
    )


# --- all sets


def form(evidence: Evidence) -> dict:
    found = [differences(evidence, data, [UNGUIDED], "Zero-Shot", "policy", other_than(0, SAME_ACCURACY)) for data in SCALES]
    found = [
        ([one | {"what": f"{data}: {one['what']}"} for one in own], [f"{row} on {data}" for row in lacking])
        for data, (own, lacking) in zip(SCALES, found, strict=True)
    ]
    return claim(
        evidence,
        "form",
        "implied",
        "all data sets",
        "The paper's two forms of policy accuracy (sums for guided rows, means for others) differ without any reward.",
        [],
        "Holds if the policy accuracy of weight 0 in the guided form differs from the policy's own on some data set; does not "
        f"hold if it is surely within {SAME_ACCURACY:g} points on all.",
        *joined(found),
        judge=any_of,
    )
