"""The paper's numbers in the form that `python -m experiments table` and `figure` read: experiments/expected/paper.json.

    python -m experiments.paper_numbers [../shared/paper_results.json]

Rows get our names, every number becomes [mean, std or null], and the policy's size stands in the name of the column. Nothing
is computed here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyargs import files

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "shared/paper_results.json"
OUT = HERE / "expected/paper.json"

NAMES = {
    "Global": "Global RM",
    "Global-V2": "Global RM-v2",
    "Prior": "Zero-Shot",
}  # Table 2's names -> those of all the others
METRICS = {"rm_acc": "rm_accuracy", "policy_acc": "policy_accuracy", "bertscore_f1": "bertscore"}  # the rest keep theirs
DERIVED = (
    "prism_main_text_quantum",
    "preflamp_query_set_size",
    "correlation_points",
    "args_minus_zeroshot_rouge1",
    "icl_rag_minus_best_reward_rouge1",
    "two_good_one_collapsed_rouge1",
    "inconsistencies",
)


def number(value) -> list | None:
    """81.1, {"mean": 81.1, "std": 0.9} or null -> [mean, std or None] or None."""
    if isinstance(value, dict):
        return None if value["mean"] is None else [value["mean"], value["std"]]
    return None if value is None else [value, None]


def rows(table: dict) -> dict:
    """{method: {"rm_acc": .., "policy_acc": {size: ..}}} -> {row: {"rm_accuracy": [..], "policy_accuracy 3B": [..]}}."""
    found = {}
    for name, metrics in table.items():
        row = found[NAMES.get(name, name)] = {}
        for metric, value in metrics.items():
            if metric == "group":
                continue
            metric = METRICS.get(metric, metric)
            scaled = isinstance(value, dict) and "mean" not in value
            for column, one in ({f"{metric} {size}": v for size, v in value.items()} if scaled else {metric: value}).items():
                if (given := number(one)) is not None:
                    row[column] = given
    return found


def paper(source: dict) -> dict:
    tables = {
        "1": source["table1_model_configurations"],
        "2": rows(source["table2_tldr"]["methods"]),
        "3": rows({name: {"rm_acc": value} for name, value in source["table3_prism_rm_acc"].items()}),
        "4": rows(
            {
                name: {"rm_acc": value["rm_acc"], "policy_acc": {"3B": value["policy_acc"]}}
                for name, value in source["table4_preflamp_3B"].items()
            }
        ),
        "5": rows({name: {"win_rate": value} for name, value in source["table5_win_rate_vs_zero_shot"].items()}),
        "7": rows(source["table7_prism"]),
        "8": rows({name: {"rm_acc": value} for name, value in source["table8_prism_full_test_rm_acc"].items()}),
    }
    for size, table in source["tables9_12_preflamp"].items():
        per_policy = {  # the RM is the same in all four tables
            name: {
                metric: value if metric == "rm_acc" else {size: value} for metric, value in row.items() if value is not None
            }
            for name, row in table["rows"].items()
        }
        tables[str(table["table"])] = rows(per_policy)
    correlations = source["table2_tldr"]["rm_vs_policy_correlation"]
    with_rouge = source["table6_kendall_with_rouge1"]
    figure1 = source["figures"]["figure1"]
    return {
        "about": "Figures of 'The Reward Model Selection Crisis in Personalized Alignment' (arXiv 2512.23067), as printed; "
        "made by `python -m experiments.paper_numbers`. Percent; [mean, sample std over seeds or null]. `derived` is "
        "arithmetic on them, not the paper's.",
        "tables": tables,
        "correlations": {  # table -> policy -> "x ~ y" -> statistic -> value, or [lowest, highest] over the policies
            "2": {
                size: {"rm_accuracy ~ policy_accuracy": {name: correlations[name][size] for name in correlations}}
                for size in correlations["kendall"]
            },
            "6": {
                size: {f"{METRICS.get(name, name)} ~ rouge1": {"kendall": value} for name, value in values.items()}
                for size, values in with_rouge.items()
            },
            "7": {
                "all": {
                    "rm_accuracy ~ policy_accuracy": {
                        name: figure1[f"{name}_range"] for name in ("kendall", "spearman", "pearson")
                    }
                }
            },
        },
        "figures": source["figures"],
        "claims": {claim["id"]: claim["claim"] for claim in source["text_claims"]},
        "derived": {name: source["derived"][name] for name in DERIVED},
    }


if __name__ == "__main__":
    files.write_json(OUT, paper(files.read_json(sys.argv[1] if len(sys.argv) > 1 else SOURCE)))
    print(OUT)
