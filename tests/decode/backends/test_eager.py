"""Which of the two ways through transformers is taken: one pass for both models, or two."""

from __future__ import annotations

from conftest import reward_model, tiny_lm
from decoding import shared_pair

from pyargs.decode.backends import eager


def test_which_way():
    policy = tiny_lm()
    frozen = reward_model(policy)
    assert eager.shares(policy, frozen.backbone, 64, 10)
    assert not eager.shares(policy, reward_model(tiny_lm(seed=3)).backbone, 1, 2)
    policy, adapted = shared_pair("shared lora", "linear", 0)
    assert eager.shares(policy, adapted.backbone, 1, 10)
    assert not eager.shares(policy, adapted.backbone, 8, 10)  # too many rows for a CPU
    assert not eager.shares(policy.float(), adapted.float().merge().backbone, 1, 10)
    assert not eager.shares(policy, reward_model(tiny_lm("qwen2")).backbone, 1, 10)
    frozen.backbone.norm.weight.data[0] += 1
    assert not eager.shares(tiny_lm(), frozen.backbone, 1, 10)
