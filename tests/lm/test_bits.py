"""Fewer bits: int8 is what its formula says, the same on every processor; a file's blocks give what float32 does."""

from __future__ import annotations

import pytest
import torch
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import AVAILABLE, VOCABULARY, check_that_states_are_their_own, identical, random_lm, using, with_lora

import pyargs
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.lm.stack import keep, pack

SIZES = dict(hidden=96, inner=160, heads=6, kv_heads=2, head_dim=16, layers=2)


def int8_product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The formula: groups of 32 inputs, each rounded by its largest; exact within a group, then one group after the other."""

    def grouped(values):
        return torch.nn.functional.pad(values, (0, -values.shape[1] % 32)).unflatten(1, (-1, 32))

    w, x = grouped(weight.float()), grouped(states)
    scale = (w.abs().amax(2, keepdim=True) / 127).half().float()
    w = torch.where(scale > 0, w / scale, 0.0).round().clamp(-127, 127)
    largest = x.abs().amax(2, keepdim=True)
    rounded = torch.where(largest > 0, x * (127 / largest), 0.0).round()
    sums = torch.zeros(len(states), len(weight))
    for group in range(w.shape[1]):
        exact = (rounded[:, group].double() @ w[:, group].double().T).float()
        sums = sums + exact * (scale[:, group].T * (largest[:, group] / 127))
    return sums


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_products_are_those_of_the_formula_on_every_processor(data, dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    model = random_lm(
        heads=1, kv_heads=1, head_dim=32, hidden=draw(st.integers(1, 200)), layers=1, vocabulary=draw(st.integers(1, 300))
    ).to(dtype)
    weight = model.get_output_embeddings().weight.data
    weight *= torch.randn(len(weight), 1).exp().to(dtype)
    weight[torch.randint(0, len(weight), (3,))] *= draw(st.sampled_from([0.0, 1e-3, 50.0]))
    states = torch.randn(draw(st.integers(1, 60)), weight.shape[1])
    states[:, 0] *= draw(st.sampled_from([1.0, 100.0, 0.0]))
    states[0] *= draw(st.sampled_from([1.0, 0.0, 1e-4]))
    stack = pack.pack(model, dtype="int8")
    expected = int8_product(states, weight)
    for capability in AVAILABLE:
        with using(capability):
            identical(stack.logits(states), expected)


def test_the_largest_sums_of_int8_do_not_saturate():
    """-128 of a file times 127, side by side: beyond 16 bits, and 255 * 127 twice, of the unsigned form, far beyond."""
    model = random_lm(heads=1, kv_heads=1, head_dim=32, hidden=64, layers=1)
    weight = model.get_output_embeddings().weight.data
    weight[:] = torch.where(torch.arange(len(weight)) % 2 == 0, 1.0, -1.0)[:, None]
    stack = pack.pack(model, dtype="int8")
    for sign in (1.0, -1.0):
        states = torch.full((13, 64), sign)
        for capability in AVAILABLE:
            with using(capability):
                identical(stack.logits(states), int8_product(states, weight))


@pytest.mark.parametrize("capability", AVAILABLE)
@pytest.mark.parametrize("held", ["int8", "file"])
def test_a_state_does_not_depend_on_its_pass(held, capability, with_threads, tmp_path):
    model = random_lm(**SIZES)
    if held == "file":
        model = load_lm(str(write_gguf(tmp_path, model, "Q4_1")), dtype="file")[0]
    stack = keep.stack_of(model) if held == "file" else pack.pack(model, dtype=held)
    with using(capability):
        check_that_states_are_their_own(stack, with_threads)


def test_int8_is_near_the_model():
    """Within what 7 bits of weights and of inputs lose in two layers, and nearer than 4 bits could be."""
    model = random_lm(**SIZES, seed=3)
    text = torch.randint(0, VOCABULARY, (2, 40))
    states = {dtype: pack.pack(model, dtype=dtype) for dtype in (torch.float32, "int8")}
    right, ours = (stack(text, stack.cache(2, 40)) for stack in states.values())
    assert 0 < (ours - right).norm() / right.norm() < 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_with_their_row(value):
    model = random_lm(**SIZES)
    model.get_input_embeddings().weight.data[5, 7] = value
    stack = pack.pack(model, dtype="int8")
    text = torch.randint(6, VOCABULARY, (2, 9))
    alone = stack(text[1:], stack.cache(1, 9))
    text[0, 4] = 5
    states = stack(text, stack.cache(2, 9))
    identical(states[1:], alone)
    assert states[0, 4:].isnan().all() and states[0, :4].isfinite().all()


def test_lora_as_a_delta_of_int8():
    model = random_lm(**SIZES)
    adapter = with_lora(model, ("q_proj", "down_proj"))
    stack = pack.pack(model, adapter, dtype="int8")
    plain = pack.pack(model, dtype="int8")
    text = torch.randint(0, VOCABULARY, (2, 12))
    states = stack(text, stack.cache(2, 12), delta=[True, False])
    identical(states[1:], plain(text[1:], plain.cache(1, 12)))
    float32 = pack.pack(model, adapter)
    right = float32(text, float32.cache(2, 12), delta=True)
    assert (states[0] - right[0]).norm() / right[0].norm() < 0.05 < (states[1] - right[1]).norm() / right[1].norm()


MIXED = {
    "blk.0.attn_q.weight": "Q8_0",
    "blk.0.attn_k.weight": "Q4_0",
    "blk.1.ffn_down.weight": "F16",
    "token_embd.weight": "Q8_0",
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kinds", ["Q4_0", "Q4_1", "Q8_0", "BF16", MIXED])
def test_blocks_of_a_file_give_the_bits_of_float32(family, kinds, tmp_path):
    path = str(write_gguf(tmp_path, random_lm(family, **SIZES, tie_word_embeddings=kinds is MIXED), kinds))
    blocks, float32 = (keep.stack_of(load_lm(path, dtype=dtype)[0]) for dtype in ("file", "float32"))
    text = torch.randint(0, VOCABULARY, (3, 21))
    for capability in AVAILABLE:
        with using(capability):
            ours, right = (stack(text, stack.cache(3, 21)) for stack in (blocks, float32))
            identical(ours, right)
            for rows in (1, 3, 21):
                identical(blocks.logits(ours[0, :rows]), float32.logits(right[0, :rows]))


def test_a_q8_0_file_goes_in_unchanged(tmp_path):
    """As int8 weights it has the same numbers as its blocks."""
    path = str(write_gguf(tmp_path, random_lm(**SIZES), "Q8_0"))
    model = load_lm(path)[0]
    weight, states = model.get_output_embeddings().weight.data, torch.eye(96)
    identical(pack.pack(model, dtype="int8").logits(states * 127), pack.pack(model).logits(states * 127))
    assert weight.unique().numel() > 100


def refused(match: str, change, tmp_path, kinds="Q4_1", dtype="file", **more) -> None:
    path = write_gguf(tmp_path, random_lm(**SIZES), kinds, **more)
    with pytest.raises(PyargsError, match=match):
        change(path)
        keep.stack_of(load_lm(str(path), dtype=dtype)[0])


def test_files_that_would_be_read_as_another_model_are_refused(tmp_path):
    rope = dict(more={"rope_freqs.weight": torch.ones(16)})
    scaled = dict(fields={"llama.rope.scaling.type": "yarn"})
    for dtype in ("float32", "file"):
        refused("rotary", lambda path: None, tmp_path, dtype=dtype, **rope)
        refused("rotary", lambda path: None, tmp_path, dtype=dtype, **scaled)
        refused("family 'gemma'", lambda path: None, tmp_path, dtype=dtype, family="gemma")
        refused("tokenizer.json", lambda path: (path.parent / "tokenizer.json").unlink(), tmp_path, dtype=dtype)
        refused("cannot read the GGUF", lambda path: path.write_bytes(path.read_bytes()[:300]), tmp_path, dtype=dtype)
    refused("Q5_1.*only Q4_0", lambda path: None, tmp_path, {"blk.1.ffn_up.weight": "Q5_1"})


def test_weights_that_are_no_longer_the_files_are_refused(tmp_path):
    model = load_lm(str(write_gguf(tmp_path, random_lm(**SIZES), "Q4_1")), dtype="file")[0]
    keep.stack_of(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(PyargsError, match="no longer those of"):
        keep.stack_of(model)


def test_what_has_no_blocks_or_is_not_for_the_stack_is_refused(monkeypatch):
    for wrong, match in (
        (lambda: load_lm("tiny-random", dtype="file"), "GGUF"),
        (lambda: load_lm("tiny-random", dtype="int4"), "int8 or file"),
        (lambda: load_lm("tiny-random", dtype="int8", device="cuda"), "device"),
        (lambda: pyargs.Engine(load_lm("tiny-random")[0], dtype="int8"), "loaded by name"),
        (lambda: pyargs.Engine("tiny-random", dtype="int8", backend="eager"), "CPU stack alone"),
    ):
        with pytest.raises(PyargsError, match=match):
            wrong()
    model = load_lm("tiny-random", dtype="int8")[0]
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    with pytest.raises(PyargsError, match="CPU stack alone"):
        keep.can_pack(model)
