"""Choose the reward weight on the seen users' held-out pairs: pyargs tune MODEL --policy NAME --data ... --out FILE.

What it finds stands beside the model, too, for each policy: `pyargs decode` uses it where no weight is given.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyargs.commands import add_data, add_model, add_policy
    from pyargs.config import add_options
    from pyargs.tune import Tuning

    add_model(parser, "folder of `pyargs train` or `pyargs adapt`")
    add_policy(parser)
    parser.add_argument("--out", required=True, help="JSON file for the grid and the chosen weight")
    add_options(parser, Tuning)
    add_data(parser)


def run(args: argparse.Namespace) -> dict:
    from dataclasses import asdict

    from pyargs import files, tuned
    from pyargs.commands import load_data
    from pyargs.config import from_args
    from pyargs.data import content_hash, of_split
    from pyargs.decode.pair import load_pair
    from pyargs.lm import hub
    from pyargs.models.folder import locate
    from pyargs.tune import BEYOND, STEP, Tuning, engine_for, tune

    config = from_args(Tuning, args)
    # Only the seen users' held-out pairs may decide; the other rows never get near the choice.
    rows = of_split(load_data(args), "train_test")
    policy, model = load_pair(args.policy, args.model, dtype=args.dtype, backbone=args.backbone)
    engine = engine_for(policy, model, config)
    settings = asdict(config) | {"backend": engine.backend}
    key = files.stage_key(
        {"stage": "tune", "policy": args.policy, "dtype": args.dtype, "beyond": [STEP, BEYOND], **settings},
        {"data": content_hash(rows), "model": files.sha256(args.model), "policy": hub.identity(args.policy)},
    )
    beside = lambda found: tuned.note(locate(args.model), args.policy, args.dtype, found)  # noqa: E731
    if done := files.finished(args.out, key):
        beside(files.read_json(args.out))
        return {**done, "already_done": True}
    chosen = {"model": files.weights_hash(args.model), **tune(engine, rows, config)}
    files.write_json(args.out, chosen)
    beside(chosen)
    return files.record(args.out, key, **chosen, provenance=files.provenance(config.seed))
