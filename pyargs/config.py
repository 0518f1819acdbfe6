"""Dataclass <-> command line: every field is a flag, its help is the field's metadata."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import types
import typing

from pyargs.errors import PyargsError


def option(default, help: str, **more):
    """A dataclass field with its help text (which cites where the default comes from)."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help, **more})
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check_fields(config) -> None:
    """Raises PyargsError for a value of another kind than its field's, not among its `choices` or below its `least`."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, choices, least = getattr(config, field.name), field.metadata.get("choices"), field.metadata.get("least")
        if not _is(value, hints[field.name]):
            kind = getattr(hints[field.name], "__name__", hints[field.name])
            raise PyargsError(f"{field.name} must be {kind}, not {_shown(value)}")
        if choices is not None and value not in choices:
            raise PyargsError(f"{field.name} is one of {', '.join(choices)}, not {value!r}")
        if least is not None and value is not None and value < least:
            raise PyargsError(f"{field.name} must be at least {least}, got {value}")


def check_kinds(values, kinds: dict[str, object], where: str) -> None:
    """Raises PyargsError, which begins with `where`, unless `values` is a dict with a value of its kind under each name.

    kinds: by name, a type, X | None, list[X] or dict[str, X]. A whole number is a float too; True is no number; NaN neither.
    """
    if not isinstance(values, dict):
        raise PyargsError(f"{where}: an object with {', '.join(kinds)} is needed, not {_shown(values)}")
    if missing := [name for name in kinds if name not in values]:
        raise PyargsError(f"{where}: {', '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing")
    for name, kind in kinds.items():
        if not _is(values[name], kind):
            raise PyargsError(f"{where}: '{name}' must be {getattr(kind, '__name__', kind)}, not {_shown(values[name])}")


def _is(value, kind) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(name, parts[0]) and _is(one, parts[1]) for name, one in value.items())
    if origin is not None:
        return True  # what a method file may have; nothing here is described by it
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    kind = numbers.Integral if kind is int else kind  # numpy's are numbers too
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _shown(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


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


TINY = {"data": "synthetic", "backbone": "tiny-random", "epochs": 1.0, "adapt_steps": 20}
"""Presets of `pyargs train METHOD --tiny`: any method on planted users and a tiny random model, in seconds."""
