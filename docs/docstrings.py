"""For the API page: in a docstring, `name: what it is` becomes an item of a list where the name is an argument's."""

from __future__ import annotations

import re

import griffe


def as_list(text: str, names: set[str] | None) -> str:
    """The text with its arguments as items. names: those of the arguments, None where any word may be one."""
    return "\n\n".join(_paragraph(paragraph, names) for paragraph in text.split("\n\n"))


def _paragraph(text: str, names: set[str] | None) -> str:
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if re.match(r"\w+(, \w+)*: ", line) and _known(line, names)), None)
    if first is None or any(line.startswith("    ") for line in lines):
        return text
    parts, items, after = re.split(r"(?:^|(?<=[.;])\s)(?=\w+(?:, \w+)*: )", "\n".join(lines[first:])), [], ""
    for part in filter(None, parts):
        if not _known(part, names):
            items[-1] += f" {part}"
            continue
        items.append(part)
    items[-1], cut, rest = re.sub(r"\.\s(?=(?:Returns|Raises) )", ".\0", items[-1], count=1).partition("\0")
    if cut:
        after = f"\n\n{rest}"
    listed = (re.sub(r"^[\w, ]+", lambda names: f"`{names[0]}`", " ".join(item.split())) for item in items)
    return "\n".join([*lines[:first], "", *(f"- {item}" for item in listed)]) + after


def _known(text: str, names: set[str] | None) -> bool:
    return text[0].islower() if names is None else set(text.partition(":")[0].split(", ")) <= names


class Arguments(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        names = set()
        if obj.is_function or obj.is_class:
            names = {parameter.name.strip("*") for parameter in obj.parameters}
        if obj.is_class:
            names |= set(obj.members)
        elif obj.is_function and any(parameter.kind is griffe.ParameterKind.var_keyword for parameter in obj.parameters):
            names = None
        obj.docstring.value = as_list(obj.docstring.value, names)
