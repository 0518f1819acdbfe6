"""Side-by-side timing for the benchmarks: medians of interleaved runs, the machine, and the rate it reads memory at."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyargs.files import cpu_name, write_json


def interleaved(fns: dict[str, Callable[[], object]], repeats: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of one call of each function. They take turns, so that a change of the machine's state (clock,
    memory rate, a busy neighbour) meets all of them; functions faster than 200 us are called several times a turn."""
    calls = {}
    for name, fn in fns.items():
        for _ in range(warmup):
            fn()
        _sync()
        start = time.perf_counter()
        fn()
        _sync()
        calls[name] = max(1, min(200, int(2e-4 / max(time.perf_counter() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                fn()
            _sync()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def streaming_rate(megabytes: int = 256, device: str = "cpu") -> float:
    """GB/s at which this machine reads memory that is in no cache (the sum of a large vector, best of 5)."""
    x = torch.ones(megabytes * 2**20 // 4, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        _sync()
        best = max(best, x.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return best


def hardware() -> dict:
    """What the numbers were taken on."""
    from pyargs.ops import native

    try:
        from pyargs import _C

        capability = _C.cpu_capability()
    except ImportError:
        capability = None
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "capability": capability,
        "native": sorted(native),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def hardware_line(info: dict) -> str:
    gpu = f", {info['gpu']}" if info["gpu"] else ""
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, {info['capability']}{gpu}, "
        f"torch {info['torch']}, load {info['load']}"
    )


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as an aligned text table; floats with three significant digits."""
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def against_torch(seconds: dict[str, float], read: Tensor, rate: float) -> dict:
    """The columns that every op's row ends with: both times, their ratio, and how fast the op reads the tensor `read`."""
    speed = read.numel() * read.element_size() / seconds["ours"] / 1e9
    return {
        "ours us": round(seconds["ours"] * 1e6, 1),
        "torch us": round(seconds["torch"] * 1e6, 1),
        "ratio": round(seconds["torch"] / seconds["ours"], 2),
        "GB/s": round(speed, 2),
        "of stream": round(speed / rate, 2),
    }


def options(description: str | None, quick: str, **more: dict) -> argparse.Namespace:
    """The flags of a benchmark, parsed; torch has the threads that they ask for. quick: what --quick measures; more: further
    flags by name, each as the keywords of `add_argument`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--quick", action="store_true", help=quick)
    for name, flag in more.items():
        parser.add_argument(f"--{name}", **flag)
    parser.add_argument("--threads", type=int, help="threads of torch and of pyargs (default: torch's own choice)")
    found = parser.parse_args()
    if found.threads:
        torch.set_num_threads(found.threads)
    return found


def main(description: str | None, measure: Callable[[bool, float], list[dict]], columns: list[str]) -> None:
    """Command line of a benchmark: `measure(quick, streaming rate)` gives the rows."""
    given = options(description, "fewer shapes, repeats and weights, for a smoke test")
    info, rate = hardware(), streaming_rate(64 if given.quick else 256)
    print(f"{hardware_line(info)}\nreads memory at {rate:.1f} GB/s", flush=True)
    rows = measure(given.quick, rate)
    print(table(rows, columns))
    if given.json:
        write_json(given.json, {"hardware": info, "streaming_gb_s": round(rate, 1), "rows": rows})


def _cell(value: object) -> str:
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
