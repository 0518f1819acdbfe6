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
devices, recordings = itertools.count(1), itertools.count(1)  # new ones for each test


def of_stream(device: int, number: int, rows: int) -> int | None:
    with emulated.stream(number, device=device):
        return emulated.tickets(rows)


def recorded(device: int, number: int, rows: int, recording: int | None = None) -> int | None:
    """In a recording of its own where none is named."""
    with emulated.stream(number, recording or next(recordings), device):
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


def test_a_growing_batch_seldom_takes_others():
    device = next(devices)
    assert len({of_stream(device, 7, rows) for rows in range(1, ALL // 4)}) == 7  # 256, 512, ..., 16384
    assert of_stream(device, 8, ALL // 4) is not None


def test_calls_of_a_recording_share_theirs_and_recordings_do_not():
    device, one, other = next(devices), next(recordings), next(recordings)
    of_stream(device, 7, 1)
    first = recorded(device, 7, 3, one)
    assert [recorded(device, 7, rows, one) for rows in (3, 256, 1)] == [first] * 3
    more = recorded(device, 7, 300, one)
    assert [recorded(device, 7, rows, one) for rows in (512, 3)] == [more] * 2
    assert len({first, more, recorded(device, 8, 3, one), recorded(device, 7, 3, other), of_stream(device, 7, 3)}) == 5


CALLS = st.tuples(st.just("call"), st.integers(0, 3), st.integers(0, 3), st.sampled_from([1, 256, 257, 5000, 30000]))
GONE = st.tuples(st.just("gone"), st.integers(1, 3))


@given(st.lists(CALLS | GONE, max_size=30))
def test_who_may_run_at_the_same_time_shares_none(events):
    """A call (stream, recording or 0, rows), or a recording whose graphs are gone."""
    device, owned = next(devices), {}
    ids = {n: next(recordings) for n in (1, 2, 3)}
    assert of_stream(device, 0, 1) is not None
    for kind, number, *call in events:
        if kind == "gone":
            emulated.destroy(ids[number])
            owned = {owner: places for owner, places in owned.items() if owner[1] != ids[number]}
            ids[number] = next(recordings)
            continue
        recording, rows = ids.get(call[0], 0), call[1]
        first = recorded(device, number, rows, recording) if recording else of_stream(device, number, rows)
        if first is not None:
            assert not any((ctypes.c_uint32 * rows).from_address(first))
            owned.setdefault((number, recording), set()).update(range(first, first + 4 * rows, 4))
    everybody = [place for places in owned.values() for place in places]
    assert len(everybody) == len(set(everybody)) <= ALL


def test_a_device_runs_out_of_them():
    device = next(devices)
    assert of_stream(device, 7, ALL + 1) is None
    first = of_stream(device, 7, ALL // 2)
    assert recorded(device, 7, ALL // 2 + 1) is None
    assert recorded(device, 7, ALL // 2) == first + 4 * ALL // 2
    assert recorded(device, 7, 1) is None and of_stream(device, 8, 1) is None
    assert of_stream(device, 7, 256) == first


def test_recordings_without_end_do_not():
    """As an engine makes them: some live, the oldest goes, and each has many calls."""
    device = next(devices)
    of_stream(device, 7, 1)
    living = []
    for _ in range(300):
        living.append(next(recordings))
        assert all(recorded(device, 7, rows, living[-1]) is not None for rows in (3, 2000) * 40)
        if len(living) > 6:
            emulated.destroy(living.pop(0))
    many = [next(recordings) for _ in range(200)]  # or many small ones at a time
    for one in living:
        emulated.destroy(one)
    assert None not in [recorded(device, 7, 3, one) for one in many]


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


def test_a_recording_whose_graph_cannot_hold_them_has_none():
    device = next(devices)
    first, recording = of_stream(device, 7, 1), next(recordings)
    with emulated.stream(7, recording, device, memory=False):
        assert emulated.tickets(1) is emulated.tickets(1) is None
    assert recorded(device, 7, 1) == first + 4 * 256  # they were given back


def test_a_call_without_them_clears_its_own():
    """The emulation's workspace is garbage."""
    logits, device = torch.randn(2, 9000), next(devices)
    with emulated.stream(7, recording=next(recordings), device=device):
        assert emulated.tickets(2) is None
        for one, other in zip(emulated.topk_logprobs(logits, 5), ops.topk_logprobs_reference(logits, 5), strict=True):
            torch.testing.assert_close(one, other)
