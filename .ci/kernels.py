"""Compiles the CUDA kernels for every architecture and reads what came out: registers, spills, shared memory, and of sm_90 the
instructions. Fails where a kernel needs more than its limit.

    python .ci/kernels.py          says so and stops where there is no nvcc; counts no instructions where there is no nvdisasm

A kernel that spills, needs so many registers that fewer blocks fit than it was designed for, or reads by narrow loads is slow
without being wrong: nothing else would notice on a machine without a GPU. nvdisasm is a package of its own among those that
`pip install pyargs[dev]` brings.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parents[1] / "csrc" / "kernels" / "cuda"
ARCHITECTURES = ("80", "90", "100")
DISASSEMBLED = "90"


class Limit(NamedTuple):
    registers: int  # of a thread, at most: the 65,536 of an SM over the threads that should fit
    instructions: int  # in the kernel's code, at most: a tenth more than nvcc 13.0 made
    wide_loads: int  # 16-byte loads from global memory, at least
    products: int = 0  # of tensor cores, at least, where there is no float32


LIMIT = {
    "topk_logprobs_kernel": Limit(64, 4000, 8),
    "score_select_kernel": Limit(64, 5400, 14),
    "tokenwise_select_kernel": Limit(64, 9900, 32),
    "user_mlp_kernel": Limit(128, 2950, 11, products=16),
    "user_mlp_select_kernel": Limit(128, 5300, 11, products=16),
    "commit_kernel": Limit(64, 600, 8),
    "branch_attention_kernel 1": Limit(168, 3750, 38, products=16),  # heads of up to 64 elements, 128 and 256
    "branch_attention_kernel 2": Limit(255, 5900, 70, products=32),
    "branch_attention_kernel 4": Limit(255, 5900, 120, products=36),
}
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
TEMPLATE = re.compile(r"(?:DtypeE|ActivationE|ELi)(\d)")
SECTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", re.MULTILINE)


class Kernel(NamedTuple):
    name: str  # with the numbers of its dtype, and of its activation or width
    registers: int
    shared: int
    spilled: int
    instructions: Counter[str]  # by opcode; empty where they are not counted

    def loads(self, width: str = "") -> int:
        return sum(count for code, count in self.instructions.items() if code.startswith("LDG.") and width in code)

    def products(self) -> int:
        return sum(count for code, count in self.instructions.items() if code.startswith("HMMA."))

    def faults(self, limit: Limit | None) -> list[str]:
        if limit is None:
            return ["no limit set"]
        found = [f"more than {limit.registers} registers"] if self.registers > limit.registers else []
        found += ["spills"] if self.spilled else []
        if total := self.instructions.total():
            found += [f"more than {limit.instructions} instructions"] if total > limit.instructions else []
            found += [f"fewer than {limit.wide_loads} wide loads"] if self.loads(".128") < limit.wide_loads else []
            products = 0 if self.name.endswith("_kernel 0") else limit.products
            found += [f"fewer than {products} products of tensor cores"] if self.products() < products else []
        return found


def nvdisasm() -> str | None:
    """Where it is: on the path, or in NVIDIA's wheel."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        files = []
    return shutil.which("nvdisasm") or next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)


def compiled(source: Path, architecture: str) -> list[Kernel]:
    """What the kernels of a file need."""
    with tempfile.TemporaryDirectory() as folder:
        code, cubin = f"arch=compute_{architecture},code=sm_{architecture}", f"{folder}/x"
        command = ["nvcc", "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin", "-o", cubin, str(source)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(ran.stderr)
        text = ""
        if architecture == DISASSEMBLED and (tool := nvdisasm()):
            text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = SECTION.split(text)
    codes = {name: Counter(INSTRUCTION.findall(body)) for name, body in zip(parts[::2], parts[1::2], strict=True)}
    codes = {name: found - Counter({"NOP": found["NOP"]}) for name, found in codes.items()}
    found, name, spilled = [], "", 0
    for line in ran.stderr.splitlines():
        if match := ENTRY.search(line):
            name = match[1]
        elif match := SPILLS.search(line):
            spilled += int(match[2]) + int(match[3])  # of functions that stay out of line, too
        elif name and (match := USED.search(line)):
            short = re.search(r"[a-z_]+_kernel", name)[0] + "".join(f" {one}" for one in TEMPLATE.findall(name))
            found.append(Kernel(short, int(match[1]), int(match[2] or 0), spilled, codes.get(name, Counter())))
            name, spilled = "", 0
    return found


def main() -> int:
    if shutil.which("nvcc") is None:
        print("no nvcc: kernels not compiled")
        return 0
    if nvdisasm() is None:
        print("no nvdisasm: instructions not counted")
    print(f"{'':<36}registers  shared  spilled  instructions  loads  wide  products")
    bad, seen = [], set()
    each = [(source, architecture) for source in sorted(CUDA.glob("*.cu")) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, architecture), kernels in zip(each, pool.map(compiled, *zip(*each, strict=True)), strict=True):
            for kernel in kernels:
                name, *numbers = kernel.name.split()
                name = wide if (wide := " ".join([name, *numbers[-1:]])) in LIMIT else name
                seen.add(name)
                line = f"sm_{architecture:<4}{kernel.name:<28}{kernel.registers:>10}{kernel.shared:>8}{kernel.spilled:>9}"
                if total := kernel.instructions.total():
                    line += f"{total:>14}{kernel.loads():>7}{kernel.loads('.128'):>6}{kernel.products():>10}"
                print(line, flush=True)
                bad += [f"{line}: {fault}" for fault in kernel.faults(LIMIT.get(name))]
    bad += [f"{name}: no such kernel was compiled" for name in LIMIT if name not in seen]
    print("\n".join(["", "FAILED:", *bad]) if bad else "every kernel within its limits")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
