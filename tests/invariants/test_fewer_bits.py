"""Guided decoding with weights in fewer bits: a row alone as in any company, and a file's blocks as float32."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model
from decoding import USERS, chosen, engine_of, pair_in_float32, prompts, same
from gguf_files import write_gguf
from stacks import random_lm

from pyargs.decode.pair import load_pair
from pyargs.decode.scorer import Scorer
from pyargs.errors import PyargsError
from pyargs.lm import bits, lora
from pyargs.lm.forward import packed_states
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import pack
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.scoring import response_logprobs, response_states
from pyargs.types import Users

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


def test_rewards_of_whole_answers_are_those_of_the_steps(lm_folder, tmp_path):
    """Of a model with LoRA on the policy's weights, loaded with them: RM accuracy and best-of-N see their rounding."""
    model = reward_model(load_lm(lm_folder)[0])
    lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "down_proj"])
    for name, parameter in model.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.about |= {"backbone": lm_folder, "dtype": "float32"}
    model.save_pretrained(tmp_path / "model")
    found = {}
    for dtype in ("float32", "int8"):
        policy, model = load_pair(lm_folder, tmp_path / "model", dtype=dtype)
        (answer,) = engine_of(policy, model).generate([[5, 9, 7]], ["ann"], reward_weight=1.0, max_new_tokens=6, stop=[])
        (steps,) = model.step_sums([([5, 9, 7], [answer.tokens])], ["ann"])
        assert steps.item() == pytest.approx(sum(answer.rewards), abs=1e-5)
        scorer = Scorer(model)
        scorer.prefill(["row"], [[5, 9, 7]], ["ann"])
        assert scorer.score([answer.tokens[:1]]).item() == pytest.approx(answer.rewards[0], abs=1e-5)
        scorer.advance(["row"], answer.tokens[:1])
        assert scorer.score([answer.tokens[1:2]]).item() == pytest.approx(answer.rewards[1], abs=1e-5)
        found[dtype] = model.step_sums([([5, 9, 7], [[8, 6, 4]])], ["ann"])[0].item()
    assert found["int8"] != pytest.approx(found["float32"], abs=1e-4)


def test_a_reward_model_in_fewer_bits_stays_so_beside_its_own_float32():
    policy, model = pair_in_float32("shared")
    rewards = [chosen(policy, model, ROWS, USERS, backend="cpu")[0].rewards]
    bits.hold(model.backbone, "int8")
    rewards.append(chosen(policy, model, ROWS, USERS, backend="cpu")[0].rewards)
    scorer = Scorer(model)
    scorer.prefill(["row"], [ROWS[0]], USERS[:1])
    first = chosen(policy, model, ROWS[:1], USERS[:1], backend="cpu", max_new_tokens=1)[0]
    assert scorer.score([first.tokens]).item() == first.rewards[0] == rewards[1][0] != rewards[0][0]


def test_a_pass_of_transformers_is_refused(monkeypatch):
    """Where the stack does not compute, float32 would come in the place of what was asked for."""
    policy, model = pair_in_float32("shared")
    bits.hold(policy, "int8")
    groups = [([5, 9], [[7, 4]])]
    soft = UserPolicy(policy, None, soft=SoftPrompt(torch.randn(1, 2, policy.config.hidden_size), Users()))
    packed = pack([one for one, _ in groups], [several for _, several in groups])
    with pytest.raises(PyargsError, match="CPU stack alone"):
        soft.logprobs(packed, torch.zeros(1, dtype=torch.long))
    with pytest.raises(PyargsError, match="soft prompt"):
        engine_of(None, soft)
    with pytest.raises(PyargsError, match="CPU stack alone"):
        packed_states(policy.get_decoder(), packed)
    with monkeypatch.context() as patch:
        patch.setenv("PYARGS_BACKEND", "eager")
        for read, one in ((response_logprobs, policy), (response_states, policy.get_decoder())):
            with pytest.raises(PyargsError, match="CPU stack alone"):
                read(one, groups)
    policy.get_decoder().register_forward_hook(lambda *_: None)
    for read, one in ((response_logprobs, policy), (response_states, policy.get_decoder())):
        with pytest.raises(PyargsError, match="CPU stack alone"):
            read(one, groups)


def test_other_ways_to_compute_it_are_refused():
    policy, model = pair_in_float32("shared")
    bits.hold(policy, "int8")
    for backend in ("eager", "cuda-graph"):
        with pytest.raises(PyargsError, match="dtype='int8' is for the CPU stack alone"):
            engine_of(policy, model, backend=backend)
    policy.get_decoder().register_forward_hook(lambda *_: None)
    with pytest.raises(PyargsError, match="CPU stack alone"):
        engine_of(policy, model)
