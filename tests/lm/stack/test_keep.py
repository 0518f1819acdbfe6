"""One packed stack for each model: as long as there is room, and nothing in the model has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_lm
from decoding import USERS, by_reference, chosen, pair_in_float32, prompts, same

from pyargs import _C
from pyargs.lm import lora
from pyargs.lm.stack import keep, pack
from pyargs.ops.library import has_extension
from pyargs.scoring import response_logprobs

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")


@pytest.fixture
def packed(monkeypatch) -> list:
    """Grows with every model that is packed."""
    found, real = [], pack.pack
    monkeypatch.setattr(keep, "pack", lambda *a: (found.append(a), real(*a))[1])
    return found


def test_a_stack_is_packed_once_and_anew_when_weights_change(packed):
    policy, model = pair_in_float32("own")
    rows = prompts([4, 2])
    for _ in range(2):
        chosen(policy, model, rows, USERS[:2])
    assert len(packed) == 2
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1.0)
    same(chosen(policy, model, rows, USERS[:2]), by_reference(policy, model, rows, USERS[:2]))
    assert len(packed) == 3


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "900000", "memory.current": "899000", "memory.stat": "anon 5\nactive_file 100\ninactive_file 200\n"},
        {
            "memory/memory.limit_in_bytes": "900000",
            "memory/memory.usage_in_bytes": "899000",
            "memory/memory.stat": "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n",
        },
    ],
)
def test_a_container_has_the_memory_that_its_group_may_still_take(files, tmp_path, monkeypatch):
    monkeypatch.setattr(keep, "CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert keep.available_memory() == 1300
    assert not keep.can_pack(tiny_lm(dtype=torch.float32))
    limit = tmp_path / next(iter(files))
    for no_limit in ("max", "9223372036854771712"):
        limit.write_text(no_limit)
        assert keep.available_memory() > 2**25 and keep.can_pack(tiny_lm(dtype=torch.float32))


@pytest.mark.parametrize(
    "files, threads",
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "damaged"}, 3),
        ({}, 3),
    ],
)
def test_a_pass_has_no_more_threads_than_its_container_has_time_for(files, threads, tmp_path, monkeypatch, with_threads):
    monkeypatch.setattr(keep, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    try:
        keep.limit_threads()
        assert with_threads(3, _C.thread_count) == threads
    finally:
        _C.limit_threads(2**40)


def test_one_stack_serves_a_model_and_its_decoder(packed):
    policy, _ = pair_in_float32("shared lora")
    keep.stack_of(policy.get_decoder())
    full = keep.stack_of(policy)
    assert full is keep.stack_of(policy.get_decoder()) and len(packed) == 2


def test_reward_models_that_take_turns_share_the_packed_weights(packed):
    policy, one = pair_in_float32("shared lora")
    two = copy.deepcopy(one)
    for name, parameter in two.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    rows = prompts([4, 2])
    for model in (one, two, one, two):
        same(chosen(policy, model, rows, USERS[:2]), by_reference(policy, model, rows, USERS[:2]))
    assert len(packed) == 1
    first, second = (keep.stack_of(policy, model.backbone) for model in (one, two))
    assert first is not second and first is keep.stack_of(policy, one.backbone)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1.0)
    same(chosen(policy, one, rows, USERS[:2]), by_reference(policy, one, rows, USERS[:2]))
    assert len(packed) == 2


def changed(policy, how: str) -> None:
    if how == "fused optimizer":
        policy.requires_grad_(True)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, fused=True)
        policy(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
        optimizer.step()
    elif how == "data":
        for parameter in policy.parameters():
            parameter.data.mul_(1.5)
    elif how == "lora scaling":
        for layer in lora.layers_of(policy.get_decoder()):
            layer.scaling["default"] *= -3.0
    elif how == "adapter off":
        for layer in lora.layers_of(policy.get_decoder()):
            layer.enable_adapters(False)
    elif how == "hook":
        policy.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    elif how == "epsilon":
        policy.model.norm.variance_epsilon = 0.5


@pytest.mark.parametrize("how", ["fused optimizer", "data", "lora scaling", "adapter off", "hook", "epsilon"])
def test_what_is_changed_after_packing_is_seen(how, monkeypatch):
    _, model = pair_in_float32("shared lora")
    policy = tiny_lm(dtype=torch.float32)
    policy.model = model.backbone
    groups = [([5, 6, 7], [[8, 9], [10]])]
    before = response_logprobs(policy, groups)
    changed(policy, how)
    ours = response_logprobs(policy, groups)
    monkeypatch.setattr(keep, "can_pack", lambda model: False)
    torch.testing.assert_close(ours, response_logprobs(policy, groups), atol=2e-4, rtol=2e-4)
    assert not torch.allclose(ours[0][0], before[0][0], atol=1e-2)
