"""Builds `pyargs._C` by CMake (CMakeLists.txt is the build description). Metadata lives in pyproject.toml.

PYARGS_NO_EXT=1         install without the extension (pure Python, slow reference ops)
PYARGS_CUDA             the CUDA kernels: AUTO (default) builds them where torch has CUDA and nvcc is found; ON for any torch,
                        and fails without nvcc; OFF never
PYARGS_TORCH_PYTHON     an interpreter that can import the torch to build against
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["CMakeLists.txt", *map(str, Path("csrc").rglob("*.*"))]  # goes into a source distribution
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


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        torch = find_torch()
        if torch is None:
            raise SystemExit("pyargs: no torch to build against; install torch>=2.10 first, or set PYARGS_NO_EXT=1")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        cmake = [
            "cmake",
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            "-GNinja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPYARGS_TORCH_DIR={torch[0]}",
            f"-DPYARGS_TORCH_VERSION={torch[1]}",
            f"-DPYARGS_PYBIND11_INCLUDE={pybind11.get_include()}",
            f"-DPYARGS_PYTHON_INCLUDE={sysconfig.get_paths()['include']}",
            f"-DPYARGS_OUTPUT_DIR={target.parent}",
            f"-DPYARGS_OUTPUT_NAME={target.name}",
            f"-DPYARGS_CUDA={os.environ.get('PYARGS_CUDA') or 'AUTO'}",
        ]
        if shutil.which("ninja"):  # pip's isolation moves between calls: never keep the path of an older ninja
            cmake.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}")
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


def build_requires():
    tools = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    return tools + ([] if find_torch() else ["torch>=2.10"])


if __name__ == "__main__":
    setup(
        ext_modules=[] if NO_EXT else [Extension("pyargs._C", sources=[], depends=SOURCES)],
        cmdclass={"build_ext": CMakeBuild},
        setup_requires=[] if NO_EXT else build_requires(),
    )
