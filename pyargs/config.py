"""Dataclass <-> command line: every field is a flag, its help is the field's metadata."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing

from pyargs.errors import PyargsError


def option(default, help: str, **more):
    """A dataclass field with its help text (which cites where the default comes from)."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help, **more})
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check(config) -> None:
    """Raises PyargsError for a value that is not among a field's `choices` or below its `least`."""
    for field in dataclasses.fields(config):
        value, choices, least = getattr(config, field.name), field.metadata.get("choices"), field.metadata.get("least")
        if choices is not None and value not in choices:
            raise PyargsError(f"{field.name} is one of {', '.join(choices)}, not {value!r}")
        if least is not None and value is not None and value < least:
            raise PyargsError(f"{field.name} must be at least {least}, got {value}")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag for each field of the dataclass: --lora-rank 8, --freeze-backbone / --no-freeze-backbone, --seeds 1 2 3."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind, several = _kind(hints[field.name])
        shown = "" if default is None else f" (default: {default})"
        keywords = {
            "dest": field.name,
            "default": default,
            "help": field.metadata.get("help", "").replace("%", "%%") + shown,
        }
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
        else:
            choices = field.metadata.get("choices")
            parser.add_argument(flag, type=kind, nargs="+" if several else None, choices=choices, **keywords)


def from_args(config: type, args: argparse.Namespace):
    return config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(config)})


def _kind(hint) -> tuple[type, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


PROFILES = {
    # What `--profile` presets: every method on planted users and a tiny random model, in seconds.
    "smoke": {"data": "synthetic", "backbone": "tiny-random", "epochs": 1.0, "adapt_steps": 20},
}


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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the policy (default float32)")


def load_data(args: argparse.Namespace):
    from pyargs import data

    options = {} if args.data_seed is None else {"seed": args.data_seed}
    return data.load(args.data, args.source, **options)
