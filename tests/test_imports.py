"""The plan of the house, drawn from its imports: no circle, none upwards, the paper a guest, tests where the mirror says."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lowest first. A module imports what stands on its own floor or below, whether at the top of its file or within a function.
FLOORS = (
    ("errors",),
    ("config", "files", "user_ids", "progress", "store", "tuned", "types"),
    ("ops",),
    ("heads",),
    ("data",),
    ("lm",),  # on data, for the tiny random model whose words are the planted users'
    ("scoring",),
    ("models",),
    ("training",),
    ("methods",),
    ("metrics",),
    ("decode",),
    ("tune", "prepare", "learn", "publish"),  # prepare asks a policy for titles
    ("integrations", "demo", "ray", "serve"),
    ("commands",),
    ("cli",),
)
# Imports by a name that is only known when the program runs, and the one that goes up: a method is found by its name.
BY_NAME_UPWARDS = {("pyargs.training.hooks", "methods")}
LONGEST = 500
# Tests of the project as a whole, and those that hold for all files of a room.
OF_NO_MODULE = {
    "faults/test_commands.py",
    "faults/test_service.py",
    *("test_benchmarks.py", "test_ci.py", "test_examples.py", "test_extension.py", "test_extras.py", "test_imports.py"),
    *("test_packaging.py", "test_readme.py", "experiments/test_smoke.py"),
    *("distributed/test_cells.py", "distributed/test_ray.py", "distributed/test_torchrun.py"),
    *("heads/test_all.py", "methods/test_all.py", "methods/test_planted_users.py", "models/test_first_house.py"),
    *("decode/backends/test_fake_device.py", "ops/test_bank.py", "ops/test_emulated.py", "ops/test_gpu.py"),
    *("ops/test_precision.py", "ops/test_tickets.py", "integrations/test_cxx.py", "integrations/test_doors.py"),
    "integrations/test_kernels.py",
}
# Modules without a test file of their own, and where they are tested.
TESTED_IN = {
    "pyargs.commands": "test_cli.py",
    "pyargs.commands.adapt": "test_cli.py",
    "pyargs.commands.demo": "demo/test_run.py",
    "pyargs.commands.evaluate": "test_cli.py",
    "pyargs.commands.forget": "models/test_models.py",
    "pyargs.commands.key": "serve/test_keys.py",
    "pyargs.commands.push": "publish/test_pushing.py",
    "pyargs.commands.tune": "test_cli.py",
    "pyargs.config": "training/test_config.py",
    "pyargs.decode.backends": "decode/test_engine.py",
    "pyargs.decode.backends.copies": "decode/test_engine.py",
    "pyargs.decode.pair": "decode/test_engine.py",
    "pyargs.decode.policy": "decode/test_scorer.py",
    "pyargs.decode.scheduler": "decode/test_engine.py",
    "pyargs.decode.steps": "decode/test_engine.py",
    "pyargs.demo.page": "demo/test_run.py",
    "pyargs.heads": "heads/test_all.py",
    "pyargs.heads.cosine": "heads/test_all.py",
    "pyargs.heads.distance": "heads/test_all.py",
    "pyargs.heads.linear": "heads/test_all.py",
    "pyargs.heads.mlp": "heads/test_all.py",
    "pyargs.heads.user_mlp": "heads/test_all.py",
    "pyargs.integrations.vllm.v1": "integrations/vllm/test_rows.py",
    "pyargs.integrations.vllm.v2": "integrations/vllm/test_rows.py",
    "pyargs.methods.global_rm": "methods/test_all.py",
    "pyargs.models.token_reward": "methods/test_genarm.py",
    "pyargs.ops.extension": "test_packaging.py",
    "pyargs.ops.library": "test_packaging.py",
    "pyargs.prepare.folder": "prepare/test_prism.py",
    "pyargs.prepare.statistics": "prepare/test_prism.py",
    "pyargs.ray": "distributed/test_ray.py",
    "pyargs.serve.answers": "serve/test_app.py",
    "pyargs.serve.metrics": "serve/test_app.py",
    "pyargs.tuned": "commands/test_decode.py",
    "pyargs.training.processes": "distributed/test_torchrun.py",
    "pyargs.training.losses": "methods/test_planted_users.py",
    "experiments.__main__": "experiments/test_figures.py",
    "experiments.claims.accuracies": "experiments/claims/test_claims.py",
    "experiments.claims.answers": "experiments/claims/test_claims.py",
    "experiments.claims.common": "experiments/claims/test_claims.py",
    "experiments.commands": "experiments/test_figures.py",
    "experiments.commands.artefacts": "experiments/test_artefacts.py",
    "experiments.commands.figure": "experiments/test_figures.py",
    "experiments.commands.report": "experiments/test_report.py",
    "experiments.commands.reproduce": "experiments/test_reproduce.py",
    "experiments.on_ray": "distributed/test_ray.py",
    "experiments.tables.specs": "experiments/tables/test_tables.py",
}


def modules(package: str) -> dict[str, Path]:
    """Files by the names they are imported under."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules("pyargs")


def imported(file: Path) -> set[str]:
    """Modules of pyargs that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written out"
            # `from a import b`: the module a.b if it is one, else a name in a
            found |= {both if (both := f"{node.module}.{name.name}") in MODULES else node.module for name in node.names}
    return {name for name in found if name.split(".")[0] == "pyargs"}


def named(file: Path) -> set[str]:
    """Rooms of pyargs that a file imports from by a name: import_module(f"pyargs.room.{...}")."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            found |= {text.split(".")[1] for text in texts if str(text).startswith("pyargs.")}
    return found


DRAWN = {name: imported(file) - {name} for name, file in MODULES.items()}


def room(name: str) -> str | None:
    """The room or module right below pyargs; None for pyargs itself, which imports nothing before it is asked."""
    return name.split(".")[1] if "." in name else None


def floor(of: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if of in rooms)


def test_what_is_imported_is_there():
    binary = {"pyargs._C"}
    assert {one for several in DRAWN.values() for one in several} <= {*MODULES} | binary
    assert sum(map(len, DRAWN.values())) > 300, "the imports were found"
    assert DRAWN["pyargs"] == set(), "the package's face is imported on first use"


def test_no_circle():
    """Of files; an import within a function counts. Raises CycleError, which names the files."""
    tuple(TopologicalSorter(DRAWN).static_order())


def test_every_room_has_a_floor_and_no_import_goes_up():
    assert {room(name) for name in MODULES} - {None} == {one for rooms in FLOORS for one in rooms}
    upwards = [
        f"{name} imports {one}"
        for name, several in DRAWN.items()
        for one in several
        if name != "pyargs" and one in MODULES and one != "pyargs" and floor(room(one)) > floor(room(name))
    ]
    assert not upwards, upwards


def test_by_name_one_import_goes_up():
    names = {name: named(file) for name, file in MODULES.items() if name != "pyargs"}
    assert {"pyargs.models.reward_model", "pyargs.training.hooks"} <= {name for name, rooms in names.items() if rooms}
    assert {(name, one) for name, rooms in names.items() for one in rooms if floor(one) > floor(room(name))} == BY_NAME_UPWARDS


def test_the_library_knows_nothing_of_the_paper_s_evaluation():
    """Neither imports it nor names it; what is committed as the record of a run names its command."""
    texts = [*(ROOT / "pyargs").rglob("*.py"), *(ROOT / "pyargs").rglob("*.j2"), *(ROOT / "csrc").rglob("*.*")]
    assert not [file for file in texts if "experiments" in file.read_text(encoding="utf-8")]


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a source tree")
def test_no_file_is_long():
    folders = ("pyargs", "experiments", "csrc", "tests", "benchmarks", "examples")
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h", ".j2", ".sh"}
    files = [file for name in folders for file in (ROOT / name).rglob("*.*") if file.suffix in kinds]
    files += [file for file in (ROOT / ".ci").iterdir() if file.is_file()] + [ROOT / "setup.py"]
    long = [file for file in files if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST]
    assert len(files) > 300 and not long, long


def mirror(name: str, file: Path) -> str:
    """Where the tests of a module are, below tests/: of a package within its room."""
    parts = name.split(".")[name.startswith("pyargs") :]
    if file.name == "__init__.py":
        parts = [*parts, name.split(".")[-1]]
    return "/".join([*parts[:-1], f"test_{parts[-1]}.py"])


@pytest.fixture(scope="module")
def places() -> dict[str, str]:
    return {name: mirror(name, file) for package in ("pyargs", "experiments") for name, file in modules(package).items()}


@pytest.fixture(scope="module")
def there() -> set[str]:
    return {file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("test_*.py")}


def test_every_test_file_mirrors_a_module(places, there):
    own = {one for one in there if not one.startswith("invariants/")}
    assert own - set(places.values()) == OF_NO_MODULE


def test_every_module_has_its_test_file_or_one_that_is_named(places, there):
    """Not the scripts of single studies, nor files without a function."""
    both = {**MODULES, **modules("experiments")}
    without = {name for name, place in places.items() if place not in there and "def " in both[name].read_text("utf-8")}
    assert {name for name in without if not name.startswith("experiments.studies.")} - {"pyargs"} == set(TESTED_IN)
    assert set(TESTED_IN.values()) <= there


def test_no_test_file_imports_another():
    names = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found = {
            one.split(".")[-1]
            for node in tree
            if isinstance(node, ast.Import | ast.ImportFrom)
            for one in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names])
        }
        assert not found & names or file.name == "test_gpu.py", f"{file}: {found & names}"
