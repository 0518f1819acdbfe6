"""Which of the two ways through transformers is taken: one pass for both models, or two."""

from __future__ import annotations

from conftest import reward_model, tiny_lm
from decoding import shared_pair

from pyargs.decode.backends import eager


def test_which_way():
    policy = tiny_lm()
    frozen = reward_model(policy)
    assert eager.of(policy, frozen, 64, 10) is eager.OnePass
    assert eager.of(policy, reward_model(tiny_lm(seed=3)), 1, 2) is eager.TwoPasses
    policy, adapted = shared_pair("shared lora", "linear", 0)
    assert eager.of(policy, adapted, 1, 10) is eager.OnePass
    assert eager.of(policy, adapted, 8, 10) is eager.TwoPasses  # too many rows for a CPU
    assert eager.of(policy.float(), adapted.float().merge(), 1, 10) is eager.TwoPasses
    assert eager.of(policy, reward_model(tiny_lm("qwen2")), 1, 10) is eager.TwoPasses
    frozen.backbone.norm.weight.data[0] += 1
    assert eager.of(tiny_lm(), frozen, 1, 10) is eager.TwoPasses
