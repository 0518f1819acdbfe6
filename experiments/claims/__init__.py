"""The paper's claims, and what its numbers imply, each judged on the cells of a profile.

accuracies.py and answers.py: one function is one claim. It reads cells and gives the claim in a sentence, the paper's numbers,
ours, the rule by which they decide, the verdict and its reason. verdicts.py says when a comparison is for a claim or against
it. Nothing is written by hand about a result: a claim reads the same before and after its cells are made.
"""

from __future__ import annotations

from experiments import results
from experiments.claims import accuracies, answers
from experiments.claims.common import Evidence
from experiments.claims.verdicts import FAILS, HOLDS, OPEN, UNTESTABLE, VERDICTS
from experiments.tables.specs import SCALES

__all__ = ["CLAIMS", "FAILS", "HOLDS", "OPEN", "UNTESTABLE", "VERDICTS", "findings", "evidence"]

CLAIMS = (
    accuracies.tau_range, accuracies.tldr_corr, accuracies.tldr_prior, accuracies.tldr_prior_all, accuracies.tldr_lore,
    accuracies.tldr_pal, accuracies.prism_global, accuracies.prism_tau, accuracies.prism_corr, accuracies.prism_vpl,
    accuracies.prism_bands, answers.icl_gain, answers.threshold, answers.small_policies, answers.rag_over_icl,
    answers.icl_shots, answers.rgd_gain, answers.weight_0, answers.no_op, answers.collapse, answers.rm_gap_20,
    answers.genarm_win, answers.global_win, answers.t6_range, answers.blind, accuracies.form, answers.same_content,
)  # fmt: skip


def findings(cells: list[dict], paper: dict, profile: str) -> list[dict]:
    """Every claim judged on the cells of the profile, in the order of the paper. paper: expected/paper.json.

    A finding is {"id", "source": "paper", "implied" or "ours", "data", "claim", "paper": [(what, number)], "ours":
    [comparison], "rule", "verdict", "reason", "note"}; verdicts.decided says what a comparison is.
    """
    read = evidence(cells, paper, profile)
    return [claim(read) for claim in CLAIMS]


def evidence(cells: list[dict], paper: dict, profile: str) -> Evidence:
    """What a claim is judged on: the profile's cells by data set, and the paper's numbers."""
    own = [c for c in cells if c["profile"] == profile]
    sets = {data: results.of_set(cells, profile, data) for data in SCALES}
    for extra in sorted({c["set"] for c in own if c["stands_for"] is None}):
        sets[extra] = [c for c in own if c["set"] == extra and c["stands_for"] is None]
    return Evidence(sets, paper, profile)
