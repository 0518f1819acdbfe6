"""Train a method on the train users' pairs: pyargs train METHOD --data NAME_OR_FILE --out FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from dataclasses import fields

    from pyargs.commands import add_data
    from pyargs.config import TINY, add_options
    from pyargs.training import hooks

    # A first look at argv tells the method, whose fields are the other flags, and whether --tiny presets some of them.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("method", nargs="?")
    first.add_argument("--tiny", action="store_true")
    for flag in ("--out", "--data", "--source", "--data-seed"):
        first.add_argument(flag)
    seen = first.parse_known_args(argv)[0]
    name, preset = seen.method, TINY if seen.tiny else {}

    parser.add_argument(
        "method", help=f"one of {', '.join(hooks.names())}, or a .py file; `pyargs train METHOD --help` lists its flags"
    )
    parser.add_argument("--out", required=not preset, help="folder for the model; a killed training with LoRA continues there")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, with sizes, and stop")
    parser.add_argument(
        "--tiny", action="store_true", help="a trial: planted users, a tiny random model and few steps, in output/tiny"
    )
    parser.add_argument(
        "--report-to",
        nargs="+",
        metavar="TRACKER",
        default=(),
        help="tell losses and held-out accuracy as it goes: tensorboard (files in OUT.reports), trackio, wandb ...",
    )
    add_data(parser, required=not preset)
    if name:
        config = hooks.method(name).Config
        add_options(parser.add_argument_group(f"method {name}"), config)
        own = {field.name for field in fields(config)} | {"data"}
        out = f"output/tiny/{Path(name).stem}"
        parser.set_defaults(**{key: value for key, value in preset.items() if key in own}, **({"out": out} if preset else {}))


def run(args: argparse.Namespace) -> dict | None:
    """Of several processes the first alone reads and writes the stage's files, and returns its record."""
    from dataclasses import asdict

    from pyargs import files, learn
    from pyargs.commands import load_data
    from pyargs.config import from_args
    from pyargs.data import content_hash, of_split
    from pyargs.lm import hub
    from pyargs.training import hooks, processes
    from pyargs.training.config import epochs

    processes.start()

    recipe = hooks.method(args.method)
    config = from_args(recipe.Config, args)
    data = load_data(args)
    rows = of_split(data, "train")
    key = files.stage_key(
        {"stage": "train", "method": args.method, **asdict(config)},
        {
            "data": content_hash(data),
            "backbone": hub.identity(config.backbone),
            "method": hub.identity(args.method),
        },
    )
    plan = {
        "method": args.method,
        "backbone": config.backbone,
        "frozen": getattr(config, "freeze_backbone", False),
        "pairs": len(rows),
        "users": len(set(rows["user_id"])),
        "steps": round(epochs(config) * -(-len(rows) // config.batch_size)) if recipe.loss else 0,
        "out": args.out,
    }
    first = processes.number() == 0
    if args.dry_run:
        return plan if first else None
    if done := processes.of_first(lambda: files.finished(args.out, key)):
        if first:
            files.drop_resumable(args.out, "checkpoints")
        return {**done, "already_done": True} if first else None
    # Its name holds the stage's key: a checkpoint of other settings or data is never continued.
    with processes.within_first(lambda: files.resumable(args.out, "checkpoints", key)) as checkpoints:
        report = dict(report_to=args.report_to, report_folder=f"{args.out}.reports")
        model = learn.train(args.method, data, config, checkpoints=checkpoints, **report)
        if not first:
            return None
        model.save_pretrained(args.out)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return files.record(
            args.out,
            key,
            **plan,
            trained_parameters=trained,
            held_out=learn.held_out(model, data),
            provenance=files.provenance(config.seed),
        )
