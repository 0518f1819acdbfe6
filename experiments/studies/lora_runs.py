"""Every method's full training, LoRA and all, once on SmolLM2 with a few users: that it works, and what it costs.

    python -m experiments.studies.lora_runs [--only ROW ...]

Six users with 12 pairs each to train on and two new ones (12 support, 12 query pairs) of
../shared/data/persona_statements: far too few for an accuracy that means anything. Each run trains, adapts, saves, loads,
compares the scores of both, and answers a prompt for both new users. A run is written when done, and not done twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from experiments.studies.persona_statements import DATA, HERE
from pyargs import files, load_model
from pyargs.data import of_split, preferences
from pyargs.decode.engine import Engine
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.training import adapt, hooks, trainer

OUT = HERE / "results/lora_runs.json"
PAIRS = 12
METHODS = {  # row: (method, fields that are not its defaults)
    "Global RM v1": ("global_rm", {}),
    "LoRE": ("lore", {}),
    "LoRE-Alt": ("lore", {"alternate": True, "rank": 20}),
    "PReF": ("pref", {}),
    "PAL-A": ("pal", {"variant": "A"}),
    "PAL-B": ("pal", {"variant": "B"}),
    "VPL": ("vpl", {}),
    "MPU": ("mpu", {}),
    "MPU-Avg": ("mpu", {"pool": "mean"}),
    "GenARM": ("genarm", {}),
    "P-DPO": ("pdpo", {"adapt_steps": 5}),
}


def few_users(source: Path):
    """The first PAIRS pairs of each split of the first six train users and the first two new ones."""
    data = preferences.load(source, train_test=0.0)
    users = {"train": 6, "support": 2, "query": 2}
    seen, count, keep = {split: [] for split in users}, Counter(), []
    for i, (user, split) in enumerate(zip(data["user_id"], data["split"], strict=True)):
        if user not in seen[split] and len(seen[split]) < users[split]:
            seen[split].append(user)
        count[user, split] += 1
        if user in seen[split] and count[user, split] <= PAIRS:
            keep.append(i)
    return data.select(keep)


def run(name: str, data) -> dict:
    method, fields = METHODS[name]
    seconds, started = {}, time.perf_counter()

    def lap(what: str) -> None:
        seconds[what] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    recipe = hooks.method(method)
    fields = {**fields, **({"epochs": 1.0, "batch_size": 8} if recipe.loss else {})}
    losses = []
    if recipe.loss:
        plain = recipe.loss
        recipe.loss = lambda *args: losses.append(plain(*args)) or losses[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PReF: sparse data
        model = trainer.train(method, data, recipe.Config(**fields))
    if recipe.loss:
        recipe.loss = plain
    lap("train")
    adapt.adapt(model, data)
    lap("adapt")
    query = of_split(data, "query")
    scores = _scores(model, query)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        same = torch.equal(scores, _scores(load_model(f"{folder}/model"), query))
        lap("score, save, load, score")
        users, texts = list(dict.fromkeys(query["user_id"])), None
        if name != "PAL-B":
            engine = Engine(None if method == "pdpo" else "smollm2-135m", f"{folder}/model")
            weight = {"reward_weight": 1.0} if engine.pair.guided else {}
            answers = engine.generate([query[0]["prompt"]] * 2, users, max_new_tokens=12, **weight)
            texts = [answer.text for answer in answers]
        lap("answer")
    return {
        "fields": fields,
        "steps": len(losses),
        "losses": [round(loss.item(), 4) for loss in losses],
        "seconds": seconds,
        "lora_moved": sum(p.abs().sum().item() > 0 for n, p in model.backbone.named_parameters() if "lora_B" in n),
        "train_accuracy": rm_accuracy(_scores(model, of_split(data, "train")), of_split(data, "train")["user_id"])["accuracy"],
        "query_accuracy": rm_accuracy(scores, query["user_id"])["accuracy"],
        "saved_equals_loaded": same,
        "answers": texts,
        "provenance": files.provenance(0),
    }


def _scores(model, rows) -> torch.Tensor:
    return model.pair_scores(rows)[1] if hasattr(model, "pair_scores") else model.pair_logprobs(rows)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW", help=", ".join(METHODS))
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if not options.data.is_file():
        raise SystemExit(f"no {options.data}: this experiment needs the shared data")
    data = few_users(options.data)
    result = files.read_json(OUT) if OUT.exists() else {}
    for name in options.only:
        if name not in result:
            result[name] = run(name, data)
            files.write_json(OUT, result)
        found = result[name]
        print(
            f"{name}: {found['steps']} steps in {found['seconds']['train']} s, accuracy {found['train_accuracy']:.0f} on "
            f"train, {found['query_accuracy']:.0f} on query pairs; saved equals loaded: {found['saved_equals_loaded']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
