"""Answer prompts for their users: pyargs decode MODEL --policy NAME --data ... --out generations.jsonl."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_backend, add_data, add_model, add_policy, positive

    add_model(parser, "folder of `pyargs train` or `pyargs adapt`")
    add_policy(parser)
    add_backend(parser)
    weight = parser.add_mutually_exclusive_group()
    weight.add_argument("--tuned", help="file of `pyargs tune`: its reward_weight, num_candidates and eos_reward")
    weight.add_argument("--strength", type=float, help="w in units of the model's reward_std (default: as tuned, else 1)")
    weight.add_argument("--reward-weight", type=float, help="raw w of eq. 1; 0 is the policy alone in the same loop")
    parser.add_argument("--split", default="query", help="split whose prompts are answered (default: query)")
    parser.add_argument("--limit", type=positive, help="only the first N prompts")
    parser.add_argument("--num-candidates", type=positive, help="k of ARGS (default: as tuned, else 10)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="no candidate less than so many times as likely as the likeliest (default 0)"
    )
    parser.add_argument("--reward-clip", type=float, metavar="C", help="clip rewards so that |w r| <= C (default: do not)")
    parser.add_argument(
        "--whole-vocabulary",
        action="store_true",
        help="GenARM: all tokens instead of the k candidates; with --do-sample its own rule",
    )
    parser.add_argument("--best-of", type=positive, metavar="N", help="best of N samples instead of guidance")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="length of an answer (default 64)")
    parser.add_argument("--batch-size", type=positive, default=8, help="prompts answered at a time (default 8)")
    parser.add_argument("--do-sample", action="store_true", help="sample instead of the argmax")
    parser.add_argument(
        "--temperature", type=float, help="temperature of the sampling (default: 0.7 among a head's candidates, else 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument(
        "--eos-reward",
        choices=["before", "state"],
        help="what a stop token earns: the reward of the text "
        "before it, or of the state behind it, on which no head is trained (default: as tuned, else "
        "before)",
    )
    parser.add_argument("--out", required=True, help="JSONL file, one answer a line")
    parser.add_argument("--on", choices=["ray"], help="workers of a Ray cluster, in place of this process alone")
    parser.add_argument("--address", help="of the cluster (default: that of RAY_ADDRESS, or one of this machine alone)")
    parser.add_argument("--num-cpus", type=positive, help="threads of each worker on Ray (default 1)")
    parser.add_argument("--num-gpus", type=int, help="GPUs of each worker on Ray (default: 1 if the cluster has some)")
    add_data(parser)


def run(args: argparse.Namespace) -> dict:
    import time

    from pyargs import files, tuned
    from pyargs.commands import load_data, rows_of
    from pyargs.data import content_hash
    from pyargs.errors import PyargsError
    from pyargs.lm import hub
    from pyargs.models.folder import locate

    if not args.on and (args.address, args.num_cpus, args.num_gpus) != (None, None, None):
        raise PyargsError("--address, --num-cpus and --num-gpus are of a cluster: add --on ray")
    data = load_data(args)
    rows = rows_of(data, args.split)
    unique = {(row["user_id"], str(row["prompt"])): row for row in rows}
    items = list(unique.values())[: args.limit]
    weight = args.reward_weight
    if args.tuned:
        weight = _follow(args, tuned.read(args.tuned, args.model), args.tuned)
    if args.best_of or args.policy is None:
        if weight is not None or args.strength is not None:
            raise PyargsError(
                "--tuned, --reward-weight and --strength are for a model that guides the policy's steps: leave them out for "
                "--best-of and for a model that answers by itself"
            )
    elif weight is None and args.strength is None:  # what was tuned for this policy stands beside the model
        found = tuned.noted(locate(args.model), args.policy, args.dtype)
        weight = None if found is None else _follow(args, found, f"{args.model} for {args.policy}")
    if args.on:
        from pyargs import ray

        ray.connect(args.address)
        args.num_gpus = min(ray.gpus(), 1) if args.num_gpus is None else args.num_gpus
        each = {"num_cpus": args.num_cpus or 1, "num_gpus": args.num_gpus}
        backend, weight, wish = ray.with_model(settled, args.model, args, weight, **each)
    else:
        engine = engine_of(args.model, args)
        backend, weight, wish = settled_with(engine, args, weight)
    if not args.whole_vocabulary:
        args.num_candidates = wish["num_candidates"]
    settings = {name: getattr(args, name) for name in (
        "policy", "dtype", "split", "limit", "num_candidates", "max_new_tokens", "batch_size", "do_sample", "temperature",
        "seed", "whole_vocabulary", "best_of", "eos_reward",
    )}  # fmt: skip
    settings |= {name: value for name in ("min_p", "reward_clip") if (value := getattr(args, name))}
    key = files.stage_key(
        {"stage": "decode", "reward_weight": weight, **settings, "backend": backend},
        {"data": content_hash(rows), "model": files.sha256(args.model), "policy": hub.identity(args.policy)},
    )
    if done := files.finished(args.out, key):
        return {**done, "already_done": True}

    started = time.perf_counter()
    prompts, users = [row["prompt"] for row in items], [row["user_id"] for row in items]
    if args.on:
        answers = _answers_of_workers(args, items, dict(backend=backend, **each), dict(reward_weight=weight, **wish))
    else:
        answers = engine.generate(prompts, users, reward_weight=weight, seed=args.seed, progress="decode", **wish)
    seconds = time.perf_counter() - started
    lines = []
    for row, answer in zip(items, answers, strict=True):
        line = {
            "user_id": row["user_id"],
            "pair_id": row.get("pair_id"),
            "text": answer.text,
            "tokens": answer.tokens,
            "reward_weight": weight,
            "cut": answer.finish_reason == "length",
            "backend": answer.backend,
        }
        if weight is not None:  # what guided each step
            line |= {"rewards": [round(reward, 5) for reward in answer.rewards], "slots": answer.slots}
        lines.append(line)
    files.write_jsonl(args.out, lines)
    tokens = sum(len(line["tokens"]) for line in lines)
    return files.record(
        args.out,
        key,
        answers=len(lines),
        tokens=tokens,
        seconds=round(seconds, 2),
        tokens_per_second=round(tokens / seconds, 2),
        provenance=files.provenance(args.seed),
    )


def engine_of(model: str, args: argparse.Namespace):
    """The engine of a command line. model: its folder, wherever it lies now."""
    from pyargs.decode.engine import Engine
    from pyargs.decode.pair import load_pair

    pair = load_pair(args.policy, model, dtype=args.dtype, backbone=args.backbone)
    return Engine(*pair, **_options(args), backend=args.backend)


def _options(args: argparse.Namespace) -> dict:
    return dict(max_rows=args.batch_size, best_of=args.best_of or 0, eos_reward=args.eos_reward)


def settled(model: str, args: argparse.Namespace, weight: float | None) -> tuple:
    """`settled_with` the engine that this process makes."""
    return settled_with(engine_of(model, args), args, weight)


def settled_with(engine, args: argparse.Namespace, weight: float | None) -> tuple[str, float | None, dict]:
    """What an engine makes of the flags: its backend, the raw weight, and what is wished of each prompt."""
    if engine.pair.guided and weight is None:
        weight = engine.raw_weight(args.strength)
    candidates = "all" if args.whole_vocabulary else args.num_candidates
    if candidates is None and weight is not None:
        candidates = 10
    wish = {"max_new_tokens": args.max_new_tokens, "num_candidates": candidates, "temperature": _temperature(args, engine)}
    return engine.backend, weight, wish | {"min_p": args.min_p, "reward_clip": args.reward_clip}


def _answers_of_workers(args: argparse.Namespace, items: list[dict], options: dict, wish: dict) -> list:
    """As `Engine.generate` gives them, of the workers' engines."""
    from types import SimpleNamespace

    from pyargs import ray
    from pyargs.decode.request import numbered

    rows = [
        {"number": n, "prompt": item["prompt"], "user_id": item["user_id"], "seed": numbered(args.seed, n)}
        for n, item in enumerate(items)
    ]
    options |= dict(policy=args.policy, dtype=args.dtype, backbone=args.backbone, **_options(args))
    found = ray.all_rows(ray.map_prompts(ray.dataset(rows, args.batch_size), args.model, **options, **wish))
    return [SimpleNamespace(**row) for row in sorted(found, key=lambda row: row["number"])]


def _temperature(args: argparse.Namespace, engine) -> float:
    """0 is the greedy choice. Raises PyargsError for flags of sampling that would do nothing."""
    from pyargs.decode.request import sampling_temperature
    from pyargs.errors import PyargsError
    from pyargs.models.reward_model import RewardModel

    if args.best_of and args.do_sample:
        raise PyargsError("--best-of samples anyway: leave --do-sample out")
    if not (args.best_of or args.do_sample):
        if args.temperature is not None:
            raise PyargsError("--temperature is of sampling: add --do-sample, or leave it out")
        return 0.0
    own = 0.7 if engine.pair.guided and isinstance(engine.pair.model, RewardModel) else 1.0
    return sampling_temperature(own if args.temperature is None else args.temperature)


def _follow(args: argparse.Namespace, tuned: dict, source: str) -> float:
    """The tuned weight, and the settings that it was tuned with in the place of flags that are not given.

    Raises PyargsError where a flag contradicts them.
    """
    from pyargs.errors import PyargsError

    for name, own in (("num_candidates", tuned["num_candidates"]), ("eos_reward", tuned["eos_reward"] or "before")):
        flag = "--" + name.replace("_", "-")
        if getattr(args, name) not in (None, own):
            raise PyargsError(
                f"{source} was tuned with other settings, {flag} {own}: leave {flag} out, tune again, or give --reward-weight"
            )
        if getattr(args, name) is None:
            setattr(args, name, tuned[name])
    if args.whole_vocabulary:
        raise PyargsError(
            f"{source} was tuned with --num-candidates {args.num_candidates}: leave --whole-vocabulary out, or give "
            "--reward-weight"
        )
    return tuned["reward_weight"]
