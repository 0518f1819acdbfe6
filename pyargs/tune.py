"""The reward weight: chosen on a grid in units of 1 / reward_std, so that one grid serves methods of any scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyargs.config import option
from pyargs.decode.prompts import decode_prompts
from pyargs.errors import PyargsError
from pyargs.metrics.overlap import rouge
from pyargs.metrics.perplexity import perplexities, perplexity
from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy
from pyargs.types import Decoded


@dataclass
class Tuning:
    """How the weight is chosen; all values come from pairs of seen users that were not trained on."""

    objective: str = option(
        "policy_accuracy",
        "policy_accuracy (paper, TLDR and PRISM); harmonic: mean of ROUGE-1, inverse perplexity and policy accuracy (paper, "
        "Pref-LaMP); fluency: the largest weight whose perplexity is at most --max-perplexity times that of weight 0",
        choices=["policy_accuracy", "harmonic", "fluency"],
    )
    grid: list[float] = option(
        [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], "weights to try, in units of 1 / reward_std (paper silent)"
    )
    max_perplexity: float = option(1.5, "bound of objective fluency, as a multiple of the unguided perplexity")
    prompts: int = option(100, "held-out prompts to generate for, at each grid point (paper silent)")
    num_candidates: int = option(10, "k of ARGS")
    max_new_tokens: int = option(64, "length of the generated answers (64 for titles)")
    batch_size: int = option(8, "prompts decoded together")
    seed: int = option(0, "which prompts are taken")


def reward_std(outputs: list[Decoded]) -> float:
    """RMS over the steps of unguided decoding of the rewards' standard deviation within the k candidates."""
    squares = torch.cat([(o.spreads**2)[torch.arange(o.spreads.shape[1]) < o.lengths.unsqueeze(1)] for o in outputs])
    return squares.double().mean().sqrt().item() if len(squares) else 0.0


def tune(model, policy, rows, config: Tuning) -> dict:
    """reward_std, the grid with what was measured at each point, and the chosen raw `reward_weight`.

    rows: pairs of seen users that were held out (split "train_test"). Ties go to the smaller weight. Raises PyargsError
    without rows or when the reward does not tell candidates apart (reward_std is 0).
    """
    if not hasattr(model, "pair_scores"):
        raise PyargsError(f"{model.about.get('method')} answers by itself: it has no weight to choose")
    if not len(rows):
        raise PyargsError("no rows with split 'train_test': the weight may only be chosen on seen users' held-out pairs")
    if min(config.prompts, config.batch_size, config.max_new_tokens) < 1 or not config.grid:
        raise PyargsError("prompts, batch_size and max_new_tokens must be at least 1, and the grid must hold a weight")
    first: dict[str, dict] = {}
    for row in rows.shuffle(seed=config.seed):
        first.setdefault(str(row["prompt"]), row)
    sample = list(first.values())[: config.prompts]
    users = [row["user_id"] for row in sample]
    options = dict(num_candidates=config.num_candidates, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)

    def answer(weight: float):
        texts, prompts, tokens, outputs = [""] * len(sample), [None] * len(sample), [[]] * len(sample), []
        for numbers, ids, decoded in decode_prompts(
            policy, model, [row["prompt"] for row in sample], users,
            reward_weight=weight, progress=f"weight {weight:.3g}", **options,
        ):  # fmt: skip
            outputs.append(decoded)
            for i, prompt, answer, text in zip(numbers, ids, decoded.answers(), decoded.texts(model.tokenizer), strict=True):
                texts[i], prompts[i], tokens[i] = text, prompt, answer
        return texts, prompts, tokens, outputs

    texts, prompts, tokens, outputs = answer(0.0)
    unit = reward_std(outputs)
    if unit == 0:
        raise PyargsError("the rewards of the candidates never differ: the model has learnt nothing that could guide")
    unguided = tokens
    scores = pair_scores(model, policy, rows)
    centre = scores.mean_step_reward()

    points, written, plain = [], [], None
    if config.objective != "harmonic":
        plain = perplexity(policy, prompts, unguided)
    for relative in sorted(config.grid):
        weight = relative / unit
        accuracy = policy_accuracy(scores, weight, centre=centre)
        point = {
            "relative": relative,
            "reward_weight": weight,
            "policy_accuracy": {name: values["accuracy"] for name, values in accuracy.items() if name not in ("base", "sum")},
        }
        points.append(point)
        if config.objective == "policy_accuracy":
            continue
        if relative:
            texts, prompts, tokens, _ = answer(weight)
        written.append(tokens)
        point["rouge1"] = rouge(texts, [row["chosen"] for row in sample])["rouge1"]
        if config.objective == "fluency":
            point["perplexity"] = perplexity(policy, prompts, tokens)
            if point["perplexity"] > config.max_perplexity * plain:
                break  # larger weights only get worse; what was measured stays in the record
    if config.objective == "harmonic":  # all weights' answers to a prompt behind one pass over it
        plain, *found = perplexities(policy, prompts, [unguided, *written])
        for point, value in zip(points, found, strict=True):
            point["perplexity"] = value

    def value(point: dict) -> float:
        if config.objective == "policy_accuracy":
            return point["policy_accuracy"]["paper"]
        if config.objective == "fluency":
            return point["relative"] if point["perplexity"] <= config.max_perplexity * plain else -1.0
        parts = (point["rouge1"] / 100, 1 / point["perplexity"], point["policy_accuracy"]["paper"] / 100)
        return len(parts) / sum(1 / part for part in parts) if all(parts) else 0.0

    for point in points:
        point["value"] = value(point)
    best = max(points, key=lambda point: point["value"])  # the first of equals, which is the smaller weight
    return {
        "objective": config.objective, "max_perplexity": config.max_perplexity, "reward_std": unit, "centre": centre,
        "unguided_perplexity": plain,
        "reward_weight": best["reward_weight"], "relative": best["relative"], "prompts": len(sample), "pairs": len(rows),
        "grid": points,
    }  # fmt: skip
