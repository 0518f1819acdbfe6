"""The trial and the capture of a step, on a GPU that is made up."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyargs.decode.backends.capture import NoHostReads, _apart, capture

aten = torch.ops.aten
HOST = [
    lambda x, mask, index, host: aten._local_scalar_dense(x.sum()),
    lambda x, mask, index, host: aten.nonzero(mask),
    lambda x, mask, index, host: torch.where(mask),
    lambda x, mask, index, host: torch.equal(x, x),
    lambda x, mask, index, host: torch.allclose(x, x),
    lambda x, mask, index, host: aten.masked_select(x, mask),
    lambda x, mask, index, host: aten._unique2(x),
    lambda x, mask, index, host: aten.repeat_interleave(index),
    lambda x, mask, index, host: aten._to_copy(x, device=torch.device("cpu")),
    lambda x, mask, index, host: aten._to_copy(host, device=torch.device("cuda")),
    lambda x, mask, index, host: aten.copy_(x, host),
    lambda x, mask, index, host: aten.copy_(host, x),
    lambda x, mask, index, host: aten.copy_(x.sum(), host[0]),
    lambda x, mask, index, host: torch.tensor([1.0], device="cuda"),
    lambda x, mask, index, host: aten.lift_fresh(x),  # what is left of the line above without fake tensors
    lambda x, mask, index, host: aten.index(x, [mask]),
    lambda x, mask, index, host: aten.index(x, [host.long()]),
    lambda x, mask, index, host: aten.index_put_(x, [mask], x),
    lambda x, mask, index, host: aten.index_put_(x, [index], host[0]),
]
DEVICE = [
    lambda x, mask, index, host: x.unsqueeze(0) @ x.unsqueeze(1) + x.sum().softmax(0),
    lambda x, mask, index, host: x * host[0],
    lambda x, mask, index, host: x.fill_(host[0]).masked_fill_(mask, -torch.inf),
    lambda x, mask, index, host: aten.index(x, [index]),
    lambda x, mask, index, host: aten.index_put_(x, [index], x),
    lambda x, mask, index, host: aten.index_put_(x, [mask], host[0]),  # fills
    lambda x, mask, index, host: aten._to_copy(x, dtype=torch.float64),
    lambda x, mask, index, host: aten.copy_(x, x.half()),
    lambda x, mask, index, host: torch.full_like(x, 2.0).cumsum(0).topk(2),
    lambda x, mask, index, host: aten._to_copy(host, dtype=torch.long),
]


def called(operators) -> None:
    """On fake tensors: x float32, mask bool and index int64 [3] on a GPU, host float32 [3]."""
    with FakeTensorMode(), torch.no_grad():
        x, host = torch.ones(3, device="cuda"), torch.ones(3)
        mask, index = x > 0, x.long()
        with NoHostReads("cuda"):
            operators(x, mask, index, host)


@pytest.mark.parametrize("operators", HOST, ids=range(len(HOST)))
def test_what_waits_for_the_device_is_refused_by_name(operators):
    with pytest.raises(RuntimeError, match=r"^aten::\w+(\.\w+)? "):
        called(operators)


@pytest.mark.parametrize("operators", DEVICE, ids=range(len(DEVICE)))
def test_what_does_not_wait_is_computed(operators):
    called(operators)


class Gpu:
    """What `capture` asks of torch. All streams are one: torch has 32, which come around again. `multiply` is a product, for
    which cuBLAS keeps a workspace for each stream; `used` has those of each graph."""

    def __init__(self, patch):
        for name in ("CUDAGraph", "current_stream"):
            patch.setattr(torch.cuda, name, lambda *a, **k: self)
        self.streams = 0
        patch.setattr(torch.cuda, "Stream", self.new_stream)
        _apart.cache_clear()
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear, raising=False)
        self.capturing, self.workspace, self.used = False, None, []

    def new_stream(self, device) -> Gpu:
        self.streams += 1
        return self

    def wait_stream(self, other) -> None:
        assert not self.capturing

    @contextmanager
    def graph(self, graph, **more):
        self.capturing = True
        self.used.append(set())
        try:
            yield
        finally:
            self.capturing = False

    def replay(self) -> None:
        pass

    def clear(self) -> None:
        assert not self.capturing
        self.workspace = None

    def multiply(self) -> None:
        self.workspace = self.workspace or object()
        if self.capturing:
            self.used[-1].add(self.workspace)


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Gpu]:
    yield Gpu(monkeypatch)
    _apart.cache_clear()


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: torch.unique(x), lambda x: x[x > 0]])
def test_another_thread_reads_while_a_step_is_tried(gpu, read):
    x, found, tried, done = torch.tensor(1.0), [], threading.Event(), threading.Event()

    def other():
        tried.wait(60)
        found.append(read(x))
        done.set()

    def step():
        steps.append(gpu.capturing)
        if len(steps) == 2:  # the first one sets libraries up
            tried.set()
            assert done.wait(60)

    thread, steps = threading.Thread(target=other), []
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(step, torch.device("cpu")) == gpu.replay
    thread.join()
    assert found == [read(x)] and steps == [False, False, True]
    with pytest.raises(RuntimeError, match="^aten::"):
        capture(lambda: read(x), torch.device("cpu"))
    assert found == [read(x)]  # allowed as before


def test_no_graph_shares_its_workspace_and_none_stays_with_a_stream(gpu):
    gpu.multiply()
    before = gpu.workspace
    for _ in range(3):
        capture(gpu.multiply, torch.device("cpu"))
        assert gpu.workspace is None
    assert [len(each) for each in gpu.used] == [1, 1, 1] and len(set.union({before}, *gpu.used)) == 4


def test_captures_share_a_stream_until_one_fails(gpu):
    for _ in range(3):
        capture(gpu.multiply, torch.device("cpu"))
    assert gpu.streams == 1
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 / 0, torch.device("cpu"))
    capture(gpu.multiply, torch.device("cpu"))
    assert gpu.streams == 2


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_step_that_fails_leaves_no_workspace(gpu, last):
    steps = []

    def step():
        gpu.multiply()
        steps.append(gpu.capturing)
        if len(steps) == last:
            raise RuntimeError("no such step")

    with pytest.raises(RuntimeError, match="no such step"):
        capture(step, torch.device("cpu"))
    assert gpu.workspace is None and len(steps) == last
