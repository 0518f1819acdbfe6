from __future__ import annotations

import pytest
import torch

CAPABILITIES = ("default", "avx2", "avx512")


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Runs a test on each code path that this CPU has."""
    _C = pytest.importorskip("pyargs._C")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    if _C.cpu_capability() != request.param:
        _C.set_cpu_capability(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def with_threads():
    """Calls a function with a number of threads."""
    before = torch.get_num_threads()

    def call(threads: int, function):
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call
