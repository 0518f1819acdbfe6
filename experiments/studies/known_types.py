"""What a linear reward ranks of two_types when it is told each user's type, and what the methods rank that are not told.

    python -m experiments.studies.known_types [--data FILE]

Logistic regression with a ridge on the states of SmolLM2-135M's frozen backbone (bfloat16, as in profile cpu; of the last
token, and the mean over the response), once for everybody and once for each type by itself. The ridge is chosen on the seen
users' held-out pairs, and the query pairs of the new users are ranked: all, and those whose two labels are opposed, the only
ones where the type has to decide. Beside it what the cells of profile cpu rank of the same pairs. The numbers go to
results/known_types.json; ten minutes on two cores, nearly all of them the backbone's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from experiments import results
from pyargs import data, files
from pyargs.data import of_split
from pyargs.lm.loading import load_lm
from pyargs.metrics.bootstrap import user_interval
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.scoring import features

HERE = Path(__file__).parents[1]
DATA = HERE.parent.parent / "shared/data/hh_rlhf_users/two_types_prefs.jsonl.gz"
OUT = HERE / "results/known_types.json"
RIDGES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]
TYPES = ["helpful", "harmless"]


def differences(rows, lm, tokenizer) -> dict[str, np.ndarray]:
    """Chosen minus rejected state [N, D] of each pair, of the last token and of the mean over the tokens."""
    found = features(lm.get_decoder(), tokenizer, rows)
    states = found.hidden.double().split((found.offsets[1:] - found.offsets[:-1]).tolist())
    read = {"last": torch.stack([s[-1] for s in states]), "mean": torch.stack([s.mean(0) for s in states])}
    return {name: (s[found.chosen] - s[found.rejected]).numpy() for name, s in read.items()}


def direction(x: np.ndarray, ridge: float) -> np.ndarray:
    """w [D] that minimises the mean of log(1 + exp(-x w)) + ridge |w|^2."""

    def loss(w):
        margin = x @ w
        slope = -0.5 * (1 - np.tanh(margin / 2))  # of log(1 + exp(-m)), without overflow
        return np.logaddexp(0, -margin).mean() + ridge * w @ w, x.T @ slope / len(x) + 2 * ridge * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def accuracy(x: np.ndarray, w: np.ndarray, users: list[str]) -> dict:
    return rm_accuracy(torch.from_numpy(np.stack([x @ w, np.zeros(len(x))], axis=1)), users)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if not options.data.is_file():
        raise SystemExit(f"no {options.data}: this experiment needs the shared data")
    dataset = data.load("hh_rlhf_users", options.data)
    lm, tokenizer = load_lm("smollm2-135m", dtype="bfloat16")
    rows = {split: of_split(dataset, split) for split in ("train", "train_test", "query")}
    states = {split: differences(some, lm, tokenizer) for split, some in rows.items()}
    result = {}
    for read in ("last", "mean"):
        x = {split: states[split][read] / states["train"][read].std() for split in rows}
        each: dict[str, dict] = {}
        for told in (TYPES, *([kind] for kind in TYPES)):
            mine = {split: np.isin(some["user_type"], told) for split, some in rows.items()}
            users = {
                split: [user for user, own in zip(rows[split]["user_id"], mine[split], strict=True) if own] for split in rows
            }
            own = {split: x[split][mine[split]] for split in rows}
            tried = [
                (accuracy(own["train_test"], w := direction(own["train"], r), users["train_test"])["accuracy"], r, w)
                for r in RIDGES
            ]
            held_out, ridge, w = max(tried, key=lambda one: one[:2])
            found = accuracy(own["query"], w, users["query"])
            each[" and ".join(told)] = {
                "ridge": ridge,
                "train": accuracy(own["train"], w, users["train"])["accuracy"],
                "held_out": held_out,
                **{name: found[name] for name in ("accuracy", "n", "users", "each")},
            }
        each["each type by itself"] = {"each": {user: right for kind in TYPES for user, right in each[kind]["each"].items()}}
        result |= {f"{name}, {read}": one for name, one in each.items()}
    labels = {pair["pair_id"]: pair for pair in files.read_jsonl(options.data.with_name("pairs.jsonl.gz"))}
    opposed: dict[str, list[bool]] = {}
    for user, pair in zip(rows["query"]["user_id"], rows["query"]["pair_id"], strict=True):
        both = labels[pair]["label_helpful"], labels[pair]["label_harmless"]
        opposed.setdefault(user, []).append(None not in both and both[0] != both[1])
    for one in result.values():
        one |= split([one["each"]], opposed)
    by_row: dict[str, list[dict]] = {}
    for cell in results.read(HERE / "results"):
        if cell["profile"] == "cpu" and cell["set"] == "two_types" and "rm_accuracy" in cell["values"]:
            by_row.setdefault(cell["row"], []).append(cell["values"]["rm_accuracy"]["each"])
    result |= {row: split(seeds, opposed) for row, seeds in by_row.items()}
    for name, one in result.items():
        print(
            name
            + "".join(
                f"; {which} {v['mean']:.1f} ({v['low']:.1f} to {v['high']:.1f}), {v['n']}"
                for which in ("all", "opposed", "others")
                if (v := one[which])
            )
        )
    files.write_json(OUT, {**result, "data": files.sha256(options.data), "provenance": files.provenance()})


def split(seeds: list[dict[str, str]], opposed: dict[str, list[bool]]) -> dict:
    """Accuracy over all pairs, the opposed and the others, each with its interval over users; all seeds together."""
    found = {}
    for which, wanted in (("all", (True, False)), ("opposed", (True,)), ("others", (False,))):
        right: dict[str, list[float]] = {}
        for user, outcomes in ((user, outcomes) for each in seeds for user, outcomes in each.items()):
            of_user = zip(outcomes, opposed[user], strict=True)
            right.setdefault(user, []).extend(100.0 * int(one) for one, kind in of_user if kind in wanted)
        found[which] = user_interval({user: values for user, values in right.items() if values})
    return found


if __name__ == "__main__":
    main()
