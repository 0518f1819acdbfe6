"""Perplexity of generated answers under the unguided policy: how fluent the guided text still is."""

from __future__ import annotations

import math
from collections.abc import Sequence

Ids = Sequence[int]


def perplexity(policy, prompts: Sequence[Ids], answers: Sequence[Ids]) -> float:
    """exp(-mean log pi(token | prompt, earlier tokens)) over all tokens of all answers; infinity if every answer is empty."""
    return perplexities(policy, prompts, [answers])[0]


def perplexities(policy, prompts: Sequence[Ids], several: Sequence[Sequence[Ids]]) -> list[float]:
    """`perplexity` of several sets of answers to the same prompts, each prompt read once for all of them."""
    from pyargs.scoring import response_logprobs

    groups = [(prompt, [list(a) for a in own if len(a)]) for prompt, *own in zip(prompts, *several, strict=True)]
    found = response_logprobs(policy, [group for group in groups if group[1]], progress="perplexity")
    values = iter(value.double().sum().item() for of_prompt in found for value in of_prompt)
    logs, counts = [0.0] * len(several), [0] * len(several)
    for own in zip(*several, strict=True):
        for number, answer in enumerate(own):
            if len(answer):
                logs[number] += next(values)
                counts[number] += len(answer)
    return [math.exp(-log / count) if count else math.inf for log, count in zip(logs, counts, strict=True)]
