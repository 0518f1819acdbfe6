"""Loads the extension, whose C++ registers the ops. In the layout of the `kernels` library another file stands in its place,
which loads the same ops under another namespace (setup.py, KernelsFolder)."""

from __future__ import annotations

import os
import warnings

import torch  # noqa: F401  before the extension

from pyargs.errors import PyargsError

NAMESPACE = "pyargs"
"""Of the ops in `torch.ops`."""


def _load_extension() -> bool:
    if os.environ.get("PYARGS_NO_EXT") == "1":
        reason = "PYARGS_NO_EXT=1"
    else:
        try:
            from pyargs import _C  # loading it registers the kernels; torch must be loaded before

            if wanted := os.environ.get("PYARGS_CPU_CAPABILITY"):
                _C.set_cpu_capability(wanted)
            return True
        except ValueError as error:
            raise PyargsError(f"PYARGS_CPU_CAPABILITY: {error}") from None
        except ImportError as error:
            reason = str(error)
    warnings.warn(
        f"pyargs runs its slow reference ops: the extension is not loaded ({reason}). "
        "To build it: pip install . (or pip install -e .) with a C++ compiler at hand.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


has_extension = _load_extension()
"""Whether pyargs._C is loaded. It must not be loaded later: its ops would be defined twice."""
