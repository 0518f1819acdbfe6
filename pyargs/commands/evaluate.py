"""Measure a model: RM accuracy, policy accuracy, and ROUGE of generated answers against what the users wrote."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from pyargs.commands import add_data, add_policy

    parser.add_argument("model", help="folder of `pyargs adapt` (or of `pyargs train` with --split train_test)")
    add_policy(parser)
    parser.add_argument("--split", default="query", help="which pairs (default: query, those of the new users)")
    parser.add_argument("--tuned", help="file of `pyargs tune`; without it and --policy: RM accuracy")
    parser.add_argument("--generations", nargs="*", default=[], help="files of `pyargs decode` to score with ROUGE")
    parser.add_argument("--out", required=True, help="JSON file for the result")
    add_data(parser)


def run(args: argparse.Namespace) -> dict:
    from pathlib import Path

    from pyargs import files
    from pyargs.commands import load_data
    from pyargs.data import content_hash, of_split
    from pyargs.decode.prompts import load_pair
    from pyargs.errors import PyargsError
    from pyargs.lm import hub
    from pyargs.metrics.overlap import rouge
    from pyargs.metrics.rm_accuracy import rm_accuracy
    from pyargs.models import load_model
    from pyargs.models.folder import locate, read_config
    from pyargs.types import Result

    rows = of_split(load_data(args), args.split)
    tuned = files.read_tuned(args.tuned, args.model) if args.tuned else None
    if (tuned is None) != (args.policy is None):
        raise PyargsError("give both --policy and --tuned (the weight chosen for it), or neither")
    inputs = {"data": content_hash(rows), "model": files.sha256(args.model), "policy": hub.identity(args.policy)}
    if args.tuned:
        inputs["tuned"] = files.sha256(args.tuned)
    stems = [Path(file).stem for file in args.generations]
    if len(set(stems)) < len(stems):
        raise PyargsError(f"two --generations files are called {max(stems, key=stems.count)}: give them different names")
    inputs |= {Path(file).name: files.sha256(file) for file in args.generations}
    key = files.stage_key({"stage": "evaluate", "policy": args.policy, "dtype": args.dtype, "split": args.split}, inputs)
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}

    if read_config(locate(args.model))["kind"] != "user_policy" and args.policy is None:
        model = load_model(args.model)
        values = {"rm_accuracy": rm_accuracy(model.pair_scores(rows)[1], rows["user_id"])}
    else:
        policy, model = load_pair(args.policy, args.model, dtype=args.dtype)
        values = _policy(model, rows) if args.policy is None else _guide(model, policy, rows, tuned)
    written = {(row["user_id"], row["pair_id"]): row["chosen"] for row in rows}
    for file in args.generations:
        lines = list(files.read_jsonl(file))
        missing = [line["pair_id"] for line in lines if (line["user_id"], line["pair_id"]) not in written]
        if missing:
            raise PyargsError(f"{file} answers items that are not in split '{args.split}', {missing[0]} for one")
        overlap = rouge([line["text"] for line in lines], [written[line["user_id"], line["pair_id"]] for line in lines])
        overlap["rouge1_each"] = [round(value, 2) for value in overlap["rouge1_each"]]
        values.setdefault("rouge", {})[Path(file).stem] = {
            "reward_weight": lines[0]["reward_weight"], **overlap,
            "words": sum(len(line["text"].split()) for line in lines) / len(lines),
        }  # fmt: skip
    result = Result("evaluate", values, key["config"], inputs, files.provenance(model.about["fields"]["seed"])).json()
    files.write_json(args.out, result)
    files.record(args.out, key)
    return result


def _guide(model, policy, rows, tuned: dict) -> dict:
    """What a RewardModel or TokenReward is worth by itself and, with its weight, to the policy's score."""
    from pyargs.metrics.policy_accuracy import pair_scores, policy_accuracy
    from pyargs.metrics.rm_accuracy import rm_accuracy

    scores = pair_scores(model, policy, rows)
    accuracy = policy_accuracy(scores, tuned["reward_weight"], centre=tuned["centre"])
    return {
        "rm_accuracy": rm_accuracy(scores.reward, scores.users),
        "policy_accuracy": {
            "base": accuracy.pop("base"),
            "personal" if model.users.personal else "global": accuracy,
            "weight_0": {name: v for name, v in policy_accuracy(scores, 0.0).items() if name in ("paper", "all")},
        },
        "reward_weight": tuned["reward_weight"],
    }


def _policy(model, rows) -> dict:
    """How a policy ranks its user's pairs: by mean log-prob (eq. 7), by the sum, and by the margin over its untrained self."""
    from pyargs.metrics.rm_accuracy import rm_accuracy

    users = list(rows["user_id"])
    logprob, length = model.pair_logprobs(rows)
    ranked = {"mean": logprob / length, "sum": logprob}
    if model.soft is not None:
        ranked["margin"] = logprob - model.untrained(rows, stop=False)
    kind = "base" if model.soft is None and model.demonstrations is None else "personal"
    return {"policy_accuracy": {kind: {name: rm_accuracy(score, users) for name, score in ranked.items()}}}
