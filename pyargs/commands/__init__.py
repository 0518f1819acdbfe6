"""Personalized reward-guided decoding."""

from __future__ import annotations

import argparse


def positive(word: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {word}")
    return int(word)


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The flags that say which data a command reads."""
    parser.add_argument("--data", required=required, help="a data set by name (pyargs data list), a file, or a built folder")
    parser.add_argument("--source", help="the file or folder of a named set that the package does not carry")
    parser.add_argument("--data-seed", type=int, help="seed of the held-out prompts (default 0)")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The flags that say which language model answers."""
    parser.add_argument("--policy", help="embedded name, local folder or hub name; not for models that answer by themselves")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "int8", "file"],
        help="of the policy (default float32); int8 and file, the blocks of a GGUF file as they are, for the CPU stack alone",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The flag that says what computes the answers."""
    parser.add_argument(
        "--backend",
        choices=["auto", "cpu", "cuda-graph", "eager"],
        default="auto",
        help="cpu: the CPU stack; cuda-graph: a captured step; eager: transformers itself; auto: the fastest that computes "
        "these models (default)",
    )


def add_model(parser: argparse.ArgumentParser, help: str, **more) -> None:
    """The arguments that say which trained model is meant. more: of the model's `add_argument`."""
    parser.add_argument("model", help=help, **more)
    parser.add_argument("--backbone", metavar="PATH", help="where the model's backbone lies now, if it was moved")


def load_data(args: argparse.Namespace):
    from pyargs import data

    options = {} if args.data_seed is None else {"seed": args.data_seed}
    return data.load(args.data, args.source, **options)


def rows_of(data, split: str):
    """The rows of a split. Raises PyargsError where it has none."""
    from pyargs.data import of_split
    from pyargs.errors import PyargsError

    rows = of_split(data, split)
    if not len(rows):
        raise PyargsError(f"no rows with split '{split}' (there are: {', '.join(sorted(set(data['split'])))})")
    return rows
