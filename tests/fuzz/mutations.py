"""Valid artefacts, spoilt: JSON values, safetensors files, bytes, and folders of these. All chance comes from one Random."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**9, 10**15, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "a\nb", "\ud800", "\0", "../../x", "/dev/zero", "x" * 5000, "1", "trap", "trap.Trap", "trap--trap.Trap", "a/b"),
    *([], {}, [None], [[]], {"x": {"y": []}}, {"x": "x"}, ["x"], [0], [10**9, 10**9]),
)
NUMBERS = (0, 1, 2, 3, 0xFF, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value within a JSON value, its own first."""
    yield path
    for name, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, name))


def at(value, path: tuple):
    for name in path:
        value = value[name]
    return value


def json_value(random: Random, valid, more: tuple = ()):
    """A copy of a JSON value with one to three changes: a value replaced, taken out, doubled, moved, or its number or text
    another. more: values to put in beside VALUES."""
    value = copy.deepcopy(valid)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        everything = list(places(value))
        path = random.choice(everything)
        if not path:
            if random.random() < 0.05:
                return random.choice(VALUES)
            continue
        parent, name = at(value, path[:-1]), path[-1]
        change = random.choice(("put", "put", "take", "double", "move", "nudge", "nudge"))
        if change == "put":
            parent[name] = copy.deepcopy(random.choice((*VALUES, *more, *more)))
        elif change == "take":
            del parent[name]
        elif change == "double" and isinstance(parent, list):
            parent.insert(random.randrange(len(parent) + 1), copy.deepcopy(parent[name]))
        elif change == "double":
            parent[random.choice(("x", f"{name}s", str(name).upper(), "auto_map", "_x"))] = copy.deepcopy(parent[name])
        elif change == "move":
            parent[name] = copy.deepcopy(at(value, random.choice(everything)))
        else:
            parent[name] = nudged(random, parent[name])
    return value


def nudged(random: Random, value):
    """A value of the same kind, not far away."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)))
    if isinstance(value, float):
        return random.choice((-value, value * 1e30, value + 1, int(value) if abs(value) < 1e300 else 0, str(value)))
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return value[:cut] + random.choice(("", "\n", "\ud800", "é", " ", "x" * 300, "/", "<|im_end|>")) + value[cut:]
    return list(value) * 2 if isinstance(value, list) else dict(list(value.items())[1:])


def json_bytes(random: Random, valid, more: tuple = ()) -> bytes:
    """A changed value as a file, sometimes with its bytes changed too."""
    content = json.dumps(json_value(random, valid, more)).encode()
    return some_bytes(random, content) if random.random() < 0.15 else content


def some_bytes(random: Random, content: bytes) -> bytes:
    """Bytes changed in one to three places: a few of them, a number that counts something, a part taken out, doubled, cut."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        start = random.randrange(len(content) + 1)
        if random.random() < 0.5:  # where heads are
            start = min(start, random.randrange(64))
        end = min(len(content), start + random.choice((1, 2, 4, 8, 16, 100)))
        change = random.choice(("flip", "flip", "number", "number", "random", "cut", "take", "double", "zero"))
        if change == "flip" and start < len(content):
            content[start] ^= 1 << random.randrange(8)
        elif change == "number":
            kind, size = random.choice((("<I", 4), ("<Q", 8)))
            content[start : start + size] = struct.pack(kind, random.choice(NUMBERS) % 2 ** (8 * size))
        elif change == "random":
            content[start:end] = bytes(random.randrange(256) for _ in range(end - start))
        elif change == "cut":
            del content[start:]
        elif change == "take":
            del content[start:end]
        elif change == "double":
            content[start:start] = content[start:end]
        elif change == "zero":
            content[start:end] = bytes(end - start)
    return bytes(content)


def tensors_bytes(random: Random, content: bytes) -> bytes:
    """A safetensors file whose head says something else, whose tensors are others, or whose bytes are."""
    change = random.choice(("head", "head", "numbers", "bytes"))
    size = struct.unpack("<Q", content[:8])[0]
    head, data = content[8 : 8 + size], bytearray(content[8 + size :])
    if change == "bytes":
        return some_bytes(random, content)
    if change == "numbers":
        for _ in range(random.choice((1, 2, 3)) if len(data) > 3 else 0):
            place = random.randrange(len(data) // 4) * 4
            data[place : place + 4] = struct.pack("<f", random.choice((float("nan"), float("inf"), 3e38, -1e30, 0.0, 1e-40)))
    else:
        found = json.loads(head)
        more = ([10**9, 0], [0], [2**62, 2**62, 0], [0, 10**12], "I64", "BOOL", "F64", "BF16", "F16")
        head = json.dumps(json_value(random, found, more)).encode()
        head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + bytes(data)


def spoil(random: Random, folder: Path, whole: dict[str, bytes], more: tuple = (), only: Callable = lambda name: True) -> str:
    """Writes the files of a folder, one or two of them changed; says which."""
    changed = []
    names = [name for name in sorted(whole) if only(name)]
    for name in {random.choice(names) for _ in range(random.choice((1, 1, 2)))}:
        file, content = folder / name, whole[name]
        if file.is_dir():
            file.rmdir()
        if random.random() < 0.03:
            file.unlink(missing_ok=True)
            changed.append(f"{name} missing")
            if random.random() < 0.3:
                file.mkdir()
            continue
        if name.endswith(".json"):
            new = json_bytes(random, json.loads(content), more)
        elif name.endswith(".safetensors"):
            new = tensors_bytes(random, content)
        else:
            new = some_bytes(random, content)
        file.write_bytes(new)
        changed.append(f"{name} {new[:300]!r}")
    return "; ".join(changed)


def mend(folder: Path, whole: dict[str, bytes]) -> None:
    """Writes what `spoil` changed as it was, and takes away what is not of the folder."""
    for file in folder.iterdir():
        if file.is_dir():
            file.rmdir()
        elif file.name not in whole:
            file.unlink()
    for name, content in whole.items():
        file = folder / name
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
