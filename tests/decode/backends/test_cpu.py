"""Decoding through the native stack: the tokens of transformers, and guesses of the winner that change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, decoded, pair_in_float32, plain, prompts, same

from pyargs.decode.backends import cpu, eager
from pyargs.lm.stack import keep
from pyargs.lm.stack import run as stacks
from pyargs.ops.library import has_extension

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [4, 1, 9]])
@pytest.mark.parametrize("sample", [False, True])
def test_the_tokens_of_transformers(family, weights, lengths, sample):
    policy, model = pair_in_float32(weights, family)
    assert cpu.possible(policy, model)
    rows, changes = prompts(lengths), dict(reward_weight=[2.0, 0.5, 0.0][: len(lengths)], do_sample=sample, max_new_tokens=9)
    same(
        decoded(policy, model, rows, USERS[: len(rows)], **changes), plain(policy, model, rows, USERS[: len(rows)], **changes)
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("guesses", [0, 1, 3, 9])
def test_guesses_change_nothing_bit_by_bit(rows, guesses, monkeypatch):
    policy, model = pair_in_float32("shared lora")
    asked = [prompts([n])[0] for n in (4, 1, 9, 2, 6)][:rows], [USERS[i % 3] for i in range(rows)]
    changes = dict(reward_weight=3.0, eos_token_id=[], num_candidates=5)
    monkeypatch.setattr(cpu, "GUESSES", {})
    want = decoded(policy, model, *asked, **changes)
    monkeypatch.setattr(cpu, "GUESSES", {rows: guesses})
    got = decoded(policy, model, *asked, **changes)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.rewards, want.rewards)
    assert (want.slots > 0).any()  # the rewards steer


@pytest.mark.parametrize("guesses", [1, 3, None])
def test_only_a_winner_that_was_not_guessed_takes_a_pass_of_its_own(guesses, monkeypatch):
    policy, model = pair_in_float32("shared lora")
    if guesses is not None:
        monkeypatch.setattr(cpu, "GUESSES", {1: guesses})
    guesses, passes = cpu.GUESSES.get(1, 0), []
    real = stacks.Stack.__call__
    monkeypatch.setattr(stacks.Stack, "__call__", lambda self, *a, **b: (passes.append(b), real(self, *a, **b))[1])
    got = decoded(policy, model, prompts([4]), ["ann"], reward_weight=3.0, eos_token_id=[])
    missed = int((got.slots[0, :-1] >= guesses).sum())  # nothing follows the last token
    assert 0 < missed < 11 and len(passes) == 1 + 12 + missed


@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
def test_rows_that_have_finished_take_no_work(weights, monkeypatch):
    policy, model = pair_in_float32(weights)
    counted = []
    real = stacks.Stack.__call__

    def counting(self, ids, cache, mask=None, **more):
        counted.append(int(mask.sum()) if mask is not None else ids.numel())
        return real(self, ids, cache, mask, **more)

    monkeypatch.setattr(stacks.Stack, "__call__", counting)
    rows, changes = prompts([4, 1, 9]), dict(eos_token_id=list(range(1, 30)), pad_token_id=50, reward_weight=2.0)
    got = decoded(policy, model, rows, USERS, **changes)
    worked = sum(counted)
    counted.clear()
    same(got, plain(policy, model, rows, USERS, **changes))
    steps = int((got.tokens != 50).sum())  # of rows that went on
    prompt, k = sum(map(len, rows)), 5
    most = {"own": 2 * prompt + steps * (k + 1), "shared": prompt + steps * k, "shared lora": 2 * prompt + steps * (k + 1)}
    assert worked <= most[weights] and got.lengths.min() < got.lengths.max()


def test_which_models():
    policy, model = pair_in_float32("shared lora")
    assert type(cpu.of(policy, model, 1, 8)) is cpu.OneStack
    assert type(cpu.of(policy, pair_in_float32("own")[1], 1, 8)) is cpu.TwoStacks
    assert type(cpu.of(policy, model.merge(), 1, 8)) is cpu.TwoStacks
    assert not cpu.possible(tiny_lm(), reward_model(tiny_lm()))  # float64
    assert not cpu.possible(policy, pair_in_float32("own", "phi")[1])


def test_without_room_for_the_weights_it_goes_through_transformers(monkeypatch):
    policy, model = pair_in_float32("own")
    monkeypatch.setattr(keep.psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    assert not cpu.possible(policy, model)
    assert eager.of(policy, model, 1, 5) is eager.TwoPasses
    same(decoded(policy, model, prompts([4]), ["ann"]), plain(policy, model, prompts([4]), ["ann"]))


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
