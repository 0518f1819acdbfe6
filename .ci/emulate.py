"""Runs the emulated CUDA kernels (tests/emulated.py) under sanitizers, and sees that these find what is broken on purpose.

python .ci/emulate.py [PART ...]     default: all

cases      tests/ops/test_emulated.py: under AddressSanitizer and UndefinedBehaviorSanitizer, which see reads beyond a
           tensor or beyond shared memory and wide loads from addresses that do not allow them; and with an OS thread for
           each CUDA thread under ThreadSanitizer, which sees what no barrier and no ticket orders
ops        every test of an emulated kernel under the first two
ticket     the barriers of the last block's ticket and what it orders, each removed in turn: the cases must find it
mutants    every barrier, every test of an alignment and every start of a counter, likewise
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = "tests/ops/test_emulated.py"
LIBRARIES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
SETTINGS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "OMP_NUM_THREADS": "1"}
# What is broken: with which build it must be found, what is looked for, what it becomes.
BREAKS = [
    ("thread", r"__(?:syncthreads|syncwarp)\([^()]*\);", "{}"),
    ("thread", r"take_ticket(?=\()", "take_ticket_release"),
    ("thread", r"take_ticket(?=\()", "take_ticket_acquire"),
    ("address", r"% 16 == 0(?!\);)", "% 2 == 0"),  # not a static_assert's
    ("address", r"shared\.count = 0;", "{}"),
]
FOUND = re.compile(r"ThreadSanitizer: .*|AddressSanitizer: .*|runtime error: .*|emulation: .*|AssertionError.*")


@cache
def python(build: str) -> list[str] | None:
    """A command that runs Python with the sanitizers of a build, None where this machine has none. GCC's need addresses that
    are not drawn from too wide a range (vm.mmap_rnd_bits), which `setarch -R` sees to where it may."""
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in LIBRARIES[build]]
    plain = ["env", f"LD_PRELOAD={' '.join(paths)}", sys.executable]
    for command in (["setarch", "-R", *plain], plain):
        try:
            subprocess.run([*command, "-c", ""], env=os.environ | SETTINGS, check=True, capture_output=True, timeout=60)
            return command
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{build}: {error} {getattr(error, 'stderr', None) or ''}", flush=True)
    return None


def emulated(build: str, *arguments: str, **settings: str) -> list[str]:
    """What is wrong with the kernels built so: nothing, or the first finding. Leaks, which are Python's, do not count."""
    if python(build) is None:
        return []
    settings |= SETTINGS | {"PYARGS_EMULATED": build}
    command = [*python(build), "-m", "pytest", "-s", "-x", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    if ran.returncode == 0:
        return []
    output = ran.stdout + ran.stderr
    return [found[0] if (found := FOUND.search(output)) else f"NOT RUN: {output}"]


def cases() -> list[str]:
    with ThreadPoolExecutor() as pool:
        return [line for found in pool.map(lambda build: emulated(build, "-n", "0", CASES), LIBRARIES) for line in found]


def mutants(of: str = "") -> list[str]:
    """Those that nothing finds. `of`: the beginning of the one function that is broken."""
    missed = []
    for source in sorted((ROOT / "csrc/kernels/cuda").glob("*.cuh")):
        text = source.read_text()
        start = text.find(of)
        end = text.find("\n}\n", start) if of else len(text)
        for build, pattern, broken in BREAKS:
            for match in re.compile(pattern).finditer(text, start, end) if start >= 0 and python(build) else ():
                name = f"{source.name}:{text.count(chr(10), 0, match.start()) + 1} {match[0]} -> {broken}"
                with tempfile.TemporaryDirectory() as folder:
                    copy = shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
                    changed = text[: match.start()] + broken + text[match.end() :]
                    (copy / "kernels/cuda" / source.name).write_text(changed)
                    found = emulated(build, "-n", "0", CASES, PYARGS_EMULATED_SOURCES=str(copy), TMPDIR=folder)
                print(f"{name}: {found[0] if found else 'not found'}", flush=True)
                if not found or found[0].startswith("NOT RUN"):
                    missed.append(name)
    return missed


PARTS = {
    "cases": cases,
    "ops": lambda: emulated("address", "-n", "2", "-k", "emulated", "tests/ops"),
    "ticket": lambda: mutants("__device__ __forceinline__ bool is_last("),
    "mutants": mutants,
}


def main() -> int:
    failed = []
    for part in sys.argv[1:] or PARTS:
        failed += [f"{part}: {line}" for line in PARTS[part]()]
    done = "emulated kernels: no fault, and what was broken was found"
    if absent := [build for build in LIBRARIES if python(build) is None]:
        done = f"emulated kernels: no fault; this machine cannot run the sanitizer {', '.join(absent)}"
    print("\n".join(["", "FAILED:", *failed]) if failed else done)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
