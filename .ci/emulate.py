"""Runs the emulated CUDA kernels (tests/emulated.py) under sanitizers.

python .ci/emulate.py [PART ...]     default: all

address    AddressSanitizer and UndefinedBehaviorSanitizer: reads beyond a tensor or beyond shared memory, wide loads
           from addresses that do not allow them, uses of what is not initialised
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = {"address": ("libasan.so", "libstdc++.so")}


def emulated(build: str, *arguments: str) -> int:
    """Exit status of pytest with the kernels built so. Python itself is not: its own leaks do not count."""
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in LIBRARIES[build]]
    settings = {
        "PYARGS_EMULATED": build,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-s", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode


PARTS = {
    "address": lambda: emulated("address", "-n", "2", "-k", "emulated", "tests/ops"),
}


def main() -> int:
    failed = [part for part in sys.argv[1:] or PARTS if PARTS[part]()]
    print(f"FAILED: {' '.join(failed)}" if failed else "no fault found in the emulated kernels")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
