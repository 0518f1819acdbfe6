from __future__ import annotations

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs import ops
from pyargs.ops import commit, commit_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def agree(states, slot, length, op=commit) -> None:
    got, expected = ([tensor.clone() for tensor in states] for _ in range(2))
    if not states[0].is_contiguous():  # clone makes them dense: keep the layout
        got = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in states]
    op(got, slot, length)
    commit_reference(expected, slot, length)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def drawn(data, op) -> None:
    draw = lambda strategy, label: data.draw(strategy, label)  # noqa: E731
    batch, heads = draw(st.integers(0, 4), "batch"), draw(st.integers(1, 3), "heads")
    k, dim = draw(st.integers(1, 12), "k"), draw(st.sampled_from([1, 3, 8, 16, 33, 64]), "head_dim")
    length = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch), "length")
    capacity = max(length, default=0) + k + draw(st.integers(0, 3), "room")
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    turned = draw(st.booleans(), "heads inside tokens, as some models have it")
    shape = (batch, capacity, heads, dim) if turned else (batch, heads, capacity, dim)
    states = [torch.randn(shape).to(dtype) for _ in range(draw(st.integers(1, 6), "tensors"))]
    states = [tensor.transpose(1, 2) for tensor in states] if turned else states
    slot = torch.randint(-1, k, (batch,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99), "seed")))
    length = torch.tensor(length, dtype=torch.int64)
    length[slot < 0] = draw(st.sampled_from([-(2**62), -1, 0, 99, 2**62]), "length of rows without a choice, that is not read")
    agree(states, slot, length, op=op)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_like_the_reference(data):
    drawn(data, commit)


@emulated.needed
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_cuda_kernel_emulated(data):
    emulated.order(data.draw(st.integers(0, 99), "order of threads and blocks"))
    drawn(data, emulated.commit)


def test_every_capability(capability):
    states = [torch.randn(3, 2, 20, 16) for _ in range(60)]
    agree(states, torch.tensor([0, 4, 9]), torch.tensor([10, 3, 8]))


def test_nothing_but_the_place_behind_the_prefix_changes():
    states = [torch.randn(4, 2, 9, 4)]
    before = states[0].clone()
    commit(states, torch.tensor([3, -1, 0, 1]), torch.tensor([5, 5, 8, 2]))
    before[0, :, 5], before[3, :, 2] = before[0, :, 8].clone(), before[3, :, 3].clone()
    assert torch.equal(states[0], before)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5)), min_size=1, max_size=5))
def test_a_row_alone_is_the_row_in_any_company(rows):
    slot, length = torch.tensor(rows).unbind(1)
    together = [torch.randn(len(rows), 2, 9, 4) for _ in range(3)]
    alone = [[tensor[row : row + 1].clone() for tensor in together] for row in range(len(rows))]
    commit(together, slot, length)
    for row, states in enumerate(alone):
        commit(states, slot[row : row + 1], length[row : row + 1])
        assert all(torch.equal(one[0], two[row]) for one, two in zip(states, together, strict=True))


BEYOND = [(3, 3), (0, 6), (0, -1), (1, 2**62), (2**62, 2**62)]
"""Slots and lengths outside of 6 places."""


@emulated.needed
@pytest.mark.parametrize(("slot", "length"), BEYOND)
def test_what_lies_behind_the_states_is_left_alone_on_a_device(slot, length):
    states = [torch.randn(2, 1, 6, 4)]
    before = states[0].clone()
    emulated.commit(states, torch.tensor([slot, 1]), torch.tensor([length, 4]))
    before[1, :, 4] = before[1, :, 5]
    assert torch.equal(states[0], before)


@pytest.mark.parametrize("function", [commit, commit_reference])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"states": []}, ValueError, "1 to 256"),
        ({"states": [torch.zeros(2, 2, 6, 4)] * 257}, ValueError, "1 to 256"),
        ({"states": [torch.zeros(2, 6, 4)]}, ValueError, r"\[B, heads, capacity, head_dim\]"),
        ({"states": [torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 7, 4)]}, ValueError, r"states\[1\]"),
        ({"states": [torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 6, 4).bfloat16()]}, ValueError, r"states\[1\]"),
        ({"states": [torch.zeros(2, 2, 4, 6).transpose(2, 3)]}, ValueError, "dense"),
        ({"slot": torch.zeros(3, dtype=torch.int64)}, ValueError, r"slot must have shape \[2\]"),
        ({"slot": torch.zeros(2)}, TypeError, "int64"),
        ({"length": torch.tensor(3)}, ValueError, r"length must have shape \[2\], one for each row"),
        ({"length": torch.zeros(2)}, TypeError, "int64"),
        ({"length": 3}, TypeError, "torch.Tensor"),
    ],
)
def test_errors_name_the_fix(function, change, error, says):
    given = {
        "states": [torch.zeros(2, 2, 6, 4)],
        "slot": torch.zeros(2, dtype=torch.int64),
        "length": torch.tensor([3, 2]),
    } | change
    with pytest.raises(error, match=says):
        function(**given)


@pytest.mark.parametrize("function", [commit, commit_reference])
@pytest.mark.parametrize(("slot", "length"), BEYOND)
def test_beyond_the_capacity(function, slot, length):
    with pytest.raises(RuntimeError, match="length must be|lies behind|out of bounds"):
        function([torch.zeros(2, 2, 6, 4)], torch.tensor([0, slot]), torch.tensor([0, length]))


@pytest.mark.parametrize("function", [commit, commit_reference, torch.ops.pyargs.commit])
def test_changes_tensors_as_torch_does(function):
    """Versions count up, so that autograd sees the change; what torch refuses to change is refused."""
    make = lambda: [torch.arange(96.0).view(2, 2, 6, 4) for _ in range(2)]  # noqa: E731
    rest = torch.tensor([1, 2]), torch.tensor([3, 3])
    states = make()
    function(states, *rest)
    assert [t._version for t in states] == [1, 1]
    factor = torch.ones(2, 2, 6, 4, requires_grad=True)
    loss = (factor * states[1]).sum()
    function(states, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inference = make()
        function(inference, *rest)
        function(states, *rest)
    leaf = make()[0].requires_grad_()
    refused = [leaf, leaf[:], inference[0], *(states[0].narrow(dim, 0, 1).expand(2, 2, 6, 4) for dim in range(3))]
    for tensor in refused:
        before = tensor.clone()
        with pytest.raises(RuntimeError, match="grad|inference|Inference|expanded|single memory location"):
            function([tensor], *rest)
        assert torch.equal(tensor, before)
    with torch.no_grad():
        function([leaf], *rest)
    assert leaf._version == 1 and torch.equal(leaf[1, :, 3], leaf[1, :, 5])


@pytest.mark.parametrize("function", [commit, commit_reference])
def test_slot_and_length_may_be_views_of_the_states(function):
    states = torch.tensor([[3, 0, 0, 1, 7, 8], [1, 0, 0, 3, 9, 5]]).view(2, 1, 6, 1)
    slot, length = states[:, 0, 0, 0], states[:, 0, 3, 0]
    function([states], slot, length)
    assert states.flatten(1).tolist() == [[3, 7, 0, 1, 7, 8], [1, 0, 0, 9, 9, 5]]


def test_opcheck_and_schema():
    given = [torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)], torch.tensor([1, 0]), torch.tensor([3, 1])
    torch.library.opcheck(torch.ops.pyargs.commit.default, given)
    inferred = torch.library.infer_schema(commit_reference, mutates_args=("states",))
    assert str(torch.ops.pyargs.commit.default._schema) == f"pyargs::commit{inferred}"


def test_compile():
    def step(states, slot, length):
        commit(states, slot, length)
        return states[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    one, two = ([torch.arange(48.0).view(2, 1, 6, 4)] for _ in range(2))
    slot, length = torch.tensor([1, 2]), torch.tensor([3, 2])
    assert torch.equal(compiled(one, slot, length), step(two, slot, length))


def test_native_here():
    pytest.importorskip("pyargs._C")
    assert "commit" in ops.native
