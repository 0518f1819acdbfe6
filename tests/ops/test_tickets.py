"""Who is given tickets that stay on the device: csrc/kernels/cuda/tickets.h."""

from __future__ import annotations

import ctypes
import itertools

import emulated
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyargs import ops

pytestmark = emulated.needed
ALL = 2**16
devices = itertools.count(1)  # a new one for each test


def of_stream(device: int, number: int, rows: int) -> int | None:
    with emulated.stream(number, device=device):
        return emulated.tickets(rows)


def recorded(device: int, number: int, rows: int) -> int | None:
    with emulated.stream(number, recording=True, device=device):
        return emulated.tickets(rows)


def test_a_stream_has_the_same_while_they_are_enough():
    device = next(devices)
    first = of_stream(device, 7, 3)
    assert first is not None and of_stream(device, 7, 256) == first
    more = of_stream(device, 7, 300)
    assert more != first and of_stream(device, 7, 3) == more


def test_those_of_another_device_are_others():
    one, other = next(devices), next(devices)
    assert of_stream(one, 7, 3) != of_stream(other, 7, 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from([1, 2, 256, 257, 5000, 30000])), max_size=20))
def test_who_may_run_at_the_same_time_shares_none(calls):
    device, owned = next(devices), {}
    assert of_stream(device, 0, 1) is not None
    for at, (number, recording, rows) in enumerate(calls):
        owner = ("recording", at) if recording else ("stream", number)
        first = recorded(device, number, rows) if recording else of_stream(device, number, rows)
        if first is not None:
            assert not any((ctypes.c_uint32 * rows).from_address(first))
            owned.setdefault(owner, set()).update(range(first, first + 4 * rows, 4))
    everybody = [place for places in owned.values() for place in places]
    assert len(everybody) == len(set(everybody)) <= ALL


def test_a_device_runs_out_of_them():
    device = next(devices)
    assert of_stream(device, 7, ALL + 1) is None
    first = of_stream(device, 7, 256)
    assert recorded(device, 7, ALL - 255) is None
    assert recorded(device, 7, ALL - 256) == first + 4 * 256
    assert recorded(device, 7, 1) is None and of_stream(device, 8, 1) is None
    assert of_stream(device, 7, 256) == first


def test_a_recording_allocates_none():
    device = next(devices)
    assert recorded(device, 7, 1) is None
    assert of_stream(device, 7, 1) is not None
    assert recorded(device, 7, 1) is not None


def test_a_device_without_memory_has_none():
    device = next(devices)
    with emulated.stream(7, device=device, memory=False):
        assert emulated.tickets(1) is None
    assert of_stream(device, 7, 1) is None


def test_a_call_without_them_clears_its_own():
    """The emulation's workspace is garbage."""
    logits, device = torch.randn(2, 9000), next(devices)
    with emulated.stream(7, recording=True, device=device):
        assert emulated.tickets(2) is None
        for one, other in zip(emulated.topk_logprobs(logits, 5), ops.topk_logprobs_reference(logits, 5), strict=True):
            torch.testing.assert_close(one, other)
