"""What must hold of the build and of `pyargs env`. Installing into a fresh environment is tried by .ci/run."""

from __future__ import annotations

import importlib.util
import json
import os
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
    assert version == torch.__version__
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


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")
def test_without_nvcc_one_line_says_so(tmp_path):
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("not in a source tree")
    cmake = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-GNinja", "-DPYARGS_CUDA=OFF"]
    torch_dir = f"-DPYARGS_TORCH_DIR={Path(torch.__file__).parent}"
    done = subprocess.run([*cmake, torch_dir], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if "pyargs:" in line and "CPU only" in line]
    missing = subprocess.run([*cmake, f"-DPYARGS_TORCH_DIR={tmp_path}"], capture_output=True, text=True)
    assert missing.returncode != 0 and "no torch >= 2.10" in missing.stderr


def test_extension_reports():
    _C = pytest.importorskip("pyargs._C")
    info = _C.build_info()
    assert info["torch"].split("+")[0].count(".") == 2
    assert info["cuda_archs"] is None or "90-real" in info["cuda_archs"]
    levels = ["default", "avx2", "avx512", "avx512_bf16"]
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


def test_env_command():
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", "env"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["packages"]["torch"] == torch.__version__
    assert {"native_ops", "cpu_capability", "cuda", "threads", "extension"} <= set(report)


def test_env_command_without_the_extension():
    env = {**os.environ, "PYARGS_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", "env"], capture_output=True, text=True, check=True, env=env)
    report = json.loads(done.stdout)
    assert report["native_ops"] == [] and "PYARGS_NO_EXT" in report["extension"]
