"""Compiles the CUDA kernels for every architecture and fails on spills or too many registers.

    python .ci/kernels.py          says so and stops where there is no nvcc

A kernel that spills, or needs so many registers that fewer blocks fit than it was designed for, is slow without being wrong:
nothing else would notice on a machine without a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = Path(__file__).parents[1] / "csrc" / "kernels" / "cuda"
ARCHITECTURES = ("80", "90", "100")
# Registers of a thread, by kernel: the 65,536 of an SM over the threads that should fit.
LIMIT = {
    "topk_logprobs_kernel": 80,
    "score_select_kernel": 64,
    "tokenwise_select_kernel": 80,
    "user_mlp_kernel": 128,
    "commit_kernel": 64,
}
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'")
USED = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def resources(source: Path, architecture: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled) of every kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin", "-o", f"{folder}/x", str(source)]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(ran.stderr)
    found, name, spilled = [], "", 0
    for line in ran.stderr.splitlines():
        if match := ENTRY.search(line):
            name = match[1]
        elif match := SPILLS.search(line):
            spilled += int(match[2]) + int(match[3])  # of functions that stay out of line, too
        elif name and (match := USED.search(line)):
            found.append((name, int(match[1]), spilled))
            name, spilled = "", 0
    return found


def main() -> int:
    if shutil.which("nvcc") is None:
        print("no nvcc: kernels not compiled")
        return 0
    bad, seen = [], set()
    for source in sorted(CUDA.glob("*.cu")):
        for architecture in ARCHITECTURES:
            for mangled, registers, spilled in resources(source, architecture):
                kernel = next((name for name in LIMIT if name in mangled), None)
                seen.add(kernel)
                line = f"sm_{architecture:<4}{mangled[:60]:<62}{registers:>4} registers {spilled:>4} bytes spilled"
                print(line)
                if kernel is None or spilled or registers > LIMIT[kernel]:
                    bad.append(line + (" (no limit set)" if kernel is None else f" (limit {LIMIT[kernel]})"))
    bad += [f"{name}: no such kernel was compiled" for name in LIMIT if name not in seen]
    print("\n".join(["", "FAILED:", *bad]) if bad else "no spills, registers within their limits")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
