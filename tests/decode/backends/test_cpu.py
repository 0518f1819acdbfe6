"""Decoding through the CPU stack: the tokens of transformers, and guesses of the winner that change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import reward_model, tiny_lm
from decoding import USERS, by_reference, chosen, engine_of, pair_in_float32, prompts, same, tokens

from pyargs.decode.backends import cpu
from pyargs.errors import PyargsError
from pyargs.lm.stack import keep
from pyargs.lm.stack import run as stacks
from pyargs.ops.library import has_extension

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [4, 1, 9]])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_tokens_of_transformers(family, weights, lengths, temperature):
    rows = prompts(lengths)
    asked = *pair_in_float32(weights, family), rows, USERS[: len(rows)]
    wish = dict(reward_weight=[2.0, 0.5, 0.0][: len(lengths)], temperature=temperature, max_new_tokens=9)
    same(chosen(*asked, backend="cpu", **wish), by_reference(*asked, **wish))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("guesses", [0, 1, 3, 9])
def test_guesses_change_nothing_bit_by_bit(rows, guesses, monkeypatch):
    policy, model = pair_in_float32("shared lora")
    asked = [prompts([n])[0] for n in (4, 1, 9, 2, 6)][:rows], [USERS[i % 3] for i in range(rows)]
    wish = dict(backend="cpu", reward_weight=3.0, stop=[])
    monkeypatch.setattr(cpu, "GUESSES", {})
    want = chosen(policy, model, *asked, **wish)
    monkeypatch.setattr(cpu, "GUESSES", {rows: guesses})
    assert chosen(policy, model, *asked, **wish) == want
    assert any(slot > 0 for one in want for slot in one.slots)  # the rewards steer


@pytest.mark.parametrize("guesses", [1, 3, None])
def test_only_a_winner_that_was_not_guessed_takes_a_pass_of_its_own(guesses, monkeypatch):
    policy, model = pair_in_float32("shared lora")
    if guesses is not None:
        monkeypatch.setattr(cpu, "GUESSES", {1: guesses})
    guesses, passes = cpu.GUESSES.get(1, 0), []
    real = stacks.Stack.__call__
    monkeypatch.setattr(stacks.Stack, "__call__", lambda self, *a, **b: (passes.append(b), real(self, *a, **b))[1])
    (got,) = chosen(policy, model, prompts([4]), ["ann"], reward_weight=3.0, stop=[])
    missed = sum(slot >= guesses for slot in got.slots[:-1])  # nothing follows the last token
    assert 0 < missed < 11 and len(passes) == 1 + 12 + missed


@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
def test_rows_that_have_ended_take_no_work(weights, monkeypatch):
    policy, model = pair_in_float32(weights)
    counted = []
    real = stacks.Stack.__call__

    def counting(self, ids, cache, mask=None, **more):
        counted.append(int(mask.sum()) if mask is not None else ids.numel())
        return real(self, ids, cache, mask, **more)

    monkeypatch.setattr(stacks.Stack, "__call__", counting)
    monkeypatch.setattr(cpu, "GUESSES", {})
    rows, wish = prompts([4, 1, 9]), dict(stop=list(range(1, 30)), reward_weight=2.0, max_new_tokens=[12, 4, 12])
    got = chosen(policy, model, rows, USERS, **wish)
    worked = sum(counted)
    counted.clear()
    same(got, by_reference(policy, model, rows, USERS, **wish))
    lengths = list(map(len, tokens(got)))
    prompt, k, steps = sum(map(len, rows)), 5, sum(lengths)
    most = {"own": 2 * prompt + steps * (k + 1), "shared": prompt + steps * k, "shared lora": 2 * prompt + steps * (k + 1)}
    assert worked <= most[weights] and min(lengths) < max(lengths)


def test_which_models():
    policy, adapted = pair_in_float32("shared lora")
    assert cpu.shares(policy, adapted.backbone)
    for model in (pair_in_float32("own")[1], adapted.merge()):
        assert not cpu.shares(policy, model.backbone) and engine_of(policy, model).backend == "cpu"
    for other, message in ((reward_model(tiny_lm()), "float64"), (pair_in_float32("own", "phi")[1], "phi")):
        engine = engine_of(policy, other)
        assert engine.backend == "eager" and message in engine.reason
        with pytest.raises(PyargsError, match=f"backend='cpu' cannot compute this: .*{message}"):
            engine_of(policy, other, backend="cpu")


def test_without_room_for_the_weights_it_goes_through_transformers(monkeypatch):
    asked = *pair_in_float32("own"), prompts([4]), ["ann"]
    monkeypatch.setattr(keep.psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    engine = engine_of(*asked[:2])
    assert engine.backend == "eager" and "GiB are left" in engine.reason
    same(chosen(*asked), by_reference(*asked))


def test_without_the_extension_it_goes_through_transformers():
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, pyargs
from conftest import reward_model, tiny_lm
policy = tiny_lm(dtype=torch.float32)
engine = pyargs.Engine(policy, reward_model(policy))
(answer,) = engine.generate([[5, 6]], ["ann"], reward_weight=1.0, max_new_tokens=3, stop=[])
print(answer.backend, len(answer.tokens))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parents[2])],
        env=os.environ | {"PYARGS_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout == "eager 3\n", ran.stderr
