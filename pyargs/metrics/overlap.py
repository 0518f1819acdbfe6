"""Overlap of generated text with what the user really wrote: ROUGE."""

from __future__ import annotations

from collections.abc import Sequence

from pyargs.errors import PyargsError


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Mean ROUGE-1 and ROUGE-L F1 in percent by rouge-score, no stemming (as LaMP), predictions stripped.

    An empty prediction scores 0 and is counted in `empty`. `rouge1_each` has the single values in the order given.
    Raises PyargsError when the lists are empty or differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references) or not references:
        raise PyargsError(f"{len(predictions)} predictions for {len(references)} references: one for each, and at least one")
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(r, p.strip()) for p, r in zip(predictions, references, strict=True)]
    each = {name: [100 * score[name].fmeasure for score in scores] for name in ("rouge1", "rougeL")}
    return {
        **{name: sum(values) / len(values) for name, values in each.items()},
        "n": len(scores),
        "empty": sum(not p.strip() for p in predictions),
        "rouge1_each": each["rouge1"],
    }
