"""Builds `pyargs._C` by CMake (CMakeLists.txt is the build description). Metadata lives in pyproject.toml.

`python setup.py kernels --out FOLDER` writes the ops in the layout of the `kernels` library instead, see KernelsFolder.

PYARGS_NO_EXT=1         install without the extension (pure Python, slow reference ops)
PYARGS_CUDA             the CUDA kernels: AUTO (default) builds them where torch has CUDA and nvcc is found; ON for any torch,
                        and fails without nvcc; OFF never
PYARGS_TORCH_PYTHON     an interpreter that can import the torch to build against
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["CMakeLists.txt", *map(str, sorted(Path("csrc").rglob("*.*")))]  # goes into a source distribution
NO_EXT = os.environ.get("PYARGS_NO_EXT") == "1"


def find_torch():
    """(folder, version) of the torch that pyargs will run with, or None.

    pip's build isolation is only a PYTHONPATH in front of the same interpreter: without it, the installed torch is
    found again, and pip has no reason to download a second one.
    """
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    candidates = [(sys.executable, dict(os.environ)), (sys.executable, bare)]
    if os.environ.get("PYARGS_TORCH_PYTHON"):
        candidates.insert(0, (os.environ["PYARGS_TORCH_PYTHON"], bare))
    code = (  # find_spec first: importing torch takes seconds, and a broken one should be named by CMake, not here
        "import importlib.util as u, importlib.metadata as m, pathlib;"
        "print(pathlib.Path(u.find_spec('torch').origin).parent, m.version('torch'), sep='\\n')"
    )
    for python, env in candidates:
        found = subprocess.run([python, "-c", code], env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True)
        if found.returncode == 0:
            return tuple(found.stdout.split("\n")[:2])
    return None


def cmake_build(build: Path, target: Path, torch: tuple[str, str], **options: str) -> None:
    """Builds the CMake project in the folder `build`; its module becomes the file `target`."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "PYARGS_TORCH_DIR": torch[0],
        "PYARGS_TORCH_VERSION": torch[1],
        "PYARGS_OUTPUT_DIR": str(target.parent),
        "PYARGS_OUTPUT_NAME": target.name,
        **options,
    }
    if shutil.which("ninja"):  # pip's isolation moves between calls: never keep the path of an older ninja
        options["CMAKE_MAKE_PROGRAM"] = shutil.which("ninja")
    flags = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-GNinja", *flags], check=True)
    subprocess.run(["cmake", "--build", str(build)], check=True)


def torch_to_build_against() -> tuple[str, str]:
    torch = find_torch()
    if torch is None:
        raise SystemExit("pyargs: no torch to build against; install torch>=2.10 first, or set PYARGS_NO_EXT=1")
    return torch


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        cmake_build(
            Path(self.build_temp).resolve(),
            Path(self.get_ext_fullpath(ext.name)).resolve(),
            torch_to_build_against(),
            CMAKE_BUILD_TYPE="Debug" if self.debug else "Release",
            PYARGS_PYBIND11_INCLUDE=pybind11.get_include(),
            PYARGS_PYTHON_INCLUDE=sysconfig.get_paths()["include"],
            PYARGS_CUDA=os.environ.get("PYARGS_CUDA") or "AUTO",
        )


OPS = """\"\"\"The native ops, in a namespace of their own.\"\"\"

from pathlib import Path

import torch

NAMESPACE = "{namespace}"
has_extension = True
torch.ops.load_library(Path(__file__).with_name(NAMESPACE + ".so"))
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return NAMESPACE + "::" + op_name
"""


class KernelsFolder(Command):
    """The ops as the `kernels` library loads them, in OUT/build/VARIANT: pyargs/ops, and a library in C++.

    backend: cpu, or cuda, which needs nvcc and has the ops of the CPU, too. It works for any Python, and any torch from 2.10
    on. The namespace of the ops has a hash of all that they are made of, so that two versions, or pyargs itself, can be in one
    process.
    """

    description = "write the ops in the layout of the `kernels` library"
    user_options = [
        ("out=", "o", "folder of the kernel repository (default: build/kernels)"),
        ("backend=", None, "cpu (default) or cuda"),
        ("best-capability=", None, "the best CPU capability that is compiled (default: all are)"),
    ]

    def initialize_options(self):
        self.out, self.backend, self.best_capability = "build/kernels", "cpu", ""

    def finalize_options(self):
        self.out = Path(self.out).resolve()
        if self.backend not in ("cpu", "cuda"):
            raise SystemExit(f"pyargs: backend must be cpu or cuda, got '{self.backend}'")

    def run(self):
        python = [*sorted((ROOT / "pyargs/ops").glob("*.py")), ROOT / "pyargs/errors.py"]
        python = [file for file in python if file.name != "extension.py"]  # _ops.py is in its place
        made_of = [file.read_bytes() for file in (*python, *map(ROOT.joinpath, SOURCES), Path(__file__))]
        digest = hashlib.sha256(b"\0".join([*made_of, self.best_capability.encode()])).hexdigest()[:12]
        name, backend, about = f"_pyargs_{self.backend}_{digest}", self.backend, {"type": self.backend}
        options = {"PYARGS_OP_NAMESPACE": name, "PYARGS_BEST_CAPABILITY": self.best_capability}
        options["PYARGS_CUDA"] = "ON" if self.backend == "cuda" else "OFF"
        with tempfile.TemporaryDirectory() as build:
            library = Path(build, "out", f"{name}.so")
            cmake_build(Path(build), library, torch_to_build_against(), **options)
            if self.backend == "cuda":  # "13.0.88 80-real 90-real 90-virtual"
                version, *archs = Path(build, "cuda.txt").read_text().split()
                backend = "cu" + "".join(version.split(".")[:2])
                about["archs"] = [f"{arch[:-1]}.{arch[-1]}" for arch in dict.fromkeys(arch.split("-")[0] for arch in archs)]
            folder = self.out / "build" / f"torch-stable-abi210-{backend}-{platform.machine()}-{platform.system().lower()}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.move(library, folder)
        for file in python:  # a kernel is a package of its own, whatever its name
            text = file.read_text().replace("from pyargs.ops.extension import", "from ._ops import")
            text = text.replace("from pyargs.ops.", "from .").replace("from pyargs.errors", "from .errors")
            (folder / file.name).write_text(text)
        (folder / "_ops.py").write_text(OPS.format(namespace=name))
        metadata = {"id": name, "name": "pyargs", "version": 1, "license": "Apache-2.0", "python-depends": []}
        (folder / "metadata.json").write_text(json.dumps({**metadata, "backend": about}, indent=2) + "\n")


def build_requires():
    tools = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    return tools + ([] if find_torch() else ["torch>=2.10"])


if __name__ == "__main__":
    setup(
        ext_modules=[] if NO_EXT else [Extension("pyargs._C", sources=[], depends=SOURCES)],
        cmdclass={"build_ext": CMakeBuild, "kernels": KernelsFolder},
        setup_requires=[] if NO_EXT else build_requires(),
    )
