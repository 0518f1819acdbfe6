"""Training, as a user calls it: a method's model, and the unit of its strength."""

from __future__ import annotations

from pathlib import Path

from pyargs.data import of_split, with_text_ids
from pyargs.decode.engine import Engine
from pyargs.decode.strength import PROMPTS, TOKENS, reward_std
from pyargs.lm.loading import load_lm
from pyargs.training import trainer


def train(name: str, dataset, config=None, *, checkpoints: str | Path | None = None):
    """Trains method `name` on the rows of `dataset` with split "train"; returns the model in eval mode.

    dataset: columns user_id, prompt, chosen, rejected, split. config: the method's Config (its defaults without).
    checkpoints: a folder from which a killed training with LoRA continues; the caller removes it when the model is saved.
    Returns a RewardModel, TokenReward or UserPolicy. One that can guide carries `reward_std`, the unit of `strength`: it is
    measured on train prompts with the backbone's own language model. Raises PyargsError on an unknown method, without train
    rows, and on a loss that is not finite.
    """
    model = trainer.train(name, dataset, config, checkpoints=checkpoints)
    measure(model, dataset)
    return model


def measure(model, dataset) -> None:
    """Notes `reward_std` of the model's own backbone, for models that can guide."""
    if not hasattr(model, "pair_scores") or getattr(model, "separate_prompt", False):
        return
    dataset = with_text_ids(dataset)
    rows = of_split(dataset, "train") if "split" in dataset.column_names else dataset
    first: dict[str, dict] = {}
    for row in rows.select_columns(["prompt", "user_id"]).shuffle(seed=0).select(range(min(len(rows), 8 * PROMPTS))):
        first.setdefault(str(row["prompt"]), row)
    asked = list(first.values())[:PROMPTS]
    about = model.about
    policy, _ = load_lm(about["backbone"], dtype=about["dtype"], device=model.device)
    answers = Engine(policy, model).generate(
        [row["prompt"] for row in asked], [row["user_id"] for row in asked], reward_weight=0.0, max_new_tokens=TOKENS
    )
    about["reward_std"] = {about["fingerprint"]: reward_std(answers)}
