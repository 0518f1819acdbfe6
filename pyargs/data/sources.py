"""Where the rows of a data set come from: local files in the original layout, downloads that resume, and the hub.

`source="hub"` means the official place of a set; anything else is a local file or folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pyargs.errors import PyargsError, explained, extra, no_memory
from pyargs.files import cache_dir, check_regular, parse_json, read_lines, read_text, sha256, write_text
from pyargs.progress import progress_bar

BLOCK = 1 << 20


def local(source: str | Path) -> Path:
    """The source as a path. Raises PyargsError if nothing is there."""
    path = Path(source)
    if not path.exists():
        raise PyargsError(f"No file or folder {path}. A source is a local path, or 'hub' for the set's official place.")
    return path


def one_of(folder: Path, stem: str, *suffixes: str) -> Path:
    """The file `stem` + one of the suffixes, plain or gzipped. Raises PyargsError, naming what was looked for."""
    names = [stem + suffix + gz for suffix in suffixes for gz in ("", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = "is missing" if not found else f"is there more than once: {', '.join(path.name for path in found)}"
        raise PyargsError(f"{folder}: {names[0]} (or {', '.join(names[1:])}) {what}.")
    return found[0]


def read_json(path: Path):
    """The value of a .json or .json.gz file. Raises PyargsError, naming the file, if it is damaged."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise PyargsError(f"{path.name} is damaged or not JSON: {error}") from None


def rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of JSON Lines (.jsonl or .json, plain or .gz), of a JSON array (.json) or of parquet.

    The place names file and row. Raises PyargsError, which begins with it: not JSON, not an object, a truncated file, another
    kind of file.
    """
    check_regular(path)
    if not path.is_file():
        raise PyargsError(f"No file {path}.")
    kind = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if kind == ".parquet":
        yield from _parquet(path)
        return
    if kind not in (".jsonl", ".json"):
        raise PyargsError(
            f"{path.name}: a file of rows is .jsonl, .json (an object a line, or an array), either with .gz, or .parquet."
        )
    first = next((line for _, line in read_lines(path) if line.strip()), "") if kind == ".json" else ""
    if first.lstrip().startswith("["):
        found = ((f"{path.name}, row {number}", row) for number, row in enumerate(read_json(path), 1))
    else:
        found = _lines(path)
    for place, row in found:
        if not isinstance(row, dict):
            raise PyargsError(f"{place}: not a JSON object.")
        yield place, row


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in read_lines(path):
        place = f"{path.name}, line {number}"
        if line.strip():
            try:
                yield place, parse_json(line)
            except ValueError as error:
                raise PyargsError(f"{place}: not JSON ({error}).") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise PyargsError(f"{path.name}: the column '{twice[0]}' stands twice.")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # of these UnicodeDecodeError
        if no_memory(error):
            raise
        raise PyargsError(f"{path.name} is damaged after row {number}, or no parquet: {error}") from None


def from_hub(repo: str, patterns: list[str], *, revision: str | None = None) -> Path:
    """A data set of the hub as a local folder; huggingface_hub resumes, checks and shows progress. Raises PyargsError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except OSError as error:
        raise PyargsError(
            f"The hub's data set {repo} cannot be reached ({str(error).splitlines()[0]}). Fix: check the network or "
            f"HF_ENDPOINT, or get {', '.join(patterns)} of https://huggingface.co/datasets/{repo} elsewhere and give the "
            "folder as --source."
        ) from None


def download(url: str, name: str) -> Path:
    """A file of the web in `$PYARGS_CACHE/data/NAME`, fetched once; an interrupted download continues.

    Its SHA-256 is noted beside it at the first download and compared at every use. Raises PyargsError: no connection, an
    answer that is not the file, a file that has changed since.
    """
    path = cache_dir() / "data" / name
    noted = path.with_name(path.name + ".sha256")
    if not (path.is_file() and noted.is_file()):
        with explained(f"{url} cannot be kept in the cache"):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            _fetch(url, part)
            write_text(noted, sha256(part) + "\n")
            part.replace(path)
    if sha256(path) != noted.read_text().strip():
        raise PyargsError(
            f"{path} is not what was downloaded (its SHA-256 differs from {noted.name}). Fix: remove both files."
        )
    return path


def _fetch(url: str, part: Path) -> None:
    with extra("prepare", "a download"):
        import requests

    have = part.stat().st_size if part.exists() else 0
    try:
        # As it is: a compressed answer would have another length than the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
            if answer.status_code == 416:  # nothing is left to send
                return
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0  # a server without ranges sends all of it again
            total = have + int(answer.headers.get("Content-Length", 0)) or None
            with (
                open(part, "ab" if have else "wb") as file,
                progress_bar(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
            ):
                for block in answer.iter_content(BLOCK):
                    file.write(block)
                    bar.update(len(block))
        if total is not None and part.stat().st_size != total:
            raise OSError(f"{part.stat().st_size} of {total} bytes came")
    except (requests.RequestException, OSError) as error:
        raise PyargsError(
            f"{url} cannot be fetched ({error}). Fix: check the network and run the command again, which goes on where it "
            "was; or get the file elsewhere and give its folder as --source."
        ) from None
