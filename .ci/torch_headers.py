"""Builds the extension against the older releases of torch that pyproject.toml allows, and runs what was built.

    python .ci/torch_headers.py            2.10.0, 2.11.0 and 2.12.0; kernels see no torch and are compiled once for all

Their headers come from PyPI, out of the smallest wheel that has them (macOS, 80 MB; only the headers are kept, in the user's
cache). The library that is linked and loaded is that of the installed torch: a stable ABI promises that this makes no
difference. CUDA kernels are built too where nvcc is found. A release whose headers are neither in the cache nor to be had is
skipped, as the last line says.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pybind11
import torch

from pyargs.errors import PyargsError
from pyargs.files import cache_dir

ROOT = Path(__file__).parents[1]
RELEASES = ("2.10.0", "2.11.0", "2.12.0")
INSTALLED = Path(torch.__file__).parent
# Loads the built module under its own name, and calls an op.
TRY = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("pyargs._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
logprobs, ids, total = torch.ops.pyargs.topk_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), 2)
assert ids.tolist() == [[1, 2]], ids
print(module.build_info())
"""


def headers(release: str) -> Path:
    """The folder with that release's `include`, fetched if it is not there. Raises PyargsError where pip cannot."""
    target = cache_dir() / "torch-headers" / release
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        platforms = [word for version in (14, 11) for word in ("--platform", f"macosx_{version}_0_arm64")]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
        done = subprocess.run([*pip, "-d", folder, f"torch=={release}"], capture_output=True, text=True)
        if done.returncode:
            raise PyargsError(done.stderr.strip().splitlines()[-1])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder, [name for name in packed.namelist() if name.startswith("torch/include/")])
        (Path(folder) / "torch").rename(target)
    return target


def build(release: str, folder: Path) -> None:
    """Configures anew in the one build folder: only what sees torch's headers is compiled again."""
    torch_dir, target = folder / f"torch-{release}", folder / "lib"
    torch_dir.mkdir()
    (torch_dir / "include").symlink_to(headers(release) / "include")
    (torch_dir / "lib").symlink_to(INSTALLED / "lib")
    options = {
        "PYARGS_TORCH_DIR": torch_dir,
        "PYARGS_TORCH_VERSION": f"{release} (headers)",
        "PYARGS_OUTPUT_DIR": target,
        "PYARGS_PYBIND11_INCLUDE": pybind11.get_include(),
        "PYARGS_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
        "PYARGS_CUDA": "ON" if shutil.which("nvcc") else "OFF",
    }
    cmake = ["cmake", "-S", ROOT, "-B", folder / "build", "-GNinja", *(f"-D{name}={value}" for name, value in options.items())]
    subprocess.run(cmake, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder / "build"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-c", TRY, target / "_C.so"], check=True)


def main() -> None:
    built, skipped = [], []
    with tempfile.TemporaryDirectory() as folder:
        for release in RELEASES:
            try:
                headers(release)
            except PyargsError as error:
                skipped.append(f"{release} ({error})")
                continue
            build(release, Path(folder))
            built.append(release)
    print(f"built against the headers of torch {', '.join(built) or 'no release'}; skipped: {'; '.join(skipped) or 'none'}")


if __name__ == "__main__":
    main()
