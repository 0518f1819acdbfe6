"""The reward weight: chosen on a grid in units of 1 / reward_std, so that one grid serves methods of any scale."""

from __future__ import annotations

from dataclasses import dataclass

from pyargs.config import option
from pyargs.decode.answer import Answer
from pyargs.decode.engine import Engine
from pyargs.decode.strength import reward_std
from pyargs.errors import PyargsError
from pyargs.lm.structure import BACKENDS
from pyargs.metrics.overlap import rouge
from pyargs.metrics.perplexity import perplexities, perplexity
from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy


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
        [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
        "weights to try, in units of 1 / reward_std (paper silent); while the largest is the best, larger ones are tried "
        "within --max-perplexity",
    )
    max_perplexity: float = option(
        1.5, "as a multiple of the unguided perplexity: no weight above it is chosen by fluency, or from beyond the grid"
    )
    prompts: int = option(100, "held-out prompts to generate for, at each grid point (paper silent)")
    num_candidates: int = option(10, "k of ARGS")
    max_new_tokens: int = option(64, "length of the generated answers (64 for titles)")
    batch_size: int = option(8, "prompts answered at a time")
    seed: int = option(0, "which prompts are taken")
    eos_reward: str | None = option(
        None,
        "what a stop token earns: the reward of the text before it, or of the state behind it, on which no head is "
        "trained (default: before; GenARM has a reward of its own for it)",
        choices=["before", "state"],
    )
    backend: str = option("auto", "what computes the answers; auto: the fastest that computes these models", choices=BACKENDS)


STEP, BEYOND = 3.0, 6  # how far apart weights beyond the grid are, and how many at most


def engine_for(policy, model, config: Tuning) -> Engine:
    """The engine that `tune` asks for answers."""
    return Engine(policy, model, backend=config.backend, max_rows=config.batch_size, eos_reward=config.eos_reward)


def tune(engine: Engine, rows, config: Tuning) -> dict:
    """reward_std, the grid with what was measured at each point, and the chosen raw `reward_weight`.

    engine: made by `engine_for` with these settings. rows: held-out pairs of seen users (split "train_test"). Ties go to the
    smaller weight. While the largest weight is the best and within max_perplexity, a weight STEP times as large is tried, at
    most BEYOND times. The first beyond the bound ends the search; it is in the grid, but not chosen. Weights of config.grid
    are held to the bound by the objective fluency only. Raises PyargsError without rows, when all candidates have the same
    reward (reward_std is 0), or when no weight is within fluency's bound.
    """
    policy, model = engine.pair.policy, engine.pair.model
    if not hasattr(model, "pair_scores"):
        raise PyargsError(f"{model.about.get('method')} answers by itself: it has no weight to choose")
    if not len(rows):
        raise PyargsError("no rows with split 'train_test': the weight may only be chosen on seen users' held-out pairs")
    if min(config.prompts, config.max_new_tokens) < 1 or not config.grid:
        raise PyargsError("prompts and max_new_tokens must be at least 1, and the grid must hold a weight")
    first: dict[str, dict] = {}
    for row in rows.shuffle(seed=config.seed):
        first.setdefault(str(row["prompt"]), row)
    sample = list(first.values())[: config.prompts]
    asked, users = [row["prompt"] for row in sample], [row["user_id"] for row in sample]

    def answer(weight: float) -> list[Answer]:
        return engine.generate(
            asked,
            users,
            reward_weight=weight,
            num_candidates=config.num_candidates,
            max_new_tokens=config.max_new_tokens,
            progress=f"weight {weight:.3g}",
        )

    alone = answer(0.0)
    prompts, unguided = [one.prompt for one in alone], [one.tokens for one in alone]
    unit = reward_std(alone)
    if unit == 0:
        raise PyargsError("the rewards of the candidates never differ: the model has learnt nothing that could guide")
    scores = pair_scores(model, policy, rows)
    centre = scores.mean_step_reward()

    points, written, base = [], [], None
    if config.objective != "harmonic":
        base = perplexity(policy, prompts, unguided)

    def measure(relative: float) -> list:
        """Adds a point of the grid; returns the tokens that are written there, for all objectives but policy_accuracy."""
        weight = relative / unit
        accuracy = policy_accuracy(scores, weight, centre=centre)
        point = {
            "relative": relative,
            "reward_weight": weight,
            "policy_accuracy": {name: values["accuracy"] for name, values in accuracy.items() if name not in ("base", "sum")},
        }
        points.append(point)
        if config.objective == "policy_accuracy":
            return []
        answers = answer(weight) if relative else alone
        point["rouge1"] = rouge([one.text for one in answers], [row["chosen"] for row in sample])["rouge1"]
        return [one.tokens for one in answers]

    def value(point: dict) -> float:
        if config.objective == "policy_accuracy":
            return point["policy_accuracy"]["paper"]
        if config.objective == "fluency":
            return point["relative"] if point["perplexity"] <= config.max_perplexity * base else -1.0
        parts = (point["rouge1"] / 100, 1 / point["perplexity"], point["policy_accuracy"]["paper"] / 100)
        return len(parts) / sum(1 / part for part in parts) if all(parts) else 0.0

    for relative in sorted(config.grid):
        written.append(measure(relative))
        if config.objective == "fluency":
            points[-1]["perplexity"] = perplexity(policy, prompts, written[-1])
            if points[-1]["perplexity"] > config.max_perplexity * base:
                break  # larger weights only get worse; what was measured stays in the record
    if config.objective == "harmonic":  # all weights' answers to a prompt behind one pass over it
        base, *found = perplexities(policy, prompts, [unguided, *written])
        for point, one in zip(points, found, strict=True):
            point["perplexity"] = one
    for point in points:
        point["value"] = value(point)

    def broken(point: dict) -> bool:
        if "perplexity" not in point:
            point["perplexity"] = perplexity(policy, prompts, [one.tokens for one in answer(point["reward_weight"])])
        return point["perplexity"] > config.max_perplexity * base

    best = max(points, key=lambda point: point["value"])  # the first of equals: the smaller weight
    for _ in range(BEYOND):
        if best is not points[-1] or not best["relative"] or broken(best):
            break
        own = measure(STEP * best["relative"])
        larger = points[-1]
        if own:
            larger["perplexity"] = perplexity(policy, prompts, own)
        larger["value"] = value(larger)
        if larger["value"] > best["value"] and not broken(larger):
            best = larger
    if best["value"] < 0:
        raise PyargsError(
            f"no weight of the grid keeps perplexity within {config.max_perplexity} times that of weight 0: "
            "add smaller weights, or raise max_perplexity"
        )
    return {
        "objective": config.objective,
        "max_perplexity": config.max_perplexity,
        "reward_std": unit,
        "centre": centre,
        "unguided_perplexity": base,
        "num_candidates": config.num_candidates,
        "eos_reward": config.eos_reward,
        "backend": engine.backend,
        "reward_weight": best["reward_weight"],
        "relative": best["relative"],
        "prompts": len(sample),
        "pairs": len(rows),
        "grid": points,
    }
