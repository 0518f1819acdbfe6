"""What is no number in one text stays there: the CPU stack never multiplies what a token does not see."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import AVAILABLE, VOCABULARY, identical, random_lm, using, with_lora

from pyargs.lm.stack import pack, run

BAD = 7
"""The token whose embedding is no number."""


@functools.cache
def stack_with(value: float, dtype: torch.dtype = torch.float32) -> run.Stack:
    model = random_lm(heads=6, hidden=48)
    model.get_input_embeddings().weight.data[BAD] = value
    return pack.pack(model, dtype=dtype)


def same(ours, theirs):
    """Bit by bit, any NaN as good as another."""
    assert ours.shape == theirs.shape
    identical(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0))


def test_a_response_that_is_no_number_reaches_no_other():
    stack = stack_with(torch.nan)
    groups = [([3, 4, 5], [[7, 8, 9], [10, 11]]), ([3, 4, 5], [[10, 11]]), ([20, 21], [[12, 13]])]
    found = list(run.continuations(stack, groups))
    assert found[0][1][0].isnan().all()
    for group, (last, states) in zip(groups, found, strict=True):
        for response, state in zip(group[1], states, strict=True):
            ((alone_last, (alone,)),) = run.continuations(stack, [(group[0], [response])])
            same(last, alone_last)
            same(state, alone)
            assert BAD in response or state.isfinite().all()


tokens = st.integers(0, 9)  # 7 comes often
texts = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=40), texts), min_size=1, max_size=4),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38]),
    capability=st.sampled_from(AVAILABLE),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_continuations_are_those_of_each_response_alone(groups, value, capability, dtype):
    stack = stack_with(value, dtype)
    with using(capability):
        found = list(run.continuations(stack, groups))
        for (prompt, several), (last, states) in zip(groups, found, strict=True):
            for response, state in zip(several, states, strict=True):
                ((alone_last, (alone,)),) = run.continuations(stack, [(prompt, [response])])
                same(last, alone_last)
                same(state, alone)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]), capability=st.sampled_from(AVAILABLE))
def test_a_row_does_not_see_what_its_cache_held_before(data, value, capability):
    """Prompts, branches, commits, cuts and copies in any order: a row's states are those of its text in a new cache."""
    draw, rows, capacity = data.draw, 3, 60
    stack = stack_with(value)
    with using(capability):
        cache, text, fresh = stack.cache(rows, capacity), [[] for _ in range(rows)], stack.cache(1, capacity)

        def alone(ids: list[int]) -> torch.Tensor:
            fresh.native.length = [0]
            return stack(torch.tensor([ids]), fresh)[0]

        for _ in range(draw(st.integers(1, 8))):
            room = capacity - max(map(len, text))
            what = draw(st.sampled_from(["tokens", "branches", "cut", "copy"]))
            if what == "cut":
                keep = draw(st.integers(0, 40))
                cache.cut(keep)
                text = [one[:keep] for one in text]
            elif what == "copy":
                to, source = draw(st.permutations(range(rows)))[:2]
                length = draw(st.integers(0, len(text[source])))
                cache.copy(to, source, length)
                text[to] = text[source][:length]
            elif room >= 9:
                ids = torch.tensor([draw(st.lists(tokens, min_size=9, max_size=9)) for _ in range(rows)])
                states = stack(ids, cache, branches=what == "branches")
                if what == "tokens":
                    text = [one + more for one, more in zip(text, ids.tolist(), strict=True)]
                    for one, row in zip(text, states, strict=True):
                        same(row, alone(one)[-9:])
                    continue
                for one, row, several in zip(text, states, ids.tolist(), strict=True):
                    for token, state in zip(several, row, strict=True):
                        same(state, alone([*one, token])[-1])
                slot = torch.tensor([draw(st.integers(-1, 8)) for _ in range(rows)])
                stack.commit(cache, slot)
                for one, several, chosen in zip(text, ids.tolist(), slot.tolist(), strict=True):
                    one += several[chosen : chosen + 1] if chosen >= 0 else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_lora_that_is_no_number_stays_with_the_rows_that_ask_for_it(dtype, value):
    model = random_lm()
    tuned = with_lora(model, ("q_proj", "o_proj", "up_proj", "down_proj"))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data[0, 0] = value
    stack, ids = pack.pack(model, adapter=tuned, dtype=dtype), torch.randint(0, VOCABULARY, (5, 6))
    plain = stack(ids, stack.cache(5, 6))
    mixed = stack(ids, stack.cache(5, 6), delta=[True, False, True, True, False])
    same(mixed[[1, 4]], plain[[1, 4]])
    assert plain.isfinite().all() and not mixed[[0, 2, 3]].isfinite().all()
