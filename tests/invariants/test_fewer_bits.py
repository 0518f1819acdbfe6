"""Guided decoding with weights in fewer bits: a row alone as in any company, and a file's blocks as float32."""

from __future__ import annotations

import pytest
from conftest import reward_model
from decoding import USERS, chosen, engine_of, pair_in_float32, prompts, same
from gguf_files import write_gguf
from stacks import random_lm

from pyargs.errors import PyargsError
from pyargs.lm import bits
from pyargs.lm.loading import load_lm

ROWS = prompts([4, 1, 9])


@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
def test_int8_rows_alone_as_together(weights):
    policy, model = pair_in_float32(weights)
    bits.hold(policy, "int8")
    together = chosen(policy, model, ROWS, USERS, backend="cpu")
    for row, user, found in zip(ROWS, USERS, together, strict=True):
        same(chosen(policy, model, [row], [user], backend="cpu"), [found])
    assert len({tuple(found.tokens) for found in together}) > 1


def test_int8_is_not_float32():
    policy, model = pair_in_float32("shared")
    float32 = chosen(policy, model, ROWS, USERS, backend="cpu")
    bits.hold(policy, "int8")
    assert [found.rewards for found in chosen(policy, model, ROWS, USERS, backend="cpu")] != [one.rewards for one in float32]


def test_a_files_blocks_choose_the_tokens_of_float32(tmp_path):
    path = str(write_gguf(tmp_path, random_lm(hidden=64, inner=96, head_dim=16, vocabulary=61), "Q4_1"))
    found = []
    for dtype in ("file", "float32"):
        policy = load_lm(path, dtype=dtype)[0]
        found.append(chosen(policy, reward_model(policy.get_decoder()), ROWS, USERS, backend="cpu"))
    for ours, right in zip(*found, strict=True):
        assert (ours.tokens, ours.slots, ours.rewards) == (right.tokens, right.slots, right.rewards)


def test_other_ways_to_compute_it_are_refused():
    policy, model = pair_in_float32("shared")
    bits.hold(policy, "int8")
    for backend in ("eager", "cuda-graph"):
        with pytest.raises(PyargsError, match="dtype='int8' is for the CPU stack alone"):
            engine_of(policy, model, backend=backend)
    policy.get_decoder().register_forward_hook(lambda *_: None)
    with pytest.raises(PyargsError, match="CPU stack alone"):
        engine_of(policy, model)
