"""Measure a model: RM accuracy, policy accuracy, and generated answers against what the users wrote and the unguided ones."""

from __future__ import annotations

import argparse

WHOLE = 4  # a source of so many words that an answer contains is a quotation; shorter titles may be chance

ANSWER = {"user_id": str, "pair_id": str | None, "text": str, "tokens": list[int]}
"""What a line of `pyargs decode` holds."""
GUIDED = {"reward_weight": float | None, "cut": bool}
"""Optional fields that are read."""


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_data, add_model, add_policy

    add_model(parser, "folder of `pyargs adapt` (or of `pyargs train` with --split train_test)")
    add_policy(parser)
    weight = parser.add_mutually_exclusive_group()
    weight.add_argument("--tuned", help="file of `pyargs tune`: the weight that was chosen for this model and policy")
    weight.add_argument(
        "--reward-weight", type=float, help="raw w of eq. 1 instead; without --policy and a weight only RM accuracy"
    )
    parser.add_argument("--split", default="query", help="split whose pairs are measured (default: query, of the new users)")
    parser.add_argument("--generations", help="file of `pyargs decode`; adds ROUGE, perplexity under the policy, lengths")
    parser.add_argument(
        "--bertscore", metavar="MODEL", help="adds BERTScore by this model: minilm, a local folder or a hub name"
    )
    parser.add_argument(
        "--rescale", action="store_true", help="BERTScore minus the baseline that bert-score has for its models"
    )
    parser.add_argument("--zero-shot", metavar="FILE", help="the policy's own answers; adds the model's win rate over them")
    parser.add_argument("--out", required=True, help="JSON file for the result")
    add_data(parser)


def run(args: argparse.Namespace) -> dict:
    from pyargs import files
    from pyargs.commands import load_data, rows_of
    from pyargs.data import content_hash
    from pyargs.decode.pair import load_pair
    from pyargs.errors import PyargsError
    from pyargs.lm import hub
    from pyargs.lm.loading import load_lm
    from pyargs.metrics.rm_accuracy import rm_accuracy
    from pyargs.models import load_model
    from pyargs.models.folder import locate, read_config
    from pyargs.tuned import read as read_tuned
    from pyargs.types import Result

    rows = rows_of(load_data(args), args.split)
    tuned = read_tuned(args.tuned, args.model) if args.tuned else None
    if args.reward_weight is not None:
        tuned = {"reward_weight": args.reward_weight, "centre": 0.0}
    if (tuned is None) != (args.policy is None):
        raise PyargsError("give both --policy and the weight (--tuned or --reward-weight), or neither")
    if (args.bertscore or args.zero_shot) and not args.generations:
        raise PyargsError("--bertscore and --zero-shot are about --generations: name that file")
    if args.rescale and not args.bertscore:
        raise PyargsError("--rescale is about --bertscore: name its model")
    config = read_config(locate(args.model))
    if args.zero_shot and config["kind"] == "user_policy":
        raise PyargsError(f"{args.model} answers by itself ({config.get('method')}) and has no rewards: leave --zero-shot out")
    if args.generations and config["kind"] != "user_policy" and args.policy is None:
        raise PyargsError("--generations of a model that guides need its --policy")
    inputs = {"data": content_hash(rows), "model": files.sha256(args.model), "policy": hub.identity(args.policy)}
    inputs |= {
        name: files.sha256(file) for name in ("tuned", "generations", "zero_shot") if (file := getattr(args, name)) is not None
    }
    settings = {name: getattr(args, name) for name in ("policy", "dtype", "split", "reward_weight", "bertscore", "rescale")}
    key = files.stage_key({"stage": "evaluate", **settings, "whole": WHOLE}, inputs)
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}

    if config["kind"] != "user_policy" and args.policy is None:
        model = load_model(args.model, backbone=args.backbone)
        values = {"rm_accuracy": rm_accuracy(model.pair_scores(rows)[1], rows["user_id"])}
    else:
        policy, model = load_pair(args.policy, args.model, dtype=args.dtype, backbone=args.backbone)
        values = _policy(model, rows) if args.policy is None else _guide(model, policy, rows, tuned)
        if args.generations:
            # What a method made of the policy must not judge its own fluency.
            judge = policy if args.policy else load_lm(args.backbone or config["backbone"], dtype=config["dtype"])[0]
            values |= _generations(args, model, judge, rows, tuned)
    result = Result(
        "evaluate", values, key["config"], inputs, files.provenance(model.about.get("fields", {}).get("seed"))
    ).json()
    files.write_json(args.out, result)
    files.record(args.out, key)
    return result


def _generations(args: argparse.Namespace, model, policy, rows, tuned: dict | None) -> dict:
    """Measures of the answers of a file: means, and the values of each answer."""
    from pyargs import files
    from pyargs.config import check_kinds
    from pyargs.errors import PyargsError
    from pyargs.lm.loading import same_tokenizer
    from pyargs.lm.tokenize import encode_prompt
    from pyargs.metrics.overlap import bertscore, copied, quotes, rouge
    from pyargs.metrics.perplexity import perplexity
    from pyargs.metrics.win_rate import win_rate

    if hasattr(model, "pair_scores") and not same_tokenizer(policy.tokenizer, model.tokenizer):
        raise PyargsError(
            "--generations are measured in the tokens of policy and model, and these have different tokenizers: leave it out, "
            "and compare the texts"
        )
    written = {(row["user_id"], row["pair_id"]): row for row in rows}

    def read(file: str) -> dict:
        lines = {}
        for number, line in enumerate(files.read_jsonl(file), 1):
            kinds = ANSWER | {name: kind for name, kind in GUIDED.items() if isinstance(line, dict) and name in line}
            check_kinds(line, kinds, f"{file}, line {number} is no line of `pyargs decode`")
            item = (line["user_id"], line["pair_id"])
            if item not in written:
                raise PyargsError(f"{file} answers items that are not in split '{args.split}', {item[1]} for one")
            if item in lines:
                raise PyargsError(f"{file}, line {number}: {item[1]} of {item[0]} was answered before")
            lines[item] = line
        return lines

    answers = read(args.generations)
    if not answers:
        raise PyargsError(f"{args.generations} holds no answer")
    _check_origin(args, answers, tuned)
    items, lines = [written[item] for item in answers], list(answers.values())
    texts, titles = [line["text"] for line in lines], [item["chosen"] for item in items]
    prompts = [encode_prompt(model.tokenizer, item["prompt"], model.about.get("max_length")) for item in items]
    found = rouge(texts, titles)
    each = {name: found.pop(f"{name}_each") for name in ("rouge1", "rougeL")}
    found["perplexity"] = perplexity(policy, prompts, [line["tokens"] for line in lines])
    found["words"] = sum(len(text.split()) for text in texts) / len(texts)
    if all("cut" in line for line in lines):
        found["cut"] = 100 * sum(line["cut"] for line in lines) / len(lines)
    if args.bertscore:
        scored = bertscore(texts, titles, model=args.bertscore, rescale=args.rescale, device=str(policy.device))
        each["bertscore"] = scored["bertscore_each"]
        found |= {"bertscore": scored["bertscore"], "bertscore_model": scored["model"]}
    if args.zero_shot:
        other = read(args.zero_shot)
        if missing := answers.keys() - other.keys():
            raise PyargsError(f"{args.zero_shot} has no answer to {min(missing)[1]}: decode the same prompts unguided")
        ids = [[side[item]["tokens"] for item in answers] for side in (answers, other)]
        found["win_rate"] = win_rate(model, prompts, [line["user_id"] for line in lines], *ids)
        found["same_as_zero_shot"] = 100 * sum(a == b for a, b in zip(*ids, strict=True)) / len(ids[0])
    singles = []
    for i, (line, item) in enumerate(zip(lines, items, strict=True)):
        sources = [content for content in (item["prompt"], item["chosen"], item["rejected"]) if isinstance(content, str)]
        if not isinstance(item["prompt"], str):
            sources += [turn["content"] for turn in item["prompt"]]
        if getattr(model, "demonstrations", None) is not None:
            sources += [text for shown in model.demonstrations.of_user[line["user_id"]] for text in shown.values()]
        run, length = copied(line["text"], sources)
        singles.append(
            {
                **{name: line[name] for name in ("user_id", "pair_id", "text")},
                "digest": files.short_hash(line["text"]),
                "words": length,
                "copied": run,
                "quotes": quotes(line["text"], sources, WHOLE),
                **{name: round(v[i], 2) for name, v in each.items()},
            }
        )
    return {"generations": found, "answers": singles}


def _check_origin(args: argparse.Namespace, answers: dict, tuned: dict | None) -> None:
    """Raises PyargsError where the answers are known to be of another model, policy or weight, or of other settings than the
    weight was tuned with."""
    from pyargs import files
    from pyargs.errors import PyargsError
    from pyargs.lm import hub

    weights = {line.get("reward_weight") for line in answers.values()} - {None}
    if tuned and weights and weights != {tuned["reward_weight"]}:
        raise PyargsError(
            f"{args.generations} was made with reward_weight {min(weights)}, not {tuned['reward_weight']}: decode it again"
        )
    record = files.beside(args.generations, "stage.json")
    if record.exists():
        made = files.read_record(record)
        inputs, config = made["inputs"], made["config"]
        for name, own in (("model", files.sha256(args.model)), ("policy", hub.identity(args.policy))):
            if inputs.get(name, own) != own:
                raise PyargsError(f"{args.generations} was made with another {name}: its answers are not this one's")
        k = "all" if config.get("whole_vocabulary") else config.get("num_candidates")
        used = {"num_candidates": k, "eos_reward": config.get("eos_reward") or "before"} if args.tuned and weights else {}
        for name, other in used.items():
            if other != (own := tuned[name] or "before"):
                raise PyargsError(
                    f"{args.generations} was made with {name} {other}, and the weight was tuned with {own}: decode it again"
                )


def _guide(model, policy, rows, tuned: dict) -> dict:
    """Accuracies of a RewardModel or TokenReward alone and, with its weight, together with the policy."""
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
