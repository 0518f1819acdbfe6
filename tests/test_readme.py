"""The documents are promises: their Python and their commands run, their links lead somewhere, README's tree is true."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r' title="not run by the tests: [^"]+"')


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of the blocks of a page that run. One that cannot run says why in its title."""
    found = []
    for language, title, code in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        assert language in ("python", "bash", "text", "cpp", "cmake", ""), f"{page}: what is {language}?"
        assert not title or NOT_RUN.fullmatch(title), f"{page}: {title}"
        if language in ("python", "bash") and not title:
            found.append((language, code))
    return found


def test_lines_of_cpp_and_cmake_are_those_of_the_example():
    example = {
        line for name in ("guided.cpp", "CMakeLists.txt") for line in (ROOT / "examples/cxx" / name).read_text().splitlines()
    }
    found = [
        code
        for page in PAGES
        for language, _, code in FENCE.findall((ROOT / page).read_text())
        if language in ("cpp", "cmake")
    ]
    assert found
    for line in "".join(found).splitlines():
        assert line in example, line


def run_command(words: list[str]) -> int:
    from experiments.__main__ import main as experiments
    from pyargs.cli import main as pyargs

    if words[0] == "pyargs":
        return pyargs(words[1:])
    assert words[:3] == ["python", "-m", "experiments"], f"{' '.join(words)}: a block that the tests cannot run says why"
    return experiments(words[3:])


@contextmanager
def serving(words: list[str]):
    """The address of what `pyargs serve` serves."""
    from serving import served

    from pyargs.cli import parse
    from pyargs.commands.serve import application

    app = application(parse(words[0], words[1:])[1])
    with served(app) as address:
        yield address
    app.state.worker.stop()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run_one_after_the_other(page, stand_ins, capsys):
    """With tiny models in place of the embedded ones, and few pairs. The Python of a page is one program. A service runs until
    the page ends, at a free port."""
    names, address = {"__name__": page}, "http://127.0.0.1:8000"
    with ExitStack() as services:
        for language, code in blocks(page):
            if language == "python":
                exec(compile(code.replace("http://127.0.0.1:8000", address), page, "exec"), names)
                continue
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["pyargs", "serve"]:
                    address = services.enter_context(serving(words[1:]))
                elif words:
                    assert run_command(words) == 0, f"{line}\n{capsys.readouterr().err}"


def anchors(page: Path) -> set[str]:
    """What a link into a page can name, as mkdocs and GitHub make it of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def named_tests(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))


def test_each_cell_of_what_works_where_leads_to_its_test():
    """And each test that the page names stands in a cell. That they exist is seen where links are."""
    text = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
    header, _, *rows = re.search(r"## What works where\n.*?\n(\|.*?)\n\n", text, re.DOTALL)[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(rows) > 10 and all(len(row) == header.count("|") - 1 for row in cells)
    led = dict(re.findall(r"^\[([\w-]+)\]: \.\./(tests/\S+#test_\w+)$", text, re.MULTILINE))
    used = set()
    for name, *row in cells:
        for cell in row:
            if cell == "—":
                continue
            link = re.fullmatch(r"\[(yes|slow|no|theirs|yours|one|end|sums|rewards|sampled|weight 0)\]\[([\w-]+)\]", cell)
            assert link and link[2] in led, f"{name}: {cell}"
            used.add(link[2])
    assert used == led.keys()


@pytest.mark.parametrize("page", [*PAGES, "docs/findings/index.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page
    text = re.sub(FENCE, "", file.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        link = "".join(link)
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{page} links to {link}"
        there = named_tests if target.suffix == ".py" else anchors
        assert not anchor or anchor in there(target), f"{page} links to {link}"


def test_every_finding_is_listed():
    listed = " ".join((ROOT / "docs/findings/index.md").read_text(encoding="utf-8").split())
    for file in (ROOT / "docs/findings").glob("2*.md"):
        title = file.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
        assert f"[{title}]({file.name})" in listed, f"docs/findings/index.md does not list {file.name}"


def test_the_tree_is_true():
    tree = README.split("## What is here")[1].split("```")[1]
    folders = {0: ROOT}  # by indentation
    for line in tree.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        if indent not in folders:
            continue  # more about what stands above
        for name in re.findall(r"[\w./]+/|[\w]+\.(?:py|cpp|h)\b", line.strip().split("  ", 1)[0]):
            place = folders[indent] / name
            assert place.exists(), f"README names {name}, which {folders[indent]} does not hold"
            if name.endswith("/"):
                folders = {n: folder for n, folder in folders.items() if n <= indent} | {indent + 2: place}


def test_the_tree_names_every_file_of_lm():
    tree = README.split("## What is here")[1].split("```")[1]
    block = re.search(r"^  lm/ +(what runs a language model.*?)^  \w+/", tree, re.M | re.S)[1]
    for file in (ROOT / "pyargs/lm").glob("[!_]*.py"):
        assert re.search(rf"\b{file.stem}\b", block), f"README does not name pyargs/lm/{file.name}"


def test_the_tree_names_every_file_of_the_package_itself():
    tree = README.split("## What is here")[1].split("```")[1]
    for file in (ROOT / "pyargs").glob("[!_]*.py"):
        assert re.search(rf"\b{file.name}\b", tree), f"README does not name pyargs/{file.name}"


def test_the_api_page_lists_arguments(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from docstrings import as_list

    text = "Does it.\n\na: one; the\nother. b, c: two\nthings. c is not: so. Raises X: no."
    wanted = "Does it.\n\n\n- `a`: one; the other.\n- `b, c`: two things. c is not: so.\n\nRaises X: no."
    assert as_list(text, {"a", "b", "c"}) == wanted
    assert as_list("Note: this is text.", {"a"}) == "Note: this is text."


def test_the_readme_is_short():
    assert len(README.split()) <= 900
