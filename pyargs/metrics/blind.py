"""Accuracies of scorers that know neither the user nor language: a method has to beat them to show anything.

A pair that was made from two sources (an author's title and a stranger's, a person's text and a model's) can often be decided
by its form or by its nearness to the prompt. These accuracies show how far.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence

import numpy as np
import torch

from pyargs.lm.embed import embed
from pyargs.metrics.rm_accuracy import compare

SAMPLE = 2000  # pairs whose texts are embedded at most


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def overlap(prompt: str, response: str) -> float:
    """Share of the response's different words that the prompt has; 0 without words."""
    found = set(words(response))
    return len(found & set(words(prompt))) / max(1, len(found))


SCORERS = {  # the last one compares with the prompt, the others see nothing but form
    "words": lambda prompt, response: len(response.split()),
    "characters": lambda prompt, response: len(response),
    "lines": lambda prompt, response: response.strip().count("\n"),
    "terminator": lambda prompt, response: response.rstrip().endswith((".", "!", "?")),
    "brackets": lambda prompt, response: sum(response.count(mark) for mark in '()[]{}<>"“”:*#'),
    "word_overlap": overlap,
}
FORM_SCORERS = [name for name in SCORERS if name != "word_overlap"]


def blind(
    prompts: Sequence,
    chosen: Sequence[str],
    rejected: Sequence[str],
    users: Sequence[str],
    *,
    embedder: str | None = "minilm",
    seed: int = 0,
) -> dict[str, dict]:
    """Accuracy in percent of each user-blind scorer; a tie is an error, as everywhere, and tie_rate tells how many there are.

    prompts: N str, or conversations, whose last content counts, without what they all begin with (an instruction); chosen,
    rejected, users: N each. `reversed` is the accuracy of preferring less of it: what a reward model would find, too.
    embedder: of the cosine between prompt and response, on a seeded sample of 2,000 pairs at most; None leaves it out.
    """
    texts = contents(prompts)
    found = {}
    for name, scorer in SCORERS.items():
        pairs = zip(texts, chosen, rejected, strict=True)
        scores = torch.tensor(
            [[float(scorer(p, c)), float(scorer(p, r))] for p, c, r in pairs], dtype=torch.float32, device="cpu"
        )
        found[name] = _both(scores, users)
    if embedder is not None:
        take = sample(len(texts), seed)
        vectors = embed(embedder, [column[i] for column in (texts, chosen, rejected) for i in take], progress=True)
        prompt, good, bad = vectors.reshape(3, len(take), -1)
        scores = np.stack([(prompt * good).sum(1), (prompt * bad).sum(1)], 1)
        found[f"{embedder}_cosine"] = _both(torch.from_numpy(scores), [users[i] for i in take])
    return found


def sample(count: int, seed: int = 0) -> list[int]:
    """The rows whose texts are embedded, in order: all of few, a seeded choice of many."""
    return sorted(random.Random(seed).sample(range(count), min(SAMPLE, count)))


def _both(scores: torch.Tensor, users: Sequence[str]) -> dict:
    forward = compare(scores[:, 0], scores[:, 1], users)
    return {
        "accuracy": round(forward["accuracy"], 2),
        "reversed": round(100 - forward["accuracy"] - forward["tie_rate"], 2),
        "tie_rate": round(forward["tie_rate"], 2),
        "n": forward["n"],
    }


def contents(prompts: Sequence) -> list[str]:
    """The text of each prompt, or of its last message, without the instruction that all of them begin with."""
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    common = os.path.commonprefix(texts) if len(set(texts)) > 1 else ""
    cut = max(common.rfind(": ") + 2 if ": " in common else 0, common.rfind("\n") + 1)
    return [text[cut:] for text in texts]
