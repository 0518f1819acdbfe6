"""Perplexity of generated answers under the unguided policy: how fluent the guided text still is."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def perplexities(policy, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """exp(-mean log pi(token | prompt, earlier tokens)) of each answer, from token ids; infinity for an empty answer."""
    from pyargs.lm.hf import response_logprobs

    kept = [i for i, answer in enumerate(answers) if len(answer)]
    found = [float("inf")] * len(answers)
    if kept:
        logprobs = response_logprobs(policy, [(prompts[i], [answers[i]]) for i in kept], progress="perplexity")
        for i, (values,) in zip(kept, logprobs, strict=True):
            found[i] = torch.exp(-values.double().mean()).item()
    return found


def perplexity(policy, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """The same over all tokens of all answers together; infinity when every answer is empty."""
    each = perplexities(policy, prompts, answers)
    tokens = sum(len(a) for a in answers)
    logs = sum(len(a) * torch.tensor(p).log().item() for a, p in zip(answers, each, strict=True) if len(a))
    return torch.tensor(logs / tokens).exp().item() if tokens else float("inf")
