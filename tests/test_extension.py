"""Nothing that Python can pass to `pyargs._C` does more than raise, and the message names the argument."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("pyargs._C")

LAYERS, DIM, HEADS, KV, HEAD_DIM, INNER, VOCABULARY, ROWS, PLACES, K = 2, 6, 2, 1, 4, 5, 11, 3, 9, 2
MATRICES = {"qkv": (16, DIM), "o": (DIM, 8), "gate_up": (INNER, DIM), "down": (DIM, INNER)}


WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def parts(dtype: torch.dtype = torch.float32):
    found = [(name, 0, name == "gate_up", floats(*shape, dtype=dtype), "") for name, shape in MATRICES.items()]
    return [*found, ("gate_up", 32, True, floats(*MATRICES["gate_up"], dtype=dtype), "")]


def new_stack(dtype: str = "float32", layers: int = LAYERS):
    return _C.Stack(dtype, DIM, HEADS, KV, HEAD_DIM, INNER, layers, VOCABULARY, True, 1e-5, [])


def new_grouped():
    """One layer, whose weights come in blocks: Q4_0 or Q4_1, the head in Q8_0."""
    return _C.Stack("float32", 32, 1, 1, 32, 64, 1, VOCABULARY, True, 1e-5, [*["int4"] * 4, "int8"])


def blocks(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


def new_cache(rows: int = ROWS):
    angle = torch.arange(PLACES).unsqueeze(1) / torch.tensor([1.0, 3.0])
    return _C.Cache(LAYERS, KV, HEAD_DIM, rows, angle.cos(), angle.sin())


def packed(dtype: str = "float32"):
    stack, kind = new_stack(dtype), WEIGHTS[dtype]
    for layer in range(LAYERS):
        stack.pack(layer, parts(kind))
        stack.norms(layer, floats(DIM), floats(DIM))
    stack.pack(0, [("head", 0, False, floats(VOCABULARY, DIM, dtype=kind), "")])
    stack.embedding(floats(VOCABULARY, DIM, dtype=kind), floats(DIM), 1.0)
    return stack


def right_calls(stack, cache) -> dict:
    """Each function of the extension, and arguments that it takes."""
    ids, flags = torch.randint(0, VOCABULARY, (ROWS, K)), torch.ones(ROWS, K, dtype=torch.bool)
    rows, new, grouped = torch.arange(ROWS), new_stack(), new_grouped()
    return {
        "Stack": (
            _C.Stack,
            ["float32", DIM, HEADS, KV, HEAD_DIM, INNER, LAYERS, VOCABULARY, True, 1e-5, ["float32"] * (4 * LAYERS + 1)],
        ),
        "Cache": (_C.Cache, [LAYERS, KV, HEAD_DIM, ROWS, floats(PLACES, 2), floats(PLACES, 2)]),
        "pack": (new.pack, [0, parts()]),
        "pack head": (lambda *part: new.pack(0, [part]), ["head", 0, False, floats(VOCABULARY, DIM), ""]),
        "pack part": (lambda *part: new.pack(1, [part]), ["qkv", 3, False, floats(9, DIM), ""]),
        "pack half": (lambda *part: new.pack(1, [part]), ["gate_up", 32, True, floats(INNER, DIM, dtype=torch.bfloat16), ""]),
        "pack blocks": (lambda *part: grouped.pack(0, [part]), ["gate_up", 32, True, blocks(64, 20), "Q4_1"]),
        "pack head's blocks": (lambda *part: grouped.pack(0, [part]), ["head", 0, False, blocks(VOCABULARY, 34), "Q8_0"]),
        "bias": (new.bias, [0, "qkv", floats(32)]),
        "delta": (new.twin().delta, [0, "o", floats(2, 8), floats(1, 2, 32)]),
        "norms": (new.norms, [0, floats(DIM), floats(DIM)]),
        "head_norms": (new.head_norms, [0, floats(HEAD_DIM), floats(HEAD_DIM)]),
        "attention": (new.attention, [0, 0.5, 2.0, False]),
        "embedding": (new.embedding, [floats(VOCABULARY, DIM), floats(DIM), 2.0]),
        "twin": (stack.twin, []),
        "unpacked": (new.forward, [cache, ids, flags, rows, flags[:, 0], True, floats(ROWS, K, DIM)]),
        "forward": (stack.forward, [cache, ids, flags, rows, flags[:, 0].clone(), True, floats(ROWS, K, DIM)]),
        "prompt": (stack.forward, [cache, ids, None, None, None, False, floats(ROWS, K, DIM)]),
        "logits": (stack.logits, [floats(K, DIM), 1, floats(K, VOCABULARY)]),
        "commit": (cache.commit, [torch.tensor([0, 1, -1]), rows]),
        "copy": (cache.copy, [0, 1, 1]),
        "length": (lambda *given: setattr(cache, "length", *given), [[0] * ROWS]),
        "limit_threads": (_C.limit_threads, [2**40]),
        "thread_count": (_C.thread_count, []),
        "set_cpu_capability": (_C.set_cpu_capability, [_C.cpu_capability()]),
        "cpu_capability": (_C.cpu_capability, []),
        "cpu_capability_detected": (_C.cpu_capability_detected, []),
        "build_info": (_C.build_info, []),
        "glance": (_C.glance, [[{}, {"a": 1}], [vars(new_stack)], ("a", "b")]),
    }


def test_every_function_is_tried():
    functions = {name for name in dir(_C) if not name.startswith("_")}
    methods = {name for kind in (_C.Stack, _C.Cache) for name in dir(kind) if not name.startswith("_")} - {"rows"}
    assert functions | methods <= set(right_calls(packed(), new_cache()))
    for function, arguments in right_calls(packed(), new_cache()).values():
        if function is not right_calls:
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                function(*arguments, None)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
numbers = st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 2**31, 2**40, 2**62, 2**63, 10**40, 2.5, float("nan"), True])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 6, 9, 11, 32]), max_size=4))
    tensor = torch.zeros(shape, device=draw(st.sampled_from(["cpu", "cpu", "meta"]))).to(draw(st.sampled_from(DTYPES)))
    change = draw(st.sampled_from(["none", "transpose", "expand", "step", "grad", "sparse", "parameter", "numpy", "minus"]))
    if change == "transpose" and tensor.dim() > 1:
        tensor = tensor.transpose(0, 1)
    elif change == "expand":
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    elif change == "step" and tensor.dim():
        tensor = tensor[::2]
    elif change == "grad" and tensor.is_floating_point():
        tensor = tensor.requires_grad_()
    elif change == "parameter" and tensor.is_floating_point():
        tensor = torch.nn.Parameter(tensor)
    elif change == "sparse" and tensor.dtype == torch.float32 and tensor.dim() and not tensor.is_meta:
        tensor = tensor.to_sparse()
    elif change == "numpy" and tensor.dtype == torch.float32 and not tensor.is_meta:
        return numpy.asarray(tensor)
    elif change == "minus" and tensor.dtype == torch.int64:
        tensor = tensor - 2**62
    return tensor


others = st.sampled_from([None, "", "down", "head", "\ud800", b"qkv", [], [[]], [None], (), {}, object(), ..., int, float])
hostile = st.one_of(numbers, others, tensors(), st.lists(tensors(), max_size=2), st.builds(new_cache, st.integers(0, 2)))


@given(data=st.data(), name=st.sampled_from(sorted(right_calls(packed(), new_cache()))))
def fuzz(data, name):
    stack, cache = STACKS[data.draw(st.integers(0, 2))], new_cache()
    before = expected(stack)
    function, arguments = right_calls(stack, cache)[name]
    for _ in range(data.draw(st.integers(0, 2))):  # so that there are branches to commit, and a prefix to copy
        stack.forward(
            cache, torch.zeros(ROWS, 1, dtype=torch.long), None, None, None, data.draw(st.booleans()), floats(3, 1, 6)
        )
    for _ in range(data.draw(st.integers(1, 2))):
        if arguments:
            arguments[data.draw(st.integers(0, len(arguments) - 1))] = data.draw(hostile)
    try:
        function(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, MemoryError):
        pass
    assert torch.equal(expected(stack), before)


def expected(stack) -> torch.Tensor:
    states, logits = torch.empty(1, 3, DIM), torch.empty(3, VOCABULARY)
    stack.forward(new_cache(1), torch.tensor([[1, 2, 10]]), None, None, None, False, states)
    stack.logits(states[0], 2, logits)
    return logits


def test_hostile_arguments_end_no_process():
    """In a process of its own: what breaks it fails this test and no other."""
    subprocess.run([sys.executable, __file__, "300"], timeout=600, check=True)


IDS = torch.ones(3, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda s, c: s.forward(c, floats(3, 2), None, None, None, False, floats(3, 2, 6)),
            "ids must be int64 .any, any., dense",
        ),
        (lambda s, c: s.forward(c, [[1]], None, None, None, False, floats(3, 2, 6)), "ids must be a dense tensor"),
        (lambda s, c: s.forward(c, IDS.to("meta"), None, None, None, False, None), "ids must"),
        (lambda s, c: s.forward(c, IDS, torch.ones(3, 2), None, None, False, floats(3, 2, 6)), "mask must be bool"),
        (lambda s, c: s.forward(c, IDS, None, None, None, False, floats(2, 6).expand(3, 2, 6)), "states must.*strides"),
        (lambda s, c: s.forward(c, IDS, None, None, None, False, floats(3, 2, 6).bfloat16()), "states must be float32"),
        (lambda s, c: s.logits(floats(2, 6), 1, floats(2, 12)), "not as many tokens"),
        (lambda s, c: s.logits(floats(2, 6), 1, floats(3, 11)), r"logits must be float32 \[2, any\]"),
        (lambda s, c: s.pack(0, [("dwon", 0, False, floats(6, 5), "")]), "not 'dwon'"),
        (lambda s, c: s.bias(0, "Qkv", floats(32)), "not 'Qkv'"),
        (lambda s, c: s.pack(0, [("down", 0, False, floats(6, 7), "")]), "inputs"),
        (lambda s, c: s.pack(0, [("down", 30, False, floats(6, 5), "")]), "outputs"),
        (lambda s, c: s.pack(0, [("head", 0, False, floats(10, 6), "")]), "row for each token"),
        (lambda s, c: s.pack(0, [("down", 0, False, floats(6, 5), "Q4_1")]), "uint8"),
        (lambda s, c: s.pack(0, [("down", 0, False, blocks(6, 20), "Q4_1")]), "format"),
        (lambda s, c: s.pack(0, [("down", 0, False, blocks(6, 20), "Q6_K")]), "not 'Q6_K'"),
        (lambda s, c: new_grouped().pack(0, [("down", 0, False, blocks(6, 20), "Q4_1")]), "inputs"),
        (lambda s, c: new_grouped().pack(0, [("down", 0, False, blocks(6, 41), "Q4_1")]), "inputs"),
        (lambda s, c: new_grouped().pack(0, [("down", 0, False, floats(6, 64), "")]), "int4 weights come in blocks"),
        (lambda s, c: new_grouped().pack(0, [("head", 0, False, floats(VOCABULARY, 32), "")]), "int8"),
        (lambda s, c: _C.Stack("float32", 6, 1, 1, 4, 5, 1, 11, True, 1e-5, ["int4"] * 5), "blocks of 32"),
        (lambda s, c: _C.Stack("int8", 6, 1, 1, 4, 5, 1, 11, True, 1e-5, ["int4"] * 5), "not multiplied"),
        (lambda s, c: _C.Stack("float32", 6, 1, 1, 4, 5, 1, 11, True, 1e-5, ["float32"]), "formats of four"),
        (lambda s, c: s.head_norms(0, floats(3), floats(3)), "norm of queries must be float32"),
        (lambda s, c: s.embedding(floats(10, 6), floats(6), 1.0), "embedding must be float32 or bfloat16 .11, 6."),
        (lambda s, c: new_stack("float16"), "float32, bfloat16, int8 or int4"),
        (lambda s, c: new_stack("bfloat"), "float32, bfloat16, int8"),
        (lambda s, c: new_stack(layers=0), "positive"),
        (lambda s, c: new_stack().forward(c, IDS, None, None, None, False, floats(3, 2, 6)), "not packed"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(packed(), new_cache())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_a_stack_reads_lives_as_long_as_it(dtype):
    stack = packed(dtype)  # nobody else holds its weights
    before = expected(stack)
    twin = stack.twin()
    del stack
    gc.collect()
    junk = [torch.full((VOCABULARY, DIM), 3.0, dtype=WEIGHTS[dtype]) for _ in range(200)]
    assert torch.equal(expected(twin), before) and len(junk) == 200


if __name__ == "__main__":
    STACKS = [packed("float32"), packed("bfloat16"), packed("int8")]
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(max_examples=int(sys.argv[1]), **quiet)(fuzz)()
