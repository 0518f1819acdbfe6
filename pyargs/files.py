"""Files between stages: written whole or not at all, each with the hash of what it was made from."""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyargs.config import check_kinds
from pyargs.errors import ELSEWHERE, PyargsError, explained, refusal

LINE = 1 << 24
"""The longest line that is read, in characters: a small .gz can hold a line that fills the memory."""
JSON = 1 << 28
"""The largest .json file that is read, in bytes: it is read in one piece."""
HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes the halves of a letter; alone they are none."""
UNFOLDED = 100
"""How many times its size a .gz that is read in one piece may unpack to (text: 3 to 20)."""


TUNED = "tuned.json"
"""In a model's folder: what `pyargs tune` found for each policy. It says nothing about what the model is."""


def sha256(path: str | Path) -> str:
    """SHA-256 of a file; of a folder, the hash of its files' names and hashes, without TUNED and what a run that writes it has
    beside it."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        settle(path)
    if not path.exists():
        raise PyargsError(f"{path} does not exist")
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if TUNED not in p.relative_to(path).as_posix() and p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    check_regular(path)
    with explained(f"{path} cannot be read"), path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(folder: str | Path) -> str:
    """Hash of what all users of a model share, so that adding users does not change it."""
    folder, digest = Path(folder), hashlib.sha256()
    for name in ("shared.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            digest.update(sha256(folder / name).encode())
    return digest.hexdigest()


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str):
    """The value of JSON text. Raises ValueError: not JSON, a key twice in one object, a number or a nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice in one object")
    return found


def check_regular(path: str | Path) -> None:
    """Raises PyargsError for a pipe or a device: one may be waited for, or read, without end."""
    if _kind(Path(path)) == "device":
        raise PyargsError(f"{path} is no regular file, but a pipe or a device: write what it gives to a file, and give that")


def read_json(path: str | Path):
    """The value of a .json file. Raises PyargsError: missing, too large, not JSON, no regular file."""
    try:
        check_regular(path)
        if Path(path).stat().st_size > JSON:
            raise PyargsError(f"{path} is larger than {JSON >> 20} MiB: no file that pyargs writes is")
        text = Path(path).read_text(encoding="utf-8")
        value = parse_json(text)
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # what cannot be written again is no text
        return value
    except FileNotFoundError as error:
        raise PyargsError(f"{path} does not exist") from error
    except (ValueError, OSError) as error:  # neither JSON nor UTF-8, a folder, not allowed
        raise PyargsError(f"{path} is not JSON: {error}") from error


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator:
    """The value of each line of a .jsonl or .jsonl.gz file. Raises PyargsError with file and line."""
    for number, line in read_lines(path):
        try:
            yield parse_json(line)
        except ValueError as error:
            raise PyargsError(f"{path}, line {number} is not JSON: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file, plain or .gz. Raises PyargsError: missing, damaged, a line without end."""
    number = 0
    try:
        with explained(f"{path} cannot be read"), _open_text(path) as stream:
            while line := stream.readline(LINE + 1):
                number += 1
                if len(line) > LINE:
                    raise PyargsError(
                        f"{path}, line {number} is longer than {LINE} characters: break it into rows, one a line"
                    )
                yield number, line
    except DAMAGED as error:
        raise PyargsError(f"{path} is damaged after line {number}, or not what its name says: {error}") from error


def read_text(path: str | Path) -> str:
    """All of a UTF-8 file, plain or .gz. Raises PyargsError: missing, damaged, a .gz that unfolds without end."""
    path = Path(path)
    try:
        with explained(f"{path} cannot be read"), _open_text(path) as stream:
            most = max(4 * LINE, UNFOLDED * path.stat().st_size)
            text = stream.read(most + 1)
    except DAMAGED as error:
        raise PyargsError(f"{path} is damaged, or not what its name says: {error}") from error
    if len(text) > most:
        raise PyargsError(f"{path} unfolds to more than {UNFOLDED} times its size: unpack it yourself if you trust it")
    return text


def _open_text(path: str | Path):
    check_regular(path)
    opener = gzip.open if str(path).endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: a byte order mark, as some editors write one, is no part of it


DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)


def read_tensors(file: str | Path) -> dict:
    """The tensors of a safetensors file, by name. Raises PyargsError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_regular(file)
        return load_file(file)
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        why = refusal(error) or str(error)
        raise PyargsError(f"{file} is missing or damaged ({why}): make it again; a file of the cache, remove") from error


# -- written whole or not at all ---------------------------------------------------------------------------------------
#
# New files are made in a temporary folder beside their place, `.NAME.xxxxxxxx`, which holds a lock file as long as its process
# lives. A folder that is replaced is moved there first, then the new one takes its place. Whenever the process is killed, one
# of the two is complete, and `settle` finishes the replacement.


@contextmanager
def writing(path: str | Path, replaceable: Iterable[str] = ()):
    """Gives a temporary path beside `path` and moves it there at the end: a killed run leaves the old one or the new one.

    A folder is replaced only if it holds nothing but files of the same names as the new one, or `replaceable` ones. A link
    stays: what it leads to is replaced. Modes stay, too. Raises PyargsError for what it would not replace, and where the
    system does not let it write.
    """
    path = _place(path)
    if path == Path.cwd() or path in Path.cwd().parents:
        raise PyargsError(f"'{path}' can not be replaced: name a file or a folder inside it")
    if _kind(path) not in (None, "file", "folder"):
        raise PyargsError(f"'{path}' is neither a file nor a folder: choose another place")
    with explained(f"{path} cannot be written", ELSEWHERE):
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        with _temporary(path) as scratch:
            new = scratch / path.name
            yield new
            there, made = _kind(path), _kind(new)
            if there and made and there != made:
                raise PyargsError(f"{path} is a {there}: name a {made}")
            if there == "folder":
                held = set()
                with suppress(FileNotFoundError):  # another process replaces it right now
                    held = {p.name for p in path.iterdir()}
                if foreign := held - {p.name for p in new.iterdir()} - set(replaceable):
                    raise PyargsError(f"{path} holds '{min(foreign)}', which is not ours to delete: choose another folder")
            _keep_modes(path, new)
            _put(new, path)


@contextmanager
def unchanged(folder: Path):
    """For reading the files of a folder one by one. Raises PyargsError where another process replaced it in between."""
    before = folder.stat()
    yield
    if not folder.exists() or (before.st_ino, before.st_mtime_ns) != (folder.stat().st_ino, folder.stat().st_mtime_ns):
        raise PyargsError(f"{folder} was replaced while it was read: load it again")


def settle(path: str | Path) -> None:
    """Removes what killed runs left beside `path`, and finishes a replacement that one had begun. It leaves living processes
    alone, and waits for a replacement of theirs."""
    path = _place(path)
    for _ in range(10):  # the next one may have begun
        if not _settle(path) or path.exists():
            return


def _settle(path: Path) -> bool:
    """One round of `settle`; whether an old folder was moved aside while nothing was in its place."""
    from filelock import FileLock, Timeout

    found = False
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    with suppress(OSError):  # no such folder, or one that may only be read
        for scratch in [one for one in path.parent.iterdir() if name.fullmatch(one.name)]:
            held = {one.name for one in scratch.iterdir()}
            if held and _lock(path) not in held:
                continue  # not ours, whatever it is called: ours is empty at first, and the lock goes last
            between = not path.exists() and any(one.startswith(_aside(path)) for one in held)
            found |= between
            with suppress(Timeout), FileLock(scratch / _lock(path), timeout=10 if between else 0):
                _clear(scratch, path)
    return found


@contextmanager
def _temporary(path: Path):
    from filelock import FileLock

    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        lock = FileLock(scratch / _lock(path))
        with suppress(FileNotFoundError, FileExistsError):  # filelock makes a folder that has just gone, or fails to
            lock.acquire()
        if (scratch / _lock(path)).exists():
            break
        lock.release()  # another process took the folder for a dead one's before it was locked
    try:
        yield scratch
    finally:
        _clear(scratch, path)
        lock.release()


def _put(new: Path, path: Path) -> None:
    """Moves `new` to `path`; a folder that is there goes to the side of `new` first."""
    if not new.is_dir():
        os.replace(new, path)
        return
    for attempt in itertools.count():  # another process may put its own there in between
        with suppress(FileNotFoundError):
            os.rename(path, new.with_name(f"{_aside(path)}{attempt}"))
        try:
            os.rename(new, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _clear(scratch: Path, path: Path) -> None:
    """Removes a temporary folder. If it holds the old folder and nothing has taken its place, the new one does."""
    new = scratch / path.name
    if not path.exists() and new.exists() and any(one.name.startswith(_aside(path)) for one in scratch.iterdir()):
        os.rename(new, path)
    with suppress(OSError):
        for one in [one for one in scratch.iterdir() if one.name != _lock(path)]:
            shutil.rmtree(one, ignore_errors=True) if one.is_dir() and not one.is_symlink() else one.unlink()
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_modes(path: Path, new: Path) -> None:
    """Gives `new`, and the files in it, the modes of those that they replace."""
    with suppress(FileNotFoundError):
        for old in [path, *(path.iterdir() if path.is_dir() else ())]:
            if (fresh := new if old == path else new / old.name).exists():
                shutil.copymode(old, fresh)


def _kind(path: Path) -> str | None:
    """The kind of file at a path, by a single look, since another process may replace it between two."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"  # or a pipe


def _place(path: str | Path) -> Path:
    """Where a path leads, with every link followed."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise PyargsError(f"{str(path)!r} is no path: {error}") from None


def _aside(path: Path) -> str:
    return f"{path.name}.old-"


def _lock(path: Path) -> str:
    return f"{path.name}.lock"


@contextmanager
def resumable(out: str | Path, kind: str, key):
    """The folder OUT.KIND-HASH, in which a killed run of these settings continues; it is removed at the end.

    Folders of killed runs with other settings are removed. Raises PyargsError while another process works in this folder.
    """
    from filelock import FileLock, Timeout

    folder = beside(out, f"{kind}-{short_hash(key)}")
    drop_resumable(out, kind, keep=folder)
    with explained(f"{folder} cannot be written", ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise PyargsError(f"another process is making {out}: wait for it, or choose another --out") from None
    with lock:
        try:
            yield folder
        except BaseException:
            if len(list(folder.iterdir())) == 1:  # the lock alone: nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def drop_resumable(out: str | Path, kind: str, keep: Path | None = None) -> None:
    """Removes all folders of `resumable` but `keep` in which no living process works."""
    from filelock import FileLock, Timeout

    out = Path(out)
    name = re.compile(rf"{re.escape(out.name)}\.{kind}-[0-9a-f]{{12}}")
    with suppress(OSError):
        for folder in [one for one in out.absolute().parent.iterdir() if name.fullmatch(one.name)]:
            if keep is None or folder.name != keep.name:
                with suppress(Timeout), FileLock(folder / ".lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


def provenance(seed: int | None = None) -> dict:
    """How a result was made: command, seed, versions, hardware, and the commit if there is a source tree."""
    import torch

    names = ("pyargs", "torch", "transformers", "peft", "datasets")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "versions": {**versions, "python": platform.python_version()},
        "hardware": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": _commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def stage_key(config: dict, inputs: dict[str, str]) -> dict:
    """The key of a stage: its settings and the hashes of its inputs. Stages with equal keys are the same."""
    return {"config": config, "inputs": inputs}


def finished(out: str | Path, key: dict) -> dict | None:
    """The record of a finished stage with this key. Otherwise None, and the stage is noted as begun.

    Records are beside the output, as OUT.stage.json. A killed stage has no finished record and is made again. Raises
    PyargsError when `out` holds something else, so that no result is overwritten by accident.
    """
    out = Path(out)
    path = _record(out)
    settle(out)
    settle(path)
    if path.exists():
        old = read_record(path)
        if old["finished"] and out.exists():
            if {name: old.get(name) for name in key} != json.loads(json.dumps(key)):
                raise PyargsError(f"{out} was made with other settings or inputs: choose another --out or remove it")
            return old
    elif out.exists():
        raise PyargsError(f"{out} exists and was not written by this command: choose another --out or remove it")
    write_json(path, {**key, "finished": False})
    return None


def read_record(path: str | Path) -> dict:
    """OUT.stage.json. Raises PyargsError where it is damaged."""
    found = read_json(path)
    check_kinds(found, {"finished": bool, "config": dict, "inputs": dict}, f"{path} is no record of a stage, remove it")
    return found


def record(out: str | Path, key: dict, /, **values) -> dict:
    """Notes a stage as finished; call it last."""
    done = {**key, "finished": True, **values}
    write_json(_record(Path(out)), done)
    return done


def beside(out: str | Path, name: str) -> Path:
    """A path next to an output, for files of the stage that are not its result."""
    if not Path(out).name:
        raise PyargsError(f"'{out}' can not be an output: name a file or a folder inside it")
    return Path(out).with_name(f"{Path(out).name}.{name}")


def short_hash(value) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _record(out: Path) -> Path:
    return beside(out, "stage.json")


def cache_dir() -> Path:
    """Where files are kept between runs: `$PYARGS_CACHE`, else `$XDG_CACHE_HOME/pyargs`, else `~/.cache/pyargs`."""
    own = os.environ.get("PYARGS_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyargs"
    except RuntimeError as error:
        raise PyargsError(
            "there is no home folder for the cache. Fix: set PYARGS_CACHE to a folder that can be written"
        ) from error
