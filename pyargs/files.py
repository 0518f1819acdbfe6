"""Files between stages: written whole or not at all, each with the hash of what it was made from."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyargs.errors import PyargsError


def sha256(path: str | Path) -> str:
    """SHA-256 of a file; of a folder, the hash of its files' names and hashes."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        raise PyargsError(f"{path} does not exist")
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
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


def read_tuned(file: str | Path, model: str | Path) -> dict:
    """The file of `pyargs tune` for this model. Raises PyargsError if it is another file, or another model's."""
    tuned = read_json(file)
    if not isinstance(tuned, dict) or not {"reward_weight", "centre", "model"} <= set(tuned):
        raise PyargsError(f"{file} is no file of `pyargs tune`")
    if tuned["model"] != weights_hash(model):
        raise PyargsError(f"{file} was tuned for another model than {model}: run `pyargs tune {model}`")
    return tuned


def write_json(path: str | Path, value) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PyargsError(f"{path} does not exist") from error
    except (ValueError, RecursionError, OSError) as error:  # neither JSON nor UTF-8, nested without end, a folder
        raise PyargsError(f"{path} is not JSON: {error}") from error


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with writing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[dict]:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise PyargsError(f"{path}, line {number} is not JSON: {error}") from error


def read_tensors(file: str | Path) -> dict:
    """The tensors of a safetensors file, by name. Raises PyargsError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise PyargsError(f"{file} is missing or damaged ({error}): make it again; a file of the cache, remove") from error


@contextmanager
def writing(path: str | Path, replaceable: Iterable[str] = ()):
    """Gives a temporary path beside `path` and moves it there at the end, so that a killed run leaves no half file.

    A folder is replaced only if it holds nothing but files of the same names as the new one, or `replaceable` ones.
    """
    path = Path(path).absolute()
    if path.name in ("", "..") or path == Path.cwd():
        raise PyargsError(f"'{path}' can not be replaced: name a file or a folder inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch / path.name
        folder = (scratch / path.name).is_dir()
        if path.exists() and path.is_dir() != folder:
            raise PyargsError(f"{path} is a {'file' if folder else 'folder'}: name a {'folder' if folder else 'file'}")
        if path.is_dir():
            foreign = {p.name for p in path.iterdir()} - {p.name for p in (scratch / path.name).iterdir()} - set(replaceable)
            if foreign:
                raise PyargsError(f"{path} holds '{min(foreign)}', which is not ours to delete: choose another folder")
            shutil.rmtree(path)
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def provenance(seed: int | None = None) -> dict:
    """How a result came about: command, seed, versions, hardware, commit of the source tree where there is one."""
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
    """What makes a stage the same stage: its settings and the hashes of what it reads."""
    return {"config": config, "inputs": inputs}


def finished(out: str | Path, key: dict) -> dict | None:
    """The record of a stage that was done with the same key, or None: then the stage is noted as begun, and may be made.

    Records stand beside the output, as OUT.stage.json. A stage that was killed has no finished record and is made again.
    Raises PyargsError when `out` holds something else, so that no result is overwritten unasked.
    """
    out = Path(out)
    path = _record(out)
    if path.exists():
        old = read_json(path)
        if old["finished"] and out.exists():
            if {name: old.get(name) for name in key} != json.loads(json.dumps(key)):
                raise PyargsError(f"{out} was made with other settings or inputs: choose another --out or remove it")
            return old
    elif out.exists():
        raise PyargsError(f"{out} exists and was not written by this command: choose another --out or remove it")
    write_json(path, {**key, "finished": False})
    return None


def record(out: str | Path, key: dict, /, **values) -> dict:
    """Notes a stage as finished; call it last."""
    done = {**key, "finished": True, **values}
    write_json(_record(Path(out)), done)
    return done


def beside(out: str | Path, name: str) -> Path:
    """A path next to an output, for what belongs to the stage but not to its result."""
    return Path(out).with_name(f"{Path(out).name}.{name}")


def short_hash(value) -> str:
    """A few characters that tell JSON values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _record(out: Path) -> Path:
    return beside(out, "stage.json")
