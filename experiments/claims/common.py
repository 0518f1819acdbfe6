"""What the claims share: the cells and numbers that they are judged on, comparisons of rows, the paper's numbers in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import permutations
from typing import NamedTuple

from experiments import results
from experiments.claims.verdicts import (
    UNTESTABLE,
    Test,
    all_of,
    at_least,
    at_most,
    correlation,
    correlation_change,
    decided,
    difference,
    win_rate,
    within,
)
from experiments.tables.captions import listed, makes, number_or_range
from experiments.tables.specs import GUIDES, SCALES

# What words such as "almost identical" are taken to mean (defaults: the paper gives no numbers for them).
SAME_ROUGE = 1.0  # points of ROUGE-1
SAME_ANSWERS = 95.0  # percent of answers that are the same word for word
SAME_ACCURACY = 2.0  # points of accuracy
SURE_WIN = 95.0  # percent
RM_GAP = 20.0  # points of RM accuracy; the paper's number

PERSONAL = ("LoRE", "LoRE-Alt", "MPU", "MPU-Avg", "PReF", "VPL")
WORDS = {"rm": "RM accuracy", "policy": "policy accuracy", "all": "policy accuracy (all normalised)", "rouge1": "ROUGE-1"}
MEASURES: dict[str, results.Measure] = {
    "rm": results.rm_accuracy,
    "policy": results.policy_accuracy,
    "win": results.win_rate,
    "all": partial(results.policy_accuracy, normalize="all"),
    "rouge1": partial(results.text, name="rouge1"),
}
Found = tuple[list[dict], list[str]]  # comparisons, and the rows that lack cells for one


class Evidence(NamedTuple):
    """sets: a profile's cells by the paper's data set, or by name for sets that stand for none. paper: expected/paper.json."""

    sets: dict[str, list[dict]]
    paper: dict
    profile: str

    def of(self, data: str, row: str, policy: str) -> list[dict]:
        return [c for c in self.sets.get(data, []) if c["row"] == row and c["policy"] == policy]

    def policies(self, data: str, least: float = 0, most: float = float("inf")) -> list[str]:
        """Our policies with cells of the data set whose size is at least `least` and below `most` parameters."""
        return [p for p in results.policies(self.sets.get(data, [])) if least <= results.size(p)[0] < most]


def claim(
    evidence: Evidence,
    id: str,
    source: str,
    data: str,
    text: str,
    paper: list[tuple[str, str]],
    rule: str,
    found: list[dict],
    lacking: list[str],
    *,
    judge: Callable = all_of,
    needs: str = "",
    note: str = "",
) -> dict:
    """The finding. needs: what is not here, without which the claim can not be tested."""
    found = decided(found)
    if data in (*SCALES, "same_content") and not evidence.sets.get(data):
        verdict, reason = (
            UNTESTABLE,
            f"Profile {evidence.profile} has no cells of {data}; `{results.command(evidence.profile)}`",
        )
    elif needs and not any(one["for"] is False for one in found):
        verdict, reason = UNTESTABLE, f"Needs {needs}." + (f" {missing(evidence, lacking, data)}" if lacking else "")
    elif not found:
        verdict, reason = UNTESTABLE, missing(evidence, lacking, data)
    else:
        verdict, reason = judge(found, lacking)
    return {
        "id": id,
        "source": source,
        "data": data,
        "claim": text,
        "paper": paper,
        "ours": found,
        "rule": rule,
        "verdict": verdict,
        "reason": reason,
        "note": note,
    }


def missing(evidence: Evidence, lacking: list[str], data: str) -> str:
    """What lacks, and the command that makes it. lacking: rows, perhaps with words behind: "LoRE on TLDR", "MPU with .."."""
    sets = {cell["set"] for cell in evidence.sets.get(data, [])}
    rows = list(dict.fromkeys(re.split(r" (?:on|with) ", one)[0] for one in lacking))
    paper = data if data in SCALES else None
    return f"Missing: {listed(dict.fromkeys(lacking))}. {makes(evidence.profile, rows, sets, paper)}"


# --- comparisons of rows


def differences(
    evidence: Evidence, data: str, rows: Iterable[str], other: str, key: str, test: Test, policies: list[str] | None = None
) -> Found:
    """Each row minus another with each policy (RM accuracy: with the smallest, it is the same for all)."""
    found, lacking = [], []
    if policies is None:
        policies = evidence.policies(data)[: 1 if key == "rm" else None]
    for policy in policies or [""]:
        for row in rows:
            sides = evidence.of(data, row, policy), evidence.of(data, other, policy)
            where = "" if key == "rm" else f", {policy}"
            one = difference(f"{row} minus {other}, {WORDS[key]}{where}", *sides, MEASURES[key], test)
            if one:
                found.append(one)
            else:
                lacking += [name for name, side in zip((row, other), sides, strict=True) if not any(map(MEASURES[key], side))]
    return found, lacking


def joined(parts: Iterable[Found]) -> Found:
    parts = list(parts)
    return [one for found, _ in parts for one in found], [row for _, lacking in parts for row in lacking]


def wins(evidence: Evidence, row: str) -> Found:
    """The row's win rate with each policy, for the claim that it wins nearly always."""
    found, lacking = [], []
    for policy in evidence.policies("Pref-LaMP"):
        one = win_rate(f"{row}: win rate, {policy}", evidence.of("Pref-LaMP", row, policy), at_least(SURE_WIN))
        found, lacking = (found + [one], lacking) if one else (found, lacking + [row])
    return found, lacking


def far_apart(evidence: Evidence, rows: tuple[str, ...], above: str | None = None) -> tuple[list[dict], list[str], float]:
    """ROUGE-1 of rows whose mean RM accuracies are RM_GAP apart (of one row and those below it), and the largest gap."""
    found, lacking, largest = [], [], 0.0
    for policy in evidence.policies("Pref-LaMP"):
        cells = {row: evidence.of("Pref-LaMP", row, policy) for row in rows}
        means = {row: one["mean"] for row, own in cells.items() if (one := results.summary(own, MEASURES["rm"]))}
        lacking += [row for row in rows if row not in means]
        for better, worse in permutations(means, 2):
            gap = means[better] - means[worse]
            if gap < 0 or above not in (None, better):
                continue
            largest = max(largest, gap)
            if gap >= RM_GAP:
                what = f"{better} minus {worse}, ROUGE-1, {policy} (RM accuracy: {means[better]:.1f} and {means[worse]:.1f})"
                one = difference(what, cells[better], cells[worse], MEASURES["rouge1"], within(-SAME_ROUGE, SAME_ROUGE))
                found, lacking = (found + [one], lacking) if one else (found, lacking + [better, worse])
    return found, lacking, largest


def icl_over_guided(
    evidence: Evidence,
    id: str,
    test: Test,
    policies: list[str],
    needs: str,
    scales: tuple[str, ...],
    text: str,
    rule: str,
    judge: Callable = all_of,
) -> dict:
    parts = (
        [differences(evidence, "Pref-LaMP", ["ICL-RAG"], row, "rouge1", test, policies) for row in GUIDES] if policies else []
    )
    gains = evidence.paper["derived"]["icl_rag_minus_best_reward_rouge1"]
    paper = [(f"ICL-RAG minus the best guided row, {scale}", f"{gains[scale]:+.2f}") for scale in scales]
    return claim(evidence, id, "paper", "Pref-LaMP", text, paper, rule, *joined(parts), judge=judge, needs=needs)


def correlation_at_most(
    evidence: Evidence, id: str, data: str, rows, paper: list[tuple[str, str]], bound: float, text: str
) -> dict:
    """The claim that Kendall's tau of RM and policy accuracy is no higher than the paper's highest."""
    found, lacking = [], []
    for policy in evidence.policies(data):
        own = [c for c in evidence.sets[data] if c["policy"] == policy]
        what = f"Kendall's tau of RM with policy accuracy, {policy}"
        one = correlation(what, own, rows, MEASURES["rm"], MEASURES["policy"], "kendall", at_most(bound))
        found, lacking = (found + [one], lacking) if one else (found, lacking + list(rows))
    rule = f"Holds if tau lies at or below {bound:g}, the paper's highest, with every policy."
    return claim(evidence, id, "paper", data, text, paper, rule, found, lacking)


def correlation_changes(
    evidence: Evidence, id: str, data: str, rows, paper: list[tuple[str, str]], test: Test, text: str
) -> dict:
    """The claim that Pearson's r of RM and policy accuracy changes from the smallest to the largest policy."""
    policies, found, lacking = evidence.policies(data), [], []
    if len(policies) > 1:
        sides = ([c for c in evidence.sets[data] if c["policy"] == policy] for policy in (policies[0], policies[-1]))
        what = f"Pearson's r with {policies[-1]} minus {policies[0]}"
        one = correlation_change(what, *sides, rows, MEASURES["rm"], MEASURES["policy"], "pearson", test)
        found, lacking = ([one], []) if one else ([], list(rows))
    rule = "Holds if r with our largest policy minus r with our smallest has the sign that the claim says."
    return claim(evidence, id, "paper", data, text, paper, rule, found, lacking, needs=several(policies))


def same_answers(cells: list[dict]) -> results.Measure:
    """The percent of a cell's answers that are, word for word, those of the first of these cells with the same pairs."""
    texts = {answer["pair_id"]: answer for cell in cells[:1] for answer in cell.get("answers") or []}

    def measure(cell: dict) -> dict | None:
        users: dict[str, list[float]] = {}
        for answer in cell.get("answers") or []:
            if answer["pair_id"] in texts:
                same = results.same_text(answer, texts[answer["pair_id"]])
                users.setdefault(answer["user_id"], []).append(100.0 * same)
        shares = [one for of_user in users.values() for one in of_user]
        return {"value": sum(shares) / len(shares), "users": users} if shares else None

    return measure


def several(policies: list[str]) -> str:
    return "" if len(policies) > 1 else f"policies of several sizes; ours: {listed(policies) or 'none'}"


def large(evidence: Evidence, least: float) -> str:
    own = evidence.policies("Pref-LaMP")
    return (
        ""
        if evidence.policies("Pref-LaMP", least)
        else f"a policy of at least {least / 1e9:g}B; ours: {listed(own) or 'none'}"
    )


# --- the paper's numbers in words


def printed(evidence: Evidence, table: str, row: str, column: str) -> list[tuple[str, str]]:
    """What the paper prints for a row: of a column, or of its columns for each policy."""
    given = evidence.paper["tables"][table].get(row, {})
    return [
        (f"{row}, {key.replace('_', ' ').replace('rm ', 'RM ').replace('rouge1', 'ROUGE-1')}", _number(number))
        for key, number in given.items()
        if key.split(" ")[0] == column
    ]


def printed_rouge(evidence: Evidence, row: str) -> list[tuple[str, str]]:
    return [one for table in ("9", "10", "11", "12") for one in printed(evidence, table, row, "rouge1")]


def printed_correlations(evidence: Evidence, table: str, statistic: str) -> list[tuple[str, str]]:
    """The paper's correlations of RM accuracy with policy accuracy, for each policy or as a range."""
    given = evidence.paper["correlations"][table]
    return [
        (f"{statistic}, {'all policies' if scale == 'all' else scale}", number_or_range(of_pair[statistic]))
        for scale, of_scale in given.items()
        for of_pair in of_scale.values()
    ]


def highest_correlation(evidence: Evidence, table: str, statistic: str) -> float:
    values = [
        of_pair[statistic] for of_scale in evidence.paper["correlations"][table].values() for of_pair in of_scale.values()
    ]
    return max(max(one) if isinstance(one, list) else one for one in values)


def _number(number: list) -> str:
    return f"{number[0]:.2f}" + (f" ± {number[1]:.2f}" if number[1] is not None else "")
