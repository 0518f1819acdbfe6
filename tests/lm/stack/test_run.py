"""The CPU stack computes what transformers computes, and a token's state depends on nothing but the text before it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_lm
from decoding import alike, chosen
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stacks import (
    AVAILABLE,
    FAMILIES,
    VOCABULARY,
    batches,
    check_that_states_are_their_own,
    close,
    hf_states,
    identical,
    models,
    random_lm,
    using,
    with_lora,
)

from pyargs.errors import PyargsError
from pyargs.lm.stack import keep, pack
from pyargs.lm.stack import run as stacks


@settings(max_examples=60, deadline=None)
@given(model=models(), batch=batches(), capability=st.sampled_from(AVAILABLE))
def test_prompts_of_any_model_as_in_transformers(model, batch, capability):
    ids, mask, _ = batch
    stack = pack.pack(model)
    with using(capability):
        states = stack(ids, stack.cache(len(ids), ids.shape[1]), mask)
        logits = stack.logits(states[:, -1])
    assert (states[~mask] == 0).all()
    for row, last, text, seen in zip(states, logits, ids, mask, strict=True):
        close(row[seen], hf_states(model, text[seen]))
        with torch.no_grad():
            close(last, model(text[seen][None]).logits[0, -1])


@settings(max_examples=30, deadline=None)
@given(model=models(), batch=batches(), k=st.integers(1, 14), data=st.data(), capability=st.sampled_from(AVAILABLE))
def test_branches_and_the_committed_one_as_in_transformers(model, batch, k, data, capability):
    ids, mask, lengths = batch
    stack = pack.pack(model)
    texts = [text[seen].tolist() for text, seen in zip(ids, mask, strict=True)]
    with using(capability):
        cache = stack.cache(len(ids), ids.shape[1] + 3 + k)
        stack(ids, cache, mask)
        for _ in range(3):
            candidates = torch.randint(0, VOCABULARY, (len(ids), k))
            states = stack(candidates, cache, branches=True)
            for b, text in enumerate(texts):
                for j in range(k):
                    close(states[b, j], hf_states(model, [*text, int(candidates[b, j])])[-1])
            slot = torch.tensor([data.draw(st.integers(0, k - 1)) for _ in texts])
            stack.commit(cache, slot)
            texts = [[*text, int(candidates[b, slot[b]])] for b, text in enumerate(texts)]
        assert cache.length == [length + 3 for length in lengths]
        last = stack(torch.zeros(len(ids), 1, dtype=torch.long), cache)
    for b, text in enumerate(texts):
        close(last[b, 0], hf_states(model, [*text, 0])[-1])


@pytest.mark.parametrize("capability", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "smollm3"])
def test_a_state_does_not_depend_on_its_pass(family, capability, dtype, with_threads):
    stack = pack.pack(random_lm(family, hidden=44, inner=45, head_dim=10, **FAMILIES[family]), dtype=dtype)
    with using(capability):
        check_that_states_are_their_own(stack, with_threads)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), 7.0).contiguous().view(torch.int32)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), capability=st.sampled_from(AVAILABLE), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_largest_logits_are_those_of_the_whole_output_layer(data, capability, dtype):
    """Bit by bit: ties, numbers that are none, and those at the ends of the range included. All others are smaller."""
    draw, heads = data.draw, data.draw(st.integers(1, 70))
    model = random_lm(
        heads=heads, kv_heads=heads, head_dim=2, hidden=2 * heads, layers=1, vocabulary=draw(st.integers(1, 3000))
    )
    torch.manual_seed(draw(st.integers(0, 999)))
    weight = model.get_output_embeddings().weight.data
    if draw(st.booleans()):
        weight *= torch.randn(len(weight), 1).exp()
    else:  # hard to tell apart
        weight.copy_(weight[:1] + weight * draw(st.sampled_from([1e-1, 1e-2, 1e-7])))
    weight *= draw(st.sampled_from([1.0, 1e-12, 1e-20, 1e-37, 1e15, 1e23, 1e38]))
    odd = torch.randint(0, len(weight), (draw(st.integers(0, 6)),))
    weight[odd, torch.randint(0, weight.shape[1], odd.shape)] *= draw(st.sampled_from([0.0, 30.0, 1e-39, 1e30]))
    weight[torch.randint(0, len(weight), odd.shape)] = weight[odd]
    weight[odd[:1], 0] = draw(st.sampled_from([0.0, 1.0, torch.inf, -torch.inf, torch.nan]))
    states = torch.randn(draw(st.integers(1, 8 if dtype == torch.float32 else 2)), weight.shape[1])
    states[0] *= draw(st.sampled_from([1.0, 0.0, 1e-18, 1e-23, 1e-30, 1e-38, 1e15, 1e30, torch.nan]))
    vocabulary = draw(st.integers(1, len(weight)))
    top = draw(st.integers(1, min(vocabulary, 64)))
    stack = pack.pack(model, dtype=dtype)
    with using(capability):
        whole, found = stack.logits(states)[:, :vocabulary], stack.logits(states, top=top, vocabulary=vocabulary)
        for row, state in zip(found, states, strict=True):
            identical(bits(stack.logits(state[None], top=top, vocabulary=vocabulary)[0]), bits(row))
    for right, row in zip(whole, found, strict=True):
        order = right.sort(descending=True, stable=True).indices[:top]
        identical(row.sort(descending=True, stable=True).indices[:top], order)
        identical(bits(row[order]), bits(right[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_screen_leaves_most_of_the_output_layer_out(dtype):
    """Else it would be exact, and of no use; a row that has finished, all zero, is left out as a whole."""
    stack = pack.pack(random_lm(hidden=256, head_dim=64, layers=1, vocabulary=20000), dtype=dtype)
    states = torch.cat([torch.randn(1, 256), torch.zeros(1, 256)])
    whole, found = stack.logits(states), stack.logits(states, top=10)
    assert 10 <= (whole[0] == found[0]).sum() < 2000
    assert (whole - found).abs().max() < 0.01 * whole.abs().max()
    identical(found[1], torch.zeros(20000))


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts(family):
    model = random_lm(family, layers=1, **FAMILIES[family])
    stack = pack.pack(model)
    text = torch.randint(0, VOCABULARY, (1, 1500))
    close(stack(text, stack.cache(1, 1500))[0], hf_states(model, text[0]))


@settings(max_examples=15, deadline=None)
@given(model=models(), batch=batches(), capability=st.sampled_from(AVAILABLE))
def test_bfloat16_is_as_near_to_the_truth_as_that_of_transformers(model, batch, capability):
    assume(model.config.hidden_size >= 8)  # a norm over one or two numbers makes a sign of a rounding
    ids, mask, _ = batch
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).float()
    for stack in (pack.pack(half), pack.pack(exact, dtype=torch.bfloat16)):
        with using(capability):
            states = stack(ids, stack.cache(len(ids), ids.shape[1]), mask)
        for row, text, seen in zip(states, ids, mask, strict=True):
            truth, theirs = hf_states(exact, text[seen]), hf_states(half, text[seen])
            assert (row[seen] - truth).pow(2).mean() <= 2 * (theirs - truth).pow(2).mean() + 1e-4 * truth.pow(2).mean()


def test_policy_and_reward_model_in_one_pass():
    """Two policy rows and k reward-model rows of each sequence, each with its own row of the cache."""
    model = random_lm()
    tuned, k = with_lora(model), 5
    stack = pack.pack(model, adapter=tuned)
    ids, prompt = torch.randint(0, VOCABULARY, (2, k)), torch.randint(0, VOCABULARY, (2, 9))
    cache = stack.cache(4, 9 + k)
    delta = [False, False, True, True]
    stack(prompt.repeat(2, 1), cache, delta=delta)
    mask = torch.ones(4, k, dtype=torch.bool)
    mask[:2, 2:] = False
    states = stack(ids.repeat(2, 1), cache, mask, branches=True, delta=delta)
    for b in range(2):
        for j in range(k):
            text = [*prompt[b].tolist(), int(ids[b, j])]
            close(states[2 + b, j], hf_states(tuned, text)[-1])
            if j < 2:
                close(states[b, j], hf_states(model, text)[-1])
    assert (states[:2, 2:] == 0).all()
    stack.commit(cache, torch.tensor([1, -1, 1, -1]))
    assert cache.length == [10, 9, 10, 9]


def test_wrong_arguments_are_errors():
    model = random_lm()
    stack = pack.pack(model)
    cache = stack.cache(2, 8)
    ids = torch.zeros(2, 6, dtype=torch.long)
    stack(ids, cache)
    for call, message in [
        (lambda: stack(ids, cache), "full"),
        (lambda: stack(ids[:, :3], cache, branches=True), "full"),
        (lambda: stack(ids[:, :1] + VOCABULARY, cache), "vocabulary"),
        (lambda: stack(ids[:, :1] - 1, cache), "vocabulary"),
        (lambda: stack(ids[0], cache), r"\[B, n\]"),
        (lambda: stack(ids[:, :1] + 0.5, cache), "ids must be whole numbers, got torch.float32"),
        (lambda: stack(ids[:, :1], cache, rows=[0.0, 1.7]), "rows must be whole numbers"),
        (lambda: stack(ids[:, :1], cache, torch.ones(2, 2)), "mask"),
        (lambda: stack(ids[:, :1], cache, rows=[0, 2]), "row"),
        (lambda: stack(ids.repeat(2, 1)[:, :1], cache), "rows of ids"),
        (lambda: stack(ids[:, :1], cache, rows=[1, 1]), "twice"),
        (lambda: stack(ids[:, :1], cache, delta=True), "adapter"),
        (lambda: stack.commit(cache, torch.tensor([0, 2])), "slot"),
        (lambda: cache.copy(2, 0, 0), "not in the cache"),
        (lambda: cache.copy(0, 0, 0), "no copy of itself"),
        (lambda: cache.copy(1, 0, 9), "not as many"),
        (lambda: stack.logits(torch.zeros(2, 31)), "states"),
        (lambda: stack.logits(torch.zeros(2, 32), top=-1), "the -1 largest"),
        (lambda: stack.logits(torch.zeros(2, 32), vocabulary=-1), "-1 tokens"),
        (lambda: stack.logits(torch.zeros(2, 32), vocabulary=VOCABULARY + 1), "tokens"),
        (lambda: stack(ids[:, :1], pack.pack(random_lm(layers=1)).cache(2, 8)), "sizes"),
        (lambda: pack.pack(model.get_decoder()).logits(torch.zeros(1, 32)), "output layer"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
    assert cache.length == [6, 6]  # a pass that failed leaves no trace
    assert stack(ids[:, :0], cache).shape == (2, 0, 32)


def test_only_a_branch_of_the_last_pass_is_committed():
    stack = pack.pack(random_lm())
    cache = stack.cache(3, 12)
    ids = torch.zeros(3, 3, dtype=torch.long)
    stack(ids, cache)
    stack(ids, cache, torch.tensor([[1, 0, 1]] * 3, dtype=torch.bool), branches=True)
    for slot, rows, message in [
        ([0, 1, 0], None, "no branch"),  # masked out
        ([0, 3, 0], None, "no branch"),
        ([0, 2], [1, 1], "twice"),
    ]:
        with pytest.raises(PyargsError, match=message):
            stack.commit(cache, torch.tensor(slot), rows)
    assert cache.length == [3, 3, 3]
    stack.commit(cache, torch.tensor([2, -1, -1]))
    stack(ids[:1, :1], cache, rows=[1])
    for slot, row in [(0, 0), (0, 1)]:  # behind a commit and behind an ordinary token
        with pytest.raises(PyargsError, match="no branch"):
            stack.commit(cache, torch.tensor([slot]), [row])
    stack(ids, cache, branches=True)
    cache.cut(2)
    with pytest.raises(PyargsError, match="no branch"):
        stack.commit(cache, torch.tensor([0, 0, 0]))
    assert cache.length == [2, 2, 2]


def test_a_pass_ends_with_fewer_threads_than_asked_for():
    """Whoever is there takes the share of those who never come."""
    code = (
        "import torch; from conftest import tiny_lm; from pyargs.lm.stack.pack import pack; torch.set_num_threads(8);"
        "stack = pack(tiny_lm(dtype=torch.float32)); ids = torch.arange(40).view(2, 20);"
        "many = stack(ids, stack.cache(2, 20)); torch.set_num_threads(1);"
        "assert many.equal(stack(ids, stack.cache(2, 20)))"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=300, check=True)


def test_what_prompts_share_is_computed_once(monkeypatch):
    policy, rows = tiny_lm(dtype=torch.float32), alike([(0, 9), (7, 9), (9, 9), (8, 8), (0, 3), (2, 7)])
    stack, counts, call = keep.stack_of(policy), [], stacks.Stack.__call__

    def counted(self, ids, cache, mask=None, **more):
        counts.append(ids.numel() if mask is None else int(mask.sum()))
        return call(self, ids, cache, mask, **more)

    monkeypatch.setattr(stacks.Stack, "__call__", counted)
    chosen(policy, None, rows, max_new_tokens=1)
    assert counts == [9 + 3 + 7, 2 + 2 + 1]  # a prompt that another begins with still needs its own last state
    counts.clear()
    groups = [(row, [[5, 6]]) for row in rows]
    together = list(stacks.continuations(stack, groups))
    assert counts[::2] == [9, 2, 1, 1, 3, 5]
    for group, (last, (states,)) in zip(groups, together, strict=True):
        ((alone, (its,)),) = stacks.continuations(stack, [group])
        assert torch.equal(last, alone) and torch.equal(states, its)


def test_a_cache_is_not_cut_below_nothing():
    stack = keep.stack_of(tiny_lm(dtype=torch.float32))
    cache = stack.cache(1, 8)
    with pytest.raises(PyargsError, match="cannot keep -5"):
        cache.cut(-5)
    with pytest.raises(RuntimeError, match="outside the cache"):
        cache.native.length = [-3]
    with pytest.raises(RuntimeError, match="for each row"):
        cache.native.length = [1, 1]
