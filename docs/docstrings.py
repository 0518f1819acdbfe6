"""For the API page: a docstring's line that begins with an argument's name and a colon becomes an item of a list."""

from __future__ import annotations

import re

import griffe


def as_list(text: str, names: set[str]) -> str:
    """The text with its lines `name: what it is` as items. A line that goes on from an item stays in it."""
    lines, inside = [], False
    for line in text.split("\n"):
        begins = re.match(r"(\w+(?:, \w+)*): ", line)
        if begins and set(begins[1].split(", ")) <= names:
            if not inside and lines and lines[-1]:
                lines.append("")
            named = ", ".join(f"`{name}`" for name in begins[1].split(", "))
            line, inside = f"- {named}: {line[begins.end() :]}", True
        elif not line.strip():
            inside = False
        elif inside and line.startswith("Raises "):  # a sentence of its own
            lines.append("")
            inside = False
        elif inside:
            line = f"  {line}"
        lines.append(line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is None:
            return
        names = set()
        if obj.is_function:
            names = {parameter.name.strip("*") for parameter in obj.parameters}
        elif obj.is_class:
            names = {parameter.name.strip("*") for parameter in obj.parameters} | set(obj.members)
        obj.docstring.value = as_list(obj.docstring.value, names)
