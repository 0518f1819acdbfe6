"""A function of whole texts where a decoder stands: what it is given, and what it may return."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.errors import PyargsError
from pyargs.lm.called import TEXTS, Called
from pyargs.scoring import response_states


def of_text(ids, mask):
    """Depends on every token, its place and the length; what stands in the padding has no part in it."""
    place = torch.arange(1, ids.shape[1] + 1)
    return ((ids * place * mask).sum(1) % 101).double() / 7 + mask.sum(1) / 3


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_each_text_has_the_reward_that_it_has_alone(texts, prompt):
    model, alone = (
        Called(of_text, pad=5),
        lambda text: of_text(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long)),
    )
    torch.testing.assert_close(model.rewards(texts), torch.cat([alone(text) for text in texts]).float())
    (states,) = response_states(model, [(prompt, texts)])
    for text, found in zip(texts, states, strict=True):
        want = [alone([*prompt, *text[: end + 1]]) for end in range(len(text))]
        torch.testing.assert_close(found, torch.stack(want).float())


def test_what_the_function_is_given():
    seen = []

    def reward(ids, mask):
        seen.append((ids.clone(), mask.clone()))
        return mask.sum(1).float()

    model = Called(reward, pad=9)
    assert model.rewards([[3, 4, 5], [6]]).tolist() == [3.0, 1.0]
    ((ids, mask),) = seen
    assert ids.dtype == mask.dtype == torch.long
    assert ids.tolist() == [[3, 4, 5], [6, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert model.states([1], [2] * (TEXTS + 2)).flatten().tolist() == [float(n + 2) for n in range(TEXTS + 2)]
    assert max(len(ids) for ids, _ in seen) == TEXTS
    assert model.states([1], []).shape == (0, 1)


def test_what_is_wrong_is_refused_with_the_function_s_name():
    returned = []

    def taste(ids, mask):
        return returned[-1](ids)

    model = Called(taste, pad=0)
    for made, message in [
        (lambda ids: torch.zeros(len(ids), 1), r"taste must return floats of shape \[2\], got torch.float32 \[2, 1\]"),
        (lambda ids: torch.zeros(len(ids) + 1), r"taste must return floats of shape \[2\]"),
        (lambda ids: torch.zeros(len(ids), dtype=torch.long), "taste must return floats .* got torch.int64"),
        (lambda ids: [0.0] * len(ids), "taste must return floats .* got a list"),
        (lambda ids: torch.tensor([0.0, float("nan")]), "taste returned rewards that are no finite numbers"),
        (lambda ids: torch.tensor([0.0, float("inf")]), "taste returned rewards that are no finite numbers"),
    ]:
        returned.append(made)
        with pytest.raises(PyargsError, match=message):
            model.rewards([[3], [4, 5]])
    with pytest.raises(PyargsError, match="function of ids and mask"):
        Called("taste", pad=0)
