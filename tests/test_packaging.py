"""What must hold of the build. Installing into a fresh environment is tried by .ci/run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_py():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not in a source tree")
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("pyargs_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_isolated_build_finds_the_installed_torch(setup_py, tmp_path, monkeypatch):
    """pip's isolation puts an overlay before everything else; one with a broken torch is the worst of it."""
    (tmp_path / "torch").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    folder, version = setup_py.find_torch()
    assert Path(folder) == Path(torch.__file__).parent
    assert version == importlib.metadata.version("torch")
    assert not any(name.startswith("torch") for name in setup_py.build_requires())


def test_no_torch_asks_for_one(setup_py, tmp_path, monkeypatch):
    real = sys.executable
    bare = tmp_path / "python"  # an interpreter that finds no packages
    bare.write_text(f'#!/bin/sh\nexec "{real}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.delenv("PYARGS_TORCH_PYTHON", raising=False)
    assert setup_py.find_torch() is None
    assert "torch>=2.10" in setup_py.build_requires()
    monkeypatch.setenv("PYARGS_TORCH_PYTHON", real)
    assert Path(setup_py.find_torch()[0]) == Path(torch.__file__).parent


def test_build_tools_are_asked_for_only_where_missing(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert {"cmake", "ninja"} <= set(setup_py.build_requires())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not {"cmake", "ninja"} & set(setup_py.build_requires())


def configure(build: Path, torch_dir: Path, **options: str) -> subprocess.CompletedProcess:
    """CMake's first half, without a compilation."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("not in a source tree")
    if not shutil.which("cmake") or not shutil.which("ninja"):
        pytest.skip("needs cmake and ninja")
    options = {"PYARGS_TORCH_DIR": torch_dir, "CMAKE_EXPORT_COMPILE_COMMANDS": "ON", **options}
    cmake = ["cmake", "-S", ROOT, "-B", build, "-GNinja", *(f"-D{name}={value}" for name, value in options.items())]
    return subprocess.run(cmake, capture_output=True, text=True)


def torch_like(folder: Path, *lines: str) -> Path:
    """As much of a torch as CMake looks at; the lines are those of its version.py."""
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "include/torch/csrc/stable/library.h").touch()
    (folder / "version.py").write_text("\n".join(["debug = False", *lines, "hip: Optional[str] = None", ""]))
    return folder


def test_torch_missing_is_named(tmp_path):
    missing = configure(tmp_path / "build", tmp_path)
    assert missing.returncode != 0 and "no torch >= 2.10" in missing.stderr


def test_pybind11_comes_before_the_copy_that_torch_carries(tmp_path):
    """The copies of torch 2.10 to 2.12 are empty under TORCH_TARGET_VERSION."""
    ours = tmp_path / "pybind11"
    ours.mkdir()
    torch_dir = torch_like(tmp_path / "torch", "cuda = None")
    done = configure(tmp_path / "build", torch_dir, PYARGS_PYBIND11_INCLUDE=str(ours), PYARGS_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    commands = {Path(c["file"]).name: c["command"] for c in json.loads((tmp_path / "build/compile_commands.json").read_text())}
    assert 0 < commands["module.cpp"].index(str(ours)) < commands["module.cpp"].index(str(torch_dir / "include"))


def test_what_computes_sees_no_header_of_torch():
    """It is compiled for several processors, and of an inline function that they share the linker could keep AVX-512's."""
    kernels = {*(ROOT / "csrc/kernels").rglob("*.*"), ROOT / "csrc/stack/pass.cpp"}
    if not kernels & {ROOT / "csrc/kernels/cpu/score_select.cpp"}:
        pytest.skip("not in a source tree")
    todo, seen = [*kernels], set()
    while todo:
        file = todo.pop()
        seen.add(file)
        for bracket, name in re.findall(r'^#\s*include\s*([<"])([^>"]+)', file.read_text(), re.MULTILINE):
            assert not name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h")), f"{file} includes {name}"
            if bracket == '"' and (included := (file.parent / name).resolve()) not in seen:
                todo.append(included)
    assert {file.relative_to(ROOT / "csrc").parts[0] for file in seen} == {"kernels", "stack", "include"}


CPU, CUDA = "cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'"


NVCC = shutil.which("nvcc")


@pytest.mark.parametrize(
    ("wanted", "torch_says", "says"),
    [
        ("OFF", CUDA, "CPU only (PYARGS_CUDA=OFF)"),
        ("AUTO", CPU, "CPU only (this torch has no CUDA"),
        ("AUTO", CUDA, "CUDA kernels for" if NVCC else "CPU only (this torch has CUDA, but no nvcc"),
        ("AUTO", "cudnn = 3", "does not say whether torch has CUDA"),
        ("ON", CPU, "CUDA kernels for" if NVCC else "PYARGS_CUDA=ON, but no nvcc"),
        ("on", CPU, "must be AUTO, ON or OFF, got 'on'"),
    ],
)
def test_cuda_kernels_are_built_where_torch_has_cuda(tmp_path, wanted, torch_says, says):
    done = configure(tmp_path / "build", torch_like(tmp_path / "torch", torch_says), PYARGS_CUDA=wanted)
    assert says in " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == ("kernels for" in says or "CPU only" in says)


def test_extension_reports():
    _C = pytest.importorskip("pyargs._C")
    info = _C.build_info()
    assert info["torch"].split("+")[0].count(".") == 2
    assert info["cuda_archs"] is None or "90-real" in info["cuda_archs"]
    levels = ["default", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
    assert levels.index(_C.cpu_capability()) <= levels.index(_C.cpu_capability_detected())
    with pytest.raises(ValueError, match="avx2"):
        _C.set_cpu_capability("sse9")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_capability_from_the_environment(capability):
    pytest.importorskip("pyargs._C")
    code = "import torch; from pyargs import _C; print(_C.cpu_capability())"
    env = {**os.environ, "PYARGS_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() in ("default", capability)


@pytest.mark.parametrize("capability", ["avx-512", "AVX2", "avx512_bf16"])
def test_a_capability_that_is_unknown_or_lacking_is_one_message(capability):
    _C = pytest.importorskip("pyargs._C")
    if capability == _C.cpu_capability_detected():
        pytest.skip("this CPU has all of them")
    env = {**os.environ, "PYARGS_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", "env"], capture_output=True, text=True, env=env)
    says = "this CPU has no avx512_bf16, at most" if capability == "avx512_bf16" else "avx512_vnni or avx512_bf16, got"
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr
    twice = "import torch\nfor _ in range(2):\n  try: import pyargs.ops\n  except Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", twice], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("PyargsError PYARGS_CPU_CAPABILITY") == 2


@pytest.mark.parametrize(
    "older, says",
    [
        ("", "it has no op pyargs::branch_attention"),
        ("(Tensor query) -> Tensor", "it has another op pyargs::branch_attention"),
    ],
)
def test_an_extension_that_was_built_from_other_sources_is_named(older, says):
    """As after `git pull` without a build: an op has come since, or has other arguments."""
    code = f"""
import sys, types, torch
sys.modules["pyargs._C"] = types.ModuleType("pyargs._C")
if {older!r}:
    torch.library.define("pyargs::branch_attention", {older!r})
from pyargs.errors import PyargsError
try:
    import pyargs.ops
except PyargsError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYARGS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "pyargs._C was built from other sources" in done.stdout and says in done.stdout
    assert "Build it again: pip install" in done.stdout
