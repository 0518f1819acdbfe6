"""Optional packages: each belongs to an extra, and where it is missing, the error names that extra."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import without_extras

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib

from pyargs import cli
from pyargs.errors import PyargsError, extra

ROOT = Path(__file__).parents[1]
OWN = {"pyargs", "experiments"}


def distribution(text: str) -> str:
    """The name in a requirement or of a package, as the index spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower()


def requirements() -> tuple[set[str], dict[str, set[str]]]:
    """Distributions of the core and of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def resolved(name: str) -> set[str]:
        found = set()
        for one in project["optional-dependencies"][name]:
            of_ours = one.startswith("pyargs[")
            found |= set().union(*map(resolved, re.findall(r"\w+", one)[1:])) if of_ours else {distribution(one)}
        return found

    extras = {name: resolved(name) for name in project["optional-dependencies"]}
    return {distribution(one) for one in project["dependencies"]}, extras


@cache
def installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def owners(package: str) -> list[str]:
    """The distributions that a package is from; one that is not installed here is named as it is."""
    return [distribution(one) for one in installed().get(package, [package])]


def imports(tree: ast.AST, inside: str | None = None):
    """(package, extra or None) of each import; the extra is the first argument of the `with extra(...)` around it."""
    for node in ast.iter_child_nodes(tree):
        around = inside
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            around = next((call.args[0].value for call in calls if getattr(call.func, "id", None) == "extra"), inside)
        if isinstance(node, ast.Import):
            yield from ((name.name.partition(".")[0], inside) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0], inside
        yield from imports(node, around)


def foreign() -> list[tuple[str, str, str | None]]:
    """(file, package, extra) of each import in pyargs/ and experiments/ that is neither Python's nor ours."""
    found = []
    for path in sorted([*(ROOT / "pyargs").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]):
        for package, name in imports(ast.parse(path.read_text())):
            if package not in OWN | set(sys.stdlib_module_names):
                found.append((path.relative_to(ROOT).as_posix(), package, name))
    return found


def test_every_import_is_of_the_core_or_names_its_extra():
    core, extras = requirements()
    wrong, optional = [], set()
    for file, package, name in foreign():
        (owner,) = set(owners(package))
        if owner not in core:
            optional.add(package)
        if (owner in core) != (name is None) or (name is not None and owner not in extras[name]):
            wrong.append(f"{file}: {package}, in {f'extra {name}' if name else 'no extra'}")
    assert not wrong, wrong
    assert optional == set(without_extras.OPTIONAL), "what without_extras.py hides"


def test_no_extra_asks_for_more_than_is_imported():
    core, extras = requirements()
    used = {one for _, package, _ in foreign() for one in owners(package)}
    assert not set().union(*(extras[name] for name in extras if name not in ("dev", "docs"))) - used
    assert extras["all"] == set().union(*(extras[name] for name in extras if name not in ("all", "vllm", "dev", "docs")))
    assert not core & extras["all"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    says = r"^BERTScore needs bert_score, which is not installed. Fix: pip install 'pyargs\[evaluate\]'$"
    with pytest.raises(PyargsError, match=says), extra("evaluate", "BERTScore"):
        import bert_score.utils  # noqa: F401


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import there_and_broken.lost", ModuleNotFoundError),
        ("from there_and_broken import lost", ImportError),
        ("raise ImportError('libfoo.so: cannot open shared object file')", ImportError),
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_a_broken_package_shows_its_own_error(code, error, tmp_path, monkeypatch):
    (tmp_path / "there_and_broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error) as raised, extra("evaluate", "BERTScore"):
        import there_and_broken  # noqa: F401
    assert not isinstance(raised.value, PyargsError)


def test_a_download_names_its_extra(monkeypatch, tmp_path):
    from pyargs.data import sources

    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(PyargsError, match=r"a download needs requests, .*'pyargs\[prepare\]'"):
        sources.download("https://example.invalid/file", "file")


def test_every_verb_works_without_extras_or_names_the_one_it_needs(tmp_path):
    """In a process of its own, since what was imported before would be found again."""
    script = ROOT / "tests" / "without_extras.py"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, tmp_path / "out", "--hide"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line, _ in without_extras.verbs("tiny-random")} == set(cli.verbs())


@pytest.mark.parametrize("line", ["figure 1", "report --out report.html"])
def test_the_paper_s_figures_name_their_extra(line, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from experiments import __main__; sys.exit(__main__.main())"
    command = [sys.executable, "-c", code, *line.split(), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    says = "a figure needs matplotlib, which is not installed. Fix: pip install 'pyargs[experiments]'"
    assert done.returncode == 1 and done.stderr.strip().endswith(says), done.stderr
