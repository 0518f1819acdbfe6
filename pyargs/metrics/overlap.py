"""Overlap of generated text with what the user really wrote: ROUGE by words, BERTScore by a model's states."""

from __future__ import annotations

from collections.abc import Sequence

from pyargs.errors import PyargsError, extra
from pyargs.metrics.blind import words


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Mean ROUGE-1 and ROUGE-L F1 in percent by rouge-score, no stemming (as LaMP), predictions stripped.

    An empty prediction scores 0 and is counted in `empty`. `rouge1_each` and `rougeL_each` have the single values in the order
    given. Raises PyargsError when the lists are empty or differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_counts(predictions, references)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(r, p.strip()) for p, r in zip(predictions, references, strict=True)]
    each = {name: [100 * score[name].fmeasure for score in scores] for name in ("rouge1", "rougeL")}
    return {
        **{name: sum(values) / len(values) for name, values in each.items()},
        "n": len(scores),
        "empty": sum(not p.strip() for p in predictions),
        **{f"{name}_each": values for name, values in each.items()},
    }


def bertscore(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    model: str = "minilm",
    rescale: bool = False,
    device: str | None = None,
) -> dict:
    """Mean BERTScore F1 in percent by bert-score, without idf; scores of two models are never comparable.

    model: "minilm", a local folder or a name on the hub; a model that bert-score knows is read at the layer it recommends,
    others at their last. rescale: subtract bert-score's own English baseline, which only its models have. `model` of the
    result says which, the layer, and whether rescaled (the paper names neither). An empty prediction or reference scores 0:
    bert-score 0.3.13 crashes on one with current transformers. `bertscore_each`: single values in the order given.
    Raises PyargsError for lists that are empty or differ in length, a model that cannot be loaded, a missing baseline.
    """
    import logging
    import threading

    _check_counts(predictions, references)
    pairs = [(p.strip(), r.strip()) for p, r in zip(predictions, references, strict=True)]
    full = [i for i, (p, r) in enumerate(pairs) if p and r]
    scorer, layer = _scorer(model, rescale, device)
    each = [0.0] * len(pairs)
    if full:
        log, thread = logging.getLogger("transformers.modeling_utils"), threading.get_ident()
        hush = lambda record: record.thread != thread or record.levelno >= logging.ERROR  # noqa: E731
        log.addFilter(hush)
        try:
            _, _, f1 = scorer.score([pairs[i][0] for i in full], [pairs[i][1] for i in full])
        finally:
            log.removeFilter(hush)
        for i, value in zip(full, f1.tolist(), strict=True):
            each[i] = 100 * value
    return {
        "bertscore": sum(each) / len(each),
        "model": f"{model}, layer {layer}, {'rescaled' if rescale else 'not rescaled'}",
        "bertscore_each": each,
    }


def copied(text: str, sources: Sequence[str]) -> tuple[int, int]:
    """The longest run of words that a text shares with one of the sources, and how many words it has; case does not count."""
    from difflib import SequenceMatcher

    own = words(text)
    matcher = SequenceMatcher(None, autojunk=False)
    matcher.set_seq2(own)
    longest = 0
    for source in sources:
        matcher.set_seq1(words(source))
        longest = max(longest, matcher.find_longest_match().size)
    return longest, len(own)


def quotes(text: str, sources: Sequence[str], least: int) -> bool:
    """Whether a text has one of the sources that have at least `least` words in it as a whole; case does not count."""
    own = f" {' '.join(words(text))} "
    whole = (words(source) for source in sources)
    return any(len(source) >= least and f" {' '.join(source)} " in own for source in whole)


def _scorer(model: str, rescale: bool, device: str | None):
    """bert-score's scorer and the layer that it reads."""
    from transformers import AutoConfig

    from pyargs.lm import hub

    with extra("evaluate", "BERTScore"):
        from bert_score import BERTScorer
        from bert_score.utils import model2layers

    path = str(hub.resolve(model))
    try:
        layer = model2layers.get(model) or AutoConfig.from_pretrained(path).num_hidden_layers
        scorer = BERTScorer(
            model_type=path,
            num_layers=layer,
            lang="en" if rescale else None,
            rescale_with_baseline=rescale,
            device=device,
            use_fast_tokenizer=True,
        )
        if rescale:
            _ = scorer.baseline_vals
    except (OSError, ValueError, AttributeError) as error:
        raise PyargsError(f"BERTScore with '{model}'{' rescaled' if rescale else ''} is not possible: {error}") from error
    # A local tokenizer may know no limit, which is then a number that its own code can not take.
    room = scorer._model.config.max_position_embeddings
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, room)
    return scorer, layer


def _check_counts(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise PyargsError(f"{len(predictions)} predictions for {len(references)} references: one for each, and at least one")
