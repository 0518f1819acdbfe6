"""A pass in float32 through a model of 16 bits is that of the model in float32, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from company import in_threads
from conftest import FULL_ATTENTION, tiny_lm

from pyargs.lm.exact import HALVES, InFloat32

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", [*FULL_ATTENTION, "gemma", "glm"])
@torch.no_grad()
def test_a_pass_is_that_of_the_model_in_float32(family, dtype):
    model = tiny_lm(family, dtype=dtype)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with InFloat32():
        found = model(IDS)
    wide = copy.deepcopy(model).float()
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits, wide(IDS).logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(one, before[name]) and one.dtype == before[name].dtype for name, one in model.state_dict().items())


@torch.no_grad()
def test_other_threads_compute_as_ever_and_what_is_written_to_keeps_its_dtype():
    x, kept, found = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16), []
    with InFloat32():
        in_threads(lambda _: found.append(x * 2), 1)
        assert (x * 2).dtype == x.sum(dtype=torch.float16).dtype == (x * 2).to(torch.bfloat16).dtype == torch.float32
        kept.add_(x * 2)
        kept[1:].copy_(x[1:] * 3)
    assert found[0].dtype == kept.dtype == torch.bfloat16 and kept.tolist() == [2, 3, 3]
