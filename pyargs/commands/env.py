"""Print versions, CPU capability, CUDA, and which ops are native."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import warnings

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub", "numpy", "gguf")


def add_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    pass


def run(args: argparse.Namespace) -> dict:
    import torch

    import pyargs

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from pyargs import ops
    from pyargs.lm.structure import eager  # it imports the ops, too

    build = cpu = None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if ops.native:
        from pyargs import _C

        build = _C.build_info()
        cpu = {"detected": _C.cpu_capability_detected(), "used": _C.cpu_capability()}
    return {
        "pyargs": pyargs.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "native_ops": sorted(ops.native),
        "extension": build or "not loaded; " + " ".join(str(w.message) for w in caught),
        "cpu_capability": cpu,
        "backend": "eager" if eager() else "auto",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": {
            "compiled_for": (build and build["cuda_archs"]) or "nothing: AUTO leaves the kernels out where torch has no CUDA",
            "native_ops": [n for n in sorted(ops.native) if has_kernel(f"pyargs::{n}", "CUDA")],
            "torch": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
