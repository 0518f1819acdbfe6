"""Training, as a user calls it: a method's model, and the unit of its strength."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path

from pyargs.data import of_split, with_text_ids
from pyargs.decode.engine import Engine
from pyargs.decode.strength import PROMPTS, TOKENS, reward_std
from pyargs.errors import PyargsError
from pyargs.lm.cache import evaluating
from pyargs.lm.loading import load_lm
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.training import processes, trainer
from pyargs.training.hooks import method

LOSSES, ACCURACIES, PAIRS = 10, 10, 200
"""A report has the loss of every so many steps, and so many times in a training the accuracy on so many held-out pairs."""


def train(
    name: str,
    dataset,
    config=None,
    *,
    checkpoints: str | Path | None = None,
    report_to: Sequence[str] = (),
    report_folder: str | Path = "reports",
):
    """Trains method `name` on the rows of `dataset` with split "train"; returns the model in eval mode.

    dataset: columns user_id, prompt, chosen, rejected, split. config: the method's Config (its defaults without).
    checkpoints: a folder from which a killed training with LoRA continues; the caller removes it when the model is saved.
    report_to: trackers that are told losses and the accuracy on held-out pairs (split "train_test") as it goes, by their names
    in accelerate: tensorboard, trackio, wandb ...; report_folder: for those that write files. They change no weight.
    Returns a RewardModel, TokenReward or UserPolicy. One that can guide carries `reward_std`, the unit of `strength`: it is
    measured on train prompts with the backbone's own language model. Raises PyargsError on an unknown method, without train
    rows, on a tracker that is unknown or not installed, and on a loss that is not finite.
    """
    processes.start()
    config = config or method(name).Config()
    dataset = with_text_ids(dataset)
    with reporting(report_to, report_folder, name, config, dataset) as note:
        model = trainer.train(name, dataset, config, checkpoints=checkpoints, note=note)
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


def held_out(model, data, most: int = 500) -> dict | str:
    """How many of the trained users' held-out pairs the model ranks right, in percent; or why there is no such number."""
    if "split" not in data.column_names or "train_test" not in data["split"]:
        return "no pairs of split train_test: nothing tells how well the training went"
    if getattr(model, "demonstrations", None) is not None:
        return "nothing was trained: measure it after `pyargs adapt`"
    rows = of_split(data, "train_test")
    rows = rows.select(range(0, len(rows), -(-len(rows) // most)))  # over all users, in whatever order they stand
    if hasattr(model, "pair_scores"):
        scores = model.pair_scores(rows)[1]
    else:
        logprob, length = model.pair_logprobs(rows)
        scores = logprob / length
    found = rm_accuracy(scores, rows["user_id"])
    return {"split": "train_test", "pairs": len(rows), "accuracy": round(found["accuracy"], 1)}


@contextmanager
def reporting(names: Sequence[str], folder: str | Path, run: str, config, dataset) -> Iterator[Callable | None]:
    """A function note(model, step, steps, loss) that tells trackers of each step; None where there are no trackers."""
    if not names or processes.number():
        yield (lambda *_: None) if names else None
        return
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # trackers print; stdout is for results
        trackers = [_tracker(name, Path(run).stem, folder) for name in names]
        for tracker in trackers:
            stack.callback(tracker.finish)
            tracker.store_init_configuration({"method": run, **{key: str(one) for key, one in asdict(config).items()}})

        def note(model, step: int, steps: int, loss) -> None:
            values, last = {}, step + 1 == steps
            if step % LOSSES == 0 or last:
                values["train/loss"] = float(loss)
            if (step + 1) % max(1, steps // ACCURACIES) == 0 or last:
                with evaluating(model):
                    found = held_out(model, dataset, PAIRS)
                if isinstance(found, dict):
                    values["held_out/accuracy"] = found["accuracy"]
            for tracker in trackers if values else ():
                tracker.log(values, step=step + 1)

        yield note


def _tracker(name: str, run: str, folder: str | Path):
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise PyargsError(f"there is no tracker '{name}': accelerate knows {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    made = LOGGER_TYPE_TO_CLASS[name]
    PartialState()  # trackers ask it which process they are in
    try:
        tracker = made(run, logging_dir=str(folder)) if made.requires_logging_directory else made(run)
        tracker.start()
    except ImportError as error:
        raise PyargsError(f"the tracker '{name}' is not installed. Fix: pip install {name}") from error
    return tracker
