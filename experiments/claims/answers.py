"""Claims about generated answers: what the paper says of Pref-LaMP, and what its numbers imply."""

from __future__ import annotations

from experiments import results
from experiments.claims.common import (
    MEASURES,
    PERSONAL,
    RM_GAP,
    SAME_ACCURACY,
    SAME_ANSWERS,
    SAME_ROUGE,
    SURE_WIN,
    Evidence,
    claim,
    differences,
    far_apart,
    icl_over_guided,
    joined,
    large,
    printed,
    printed_rouge,
    same_answers,
    wins,
)
from experiments.claims.verdicts import (
    above,
    any_of,
    at_least,
    at_most,
    below,
    correlation,
    difference,
    fewest_seeds,
    other_than,
    value,
    within,
)
from experiments.tables.specs import GUIDES, UNGUIDED

ROUNDING = "not in float32: two decoders can round differently, and that alone changes answers"

# --- demonstrations


def icl_gain(evidence: Evidence) -> dict:
    """arXiv's first version says 3 to 5 points, the later one about 3."""
    gain = evidence.paper["derived"]["icl_rag_minus_best_reward_rouge1"]["7B"]
    found, lacking, needs = [], [], large(evidence, 7e9)
    for policy in evidence.policies("Pref-LaMP", 7e9):
        guided = {row: evidence.of("Pref-LaMP", row, policy) for row in GUIDES}
        means = {row: s["mean"] for row, cells in guided.items() if (s := results.summary(cells, MEASURES["rouge1"]))}
        lacking += [row for row in GUIDES if row not in means]
        if means:
            best = max(means, key=means.get)
            what = f"ICL-RAG minus {best} (the best guided row), ROUGE-1, {policy}"
            one = difference(what, evidence.of("Pref-LaMP", "ICL-RAG", policy), guided[best], MEASURES["rouge1"], above(2))
            found, lacking = (found + [one], lacking) if one else (found, lacking + ["ICL-RAG"])
    return claim(
        evidence,
        "icl_gain",
        "paper",
        "Pref-LaMP",
        "With a policy of 7B, demonstrations gain about three points of ROUGE-1 (in an "
        "earlier version of the paper: three to five) over the best reward-guided row.",
        [("ICL-RAG minus the best guided row, 7B, from Table 12", f"{gain:.2f}")],
        "Holds if ICL-RAG lies more than two points above the guided row with the best mean (choosing it flatters that row).",
        found,
        lacking,
        needs=needs,
    )


def threshold(evidence: Evidence) -> dict:
    return icl_over_guided(
        evidence,
        "threshold",
        above(),
        evidence.policies("Pref-LaMP", 3e9),
        large(evidence, 3e9),
        ("3B", "7B"),
        "With policies of at least 3B, demonstrations beat every reward-guided row.",
        "Holds if ICL-RAG's ROUGE-1 lies above that of every guided row with each of our policies of 3B and more.",
    )


def small_policies(evidence: Evidence) -> dict:
    policies = evidence.policies("Pref-LaMP", most=3e9)
    return icl_over_guided(
        evidence,
        "small_policies",
        below(),
        policies,
        "" if policies else "a policy below 3B",
        ("0.5B", "1.5B"),
        "With smaller policies it is the other way round: some reward-guided row beats demonstrations.",
        "Holds if ICL-RAG's ROUGE-1 lies below that of some guided row with a policy below 3B (the paper's: 0.5B and 1.5B).",
        any_of,
    )


def rag_over_icl(evidence: Evidence) -> dict:
    found = []
    for suffix in (", 2 shots", ", 4 shots", "", ", 16 shots"):
        if not suffix or any(c["row"] == f"ICL-RAG{suffix}" for c in evidence.sets.get("Pref-LaMP", [])):
            found.append(differences(evidence, "Pref-LaMP", [f"ICL-RAG{suffix}"], f"ICL{suffix}", "rouge1", above()))
    return claim(
        evidence,
        "rag_over_icl",
        "paper",
        "Pref-LaMP",
        "Retrieved demonstrations beat random ones, however many there are.",
        [p for row in ("ICL", "ICL-RAG") for p in printed_rouge(evidence, row)],
        "Holds if ICL-RAG's ROUGE-1 lies above ICL's at every number of demonstrations that has cells.",
        *joined(found),
    )


def icl_shots(evidence: Evidence) -> dict:
    found = [differences(evidence, "Pref-LaMP", [f"{row}, 16 shots"], row, "rouge1", above()) for row in ("ICL", "ICL-RAG")]
    return claim(
        evidence,
        "icl_shots",
        "paper",
        "Pref-LaMP",
        "More demonstrations than eight help further.",
        [],
        "Holds if ROUGE-1 with 16 demonstrations lies above that with 8, random and retrieved (the paper: in a "
        "figure, without numbers, for its larger policies).",
        *joined(found),
    )


def rgd_gain(evidence: Evidence) -> dict:
    shown = [
        (f"{row} minus Zero-Shot, {scale}", f"{gain:+.2f}")
        for scale, of_scale in evidence.paper["derived"]["args_minus_zeroshot_rouge1"].items()
        for row, gain in of_scale.items()
        if row in PERSONAL
    ]
    return claim(
        evidence,
        "rgd_gain",
        "paper",
        "Pref-LaMP",
        "Personalised rewards make the answers a little better than unguided ones.",
        shown,
        "Holds if the ROUGE-1 of some personalised row lies above that of the same decoder with weight 0.",
        *differences(evidence, "Pref-LaMP", PERSONAL, UNGUIDED, "rouge1", above()),
        judge=any_of,
        note="The paper compares with zero-shot answers, not with weight 0.",
    )


def weight_0(evidence: Evidence) -> dict:
    gaps = evidence.paper["derived"]["args_minus_zeroshot_rouge1"]
    least = min(gap for of_scale in gaps.values() for row, gap in of_scale.items() if row == "Global RM")
    found, lacking = differences(evidence, "Pref-LaMP", [UNGUIDED], "Zero-Shot", "rouge1", other_than(0, least))
    for cell in (c for c in evidence.sets.get("Pref-LaMP", []) if c["row"] == UNGUIDED):
        same = same_answers(evidence.of("Pref-LaMP", "Zero-Shot", cell["policy"]))(cell)
        if cell.get("dtype") != "float32" and (same is None or same["value"] < 100):
            found = [one | {"why": ROUNDING} for one in found]
    return claim(
        evidence,
        "weight_0",
        "implied",
        "Pref-LaMP",
        "The guided decoder without a reward already differs from zero-shot decoding, "
        "which would explain gains that the paper credits to rewards.",
        [(f"Global RM minus Zero-Shot, {scale}", f"{of_scale['Global RM']:+.2f}") for scale, of_scale in gaps.items()],
        f"Holds if the ROUGE-1 of ARGS with weight 0 differs from zero-shot's; does not hold if the difference is surely "
        f"smaller than {least:.2f}, the smallest such gap in the paper. Where answers differ, only float32 tells: elsewhere "
        "decoders can round differently.",
        found,
        lacking,
    )


def no_op(evidence: Evidence) -> dict:
    rows, found, lacking = ("Global RM", "LoRE", "MPU-Avg"), [], []
    for policy in evidence.policies("Pref-LaMP"):
        unguided = evidence.of("Pref-LaMP", UNGUIDED, policy)
        for row in rows:
            cells = evidence.of("Pref-LaMP", row, policy)
            weights = ", ".join(f"{c['values']['relative']:g}" for c in cells if c["values"].get("relative") is not None)
            what = f"{row}: percent of answers as at weight 0, {policy} (chosen weights {weights or 'unknown'})"
            one = value(what, cells, same_answers(unguided), at_least(SAME_ANSWERS)) if unguided else None
            found, lacking = (found + [one], lacking) if one else (found, lacking + [row if unguided else UNGUIDED])
    return claim(
        evidence,
        "no_op",
        "implied",
        "Pref-LaMP",
        "Global RM, LoRE and MPU-Avg reach the same ROUGE-1 because the chosen weight is so small that none of them guides.",
        [p for row in rows for p in printed_rouge(evidence, row)],
        f"Holds if at least {SAME_ANSWERS:g} percent of the answers of each are those of weight 0, word for word.",
        found,
        lacking,
    )


def collapse(evidence: Evidence) -> dict:
    rows, found, lacking = ("LoRE-Alt", "VPL", "MPU"), [], []
    for policy in evidence.policies("Pref-LaMP"):
        unguided = evidence.of("Pref-LaMP", UNGUIDED, policy)
        for row in rows:
            for cell in (cells := evidence.of("Pref-LaMP", row, policy)):
                what = f"{row} seed {cell['seed']} minus {UNGUIDED}, ROUGE-1, {policy}"
                one = difference(what, [cell], unguided, MEASURES["rouge1"], below(-SAME_ROUGE), seeds=fewest_seeds(cells))
                found, lacking = (found + [one], lacking) if one else (found, lacking + [row if unguided else UNGUIDED])
            if len(cells) < 3:
                lacking.append(f"{row} with three seeds")
    derived = evidence.paper["derived"]["two_good_one_collapsed_rouge1"]
    shown = [
        (f"{row}, {scale}", ", ".join(f"{one:.2f}" for one in seeds))
        for row in rows
        for scale, seeds in derived.get(row, {}).items()
    ]
    return claim(
        evidence,
        "collapse",
        "implied",
        "Pref-LaMP",
        "LoRE-Alt, VPL or MPU vary over seeds because single seeds collapse.",
        shown,
        f"Holds if the ROUGE-1 of some seed lies more than {SAME_ROUGE:g} point below that of weight 0.",
        found,
        lacking,
        judge=any_of,
        note="The paper's numbers: seeds that fit its means and standard deviations.",
    )


def rm_gap_20(evidence: Evidence) -> dict:
    found, lacking, largest = far_apart(evidence, GUIDES)
    return claim(
        evidence,
        "rm_gap_20",
        "paper",
        "Pref-LaMP",
        f"Methods whose RM accuracies are {RM_GAP:g} points apart generate equally good answers.",
        [
            *printed(evidence, "9", "Global RM", "rm_accuracy"),
            *printed(evidence, "9", "LoRE", "rm_accuracy"),
            *printed_rouge(evidence, "Global RM"),
            *printed_rouge(evidence, "LoRE"),
        ],
        f"Of all pairs of guided rows whose mean RM accuracies are at least {RM_GAP:g} points apart: holds if the ROUGE-1 of "
        f"one pair is surely within {SAME_ROUGE:g} point; does not hold if that of none can be.",
        found,
        lacking,
        judge=any_of,
        needs="" if found else f"two rows {RM_GAP:g} points apart in RM accuracy; ours are at most {largest:.1f} apart",
    )


def genarm_win(evidence: Evidence) -> dict:
    won = wins(evidence, "GenARM")
    rouge = differences(evidence, "Pref-LaMP", ["GenARM"], "Zero-Shot", "rouge1", at_most(0))
    return claim(
        evidence,
        "genarm_win",
        "paper",
        "Pref-LaMP",
        "GenARM wins nearly every comparison by its own reward, and its answers are not nearer to the user's.",
        [
            *printed(evidence, "5", "GenARM", "win_rate"),
            *printed_rouge(evidence, "GenARM"),
            *printed_rouge(evidence, "Zero-Shot"),
        ],
        f"Holds if its win rate lies at or above {SURE_WIN:g} percent and its ROUGE-1 at or below zero-shot's.",
        *joined([won, rouge]),
    )


def global_win(evidence: Evidence) -> dict:
    won, (apart, lacking, largest) = wins(evidence, "Global RM"), far_apart(evidence, GUIDES, "Global RM")
    needs = "" if apart else f"a row {RM_GAP:g} points below Global RM in RM accuracy; ours are at most {largest:.1f} below"
    return claim(
        evidence,
        "global_win",
        "paper",
        "Pref-LaMP",
        f"Global RM wins nearly every comparison by its own reward, and its answers are "
        f"as good as those of methods {RM_GAP:g} points below it in RM accuracy.",
        [*printed(evidence, "5", "Global RM", "win_rate"), *printed_rouge(evidence, "Global RM")],
        f"Holds if its win rate lies at or above {SURE_WIN:g} percent and its ROUGE-1 surely within {SAME_ROUGE:g} point "
        f"of that of every row with a mean RM accuracy at least {RM_GAP:g} points lower.",
        won[0] + apart,
        won[1] + lacking,
        needs=needs,
    )


def t6_range(evidence: Evidence) -> dict:
    shown = [
        (f"{pair.replace('_', ' ')}, {scale}", f"{tau['kendall']:.3f}")
        for scale, of_scale in evidence.paper["correlations"]["6"].items()
        for pair, tau in of_scale.items()
    ]
    bound = max(abs(tau["kendall"]) for of_scale in evidence.paper["correlations"]["6"].values() for tau in of_scale.values())
    found, lacking = [], []
    for policy in evidence.policies("Pref-LaMP"):
        own = [c for c in evidence.sets["Pref-LaMP"] if c["policy"] == policy]
        for key, words in (("rm", "RM accuracy"), ("policy", "policy accuracy"), ("win", "win rate")):
            what = f"Kendall's tau of {words} with ROUGE-1, {policy}"
            one = correlation(what, own, GUIDES, MEASURES[key], MEASURES["rouge1"], "kendall", within(-bound, bound))
            found, lacking = (found + [one], lacking) if one else (found, lacking + list(GUIDES))
    return claim(
        evidence,
        "t6_range",
        "paper",
        "Pref-LaMP",
        "Neither RM accuracy nor policy accuracy nor win rate tells whose answers are nearest to what users wrote.",
        shown,
        f"Holds if all three lie within -{bound:.3f} and {bound:.3f}, the strongest in the paper's Table 6 by absolute value; "
        "what orders the methods the other way round tells, too.",
        found,
        lacking,
    )


def blind(evidence: Evidence) -> dict:
    return claim(
        evidence,
        "blind",
        "implied",
        "Pref-LaMP",
        "Pairs whose rejected title is of another paper do not need a reward model: the "
        "words that title and abstract share decide them as well.",
        [],
        f"Does not hold if a guided row's RM accuracy lies surely more than {SAME_ACCURACY:g} points above that of word "
        f"overlap; holds if no row's can be.",
        *differences(evidence, "Pref-LaMP", GUIDES, "word overlap", "rm", at_most(SAME_ACCURACY)),
    )


def same_content(evidence: Evidence) -> dict:
    found = differences(evidence, "same_content", [*PERSONAL, "PAL"], "Global RM", "rm", above())
    return claim(
        evidence,
        "same_content",
        "ours",
        "same_content",
        "Where both titles are of the same paper, so that content can not decide, "
        "a personalised reward model beats the global one.",
        [],
        "Holds if the RM accuracy of some personalised row lies above Global RM's.",
        *found,
        judge=any_of,
    )
