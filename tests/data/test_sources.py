"""Sources: rows that name their place, damage, downloads that go on where they broke off."""

from __future__ import annotations

import pytest
from rows import write

from pyargs.data import sources
from pyargs.errors import PyargsError


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.parquet"])
def test_rows_name_their_place(tmp_path, name):
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2]}), tmp_path / name)
    else:
        write(tmp_path / name, [{"x": 1}, {"x": 2}])
    places, found = zip(*sources.rows(tmp_path / name), strict=True)
    assert found == ({"x": 1}, {"x": 2}) and places[1] == f"{name}, {'row' if name.endswith('parquet') else 'line'} 2"


def test_a_byte_order_mark_and_other_line_ends_are_no_damage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n\r\n{"x": 2}\r\n')
    assert [row for _, row in sources.rows(tmp_path / "a.jsonl")] == [{"x": 1}, {"x": 2}]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(PyargsError, match="deep.jsonl"):
        list(sources.rows(tmp_path / "deep.jsonl"))


def test_damaged_sources_name_the_file_and_the_row(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [{"x": "y" * i} for i in range(3000)]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "mixed.jsonl.gz").write_bytes(whole[:100] + b"\0" * 50 + whole[150:])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    for name, message in {
        "cut.jsonl.gz": r"cut.jsonl.gz is damaged after line \d+",
        "mixed.jsonl.gz": "mixed.jsonl.gz",
        "a.parquet": "a.parquet is damaged",
    }.items():
        with pytest.raises(PyargsError, match=message):
            list(sources.rows(tmp_path / name))


@pytest.mark.parametrize("ranges", [True, False])
def test_downloads_go_on_where_they_broke_off(server, ranges):
    content = bytes(range(256)) * 20000
    (server.folder / "file.json").write_bytes(content)
    server.cut, server.ranges = 3_000_000, ranges
    with pytest.raises(PyargsError, match="run the command again"):
        sources.download(f"{server.address}/file.json", "set/file.json")
    path = sources.download(f"{server.address}/file.json", "set/file.json")
    assert path.read_bytes() == content and server.asked[1].startswith("bytes=") and server.asked[1] != "bytes=0-"
    assert sources.download("http://127.0.0.1:1/nowhere", "set/file.json") == path  # it is here
    path.write_bytes(content[:-1])
    with pytest.raises(PyargsError, match="not what was downloaded"):
        sources.download(f"{server.address}/file.json", "set/file.json")


def test_a_download_that_was_complete_but_not_noted(server):
    (server.folder / "file.json").write_bytes(b"whole")
    part = sources.cache_dir() / "data" / "set" / "file.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"whole")
    assert sources.download(f"{server.address}/file.json", "set/file.json").read_bytes() == b"whole"
    with pytest.raises(PyargsError, match="404"):
        sources.download(f"{server.address}/other.json", "set/other.json")
