"""Decoding through the native stack: the tokens of transformers, and guesses of the winner that change nothing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reward_model, tiny_lm
from decode.test_args import USERS, arguments, plain, prompts, same
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode import args
from pyargs.decode import unguided as policy_alone
from pyargs.decode.backends import cpu, eager
from pyargs.decode.prompts import decode_prompts
from pyargs.decode.request import check
from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.stack import keep, pack
from pyargs.lm.stack import run as stacks
from pyargs.lm.tokenize import left_pad
from pyargs.models.user_policy import UserPolicy
from pyargs.ops.library import has_extension
from pyargs.scoring import response_logprobs, response_states

pytestmark = pytest.mark.skipif(not has_extension, reason="no extension")


def pair(weights: str, family: str = "llama", seed: int = 0):
    """As `shared_pair`, in float32, which the stack computes in."""
    policy = tiny_lm(family, seed=seed, dtype=torch.float32)
    model = reward_model(policy if weights != "own" else tiny_lm(family, seed=seed + 1, dtype=torch.float32))
    if weights == "shared lora":
        torch.manual_seed(seed)
        lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj", "down_proj"])
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
    return policy, model.eval()


def decoded(policy, model, rows, users, **changes):
    ids, mask = left_pad(rows, pad_id=1)
    return args.decode(policy, model, check(policy, model, ids, mask, users, **arguments(**changes)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("weights", ["own", "shared", "shared lora"])
@pytest.mark.parametrize("lengths", [[7], [1, 6], [4, 1, 9]])
@pytest.mark.parametrize("sample", [False, True])
def test_the_tokens_of_transformers(family, weights, lengths, sample):
    policy, model = pair(weights, family)
    assert cpu.possible(policy, model)
    rows, changes = prompts(lengths), dict(reward_weight=[2.0, 0.5, 0.0][: len(lengths)], do_sample=sample, max_new_tokens=9)
    same(
        decoded(policy, model, rows, USERS[: len(rows)], **changes), plain(policy, model, rows, USERS[: len(rows)], **changes)
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("guesses", [0, 1, 3, 9])
def test_guesses_change_nothing_bit_by_bit(rows, guesses, monkeypatch):
    policy, model = pair("shared lora")
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
    policy, model = pair("shared lora")
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
    policy, model = pair(weights)
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
    policy, model = pair("shared lora")
    assert type(cpu.of(policy, model, 1, 8)) is cpu.OneStack
    assert type(cpu.of(policy, pair("own")[1], 1, 8)) is cpu.TwoStacks
    assert type(cpu.of(policy, model.merge(), 1, 8)) is cpu.TwoStacks
    assert not cpu.possible(tiny_lm(), reward_model(tiny_lm()))  # float64
    assert not cpu.possible(policy, pair("own", "phi")[1])


@pytest.fixture
def packed(monkeypatch) -> list:
    """Grows with every model that is packed."""
    found, real = [], pack.pack
    monkeypatch.setattr(keep, "pack", lambda *a: (found.append(a), real(*a))[1])
    return found


def test_a_stack_is_packed_once_and_anew_when_weights_change(packed):
    policy, model = pair("own")
    rows = prompts([4, 2])
    for _ in range(2):
        decoded(policy, model, rows, USERS[:2])
    assert len(packed) == 2
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1.0)
    same(decoded(policy, model, rows, USERS[:2]), plain(policy, model, rows, USERS[:2]))
    assert len(packed) == 3


def test_without_room_for_the_weights_it_goes_through_transformers(monkeypatch):
    policy, model = pair("own")
    monkeypatch.setattr(keep.psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    assert not cpu.possible(policy, model)
    assert eager.of(policy, model, 1, 5) is eager.TwoPasses
    same(decoded(policy, model, prompts([4]), ["ann"]), plain(policy, model, prompts([4]), ["ann"]))


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
    assert keep._available() == 1300
    assert not keep.can_pack(tiny_lm(dtype=torch.float32))
    limit = tmp_path / next(iter(files))
    for no_limit in ("max", "9223372036854771712"):
        limit.write_text(no_limit)
        assert keep._available() > 2**25 and keep.can_pack(tiny_lm(dtype=torch.float32))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_states_and_log_probs_of_responses(family, monkeypatch):
    lm = tiny_lm(family, dtype=torch.float32)
    (long,) = prompts([100])
    groups = [([5, 6, 7], [[8, 9], [10], [11, 12, 13]]), (long[:70], [long, [4]]), ([3], [[2]])]
    ours = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups)
    monkeypatch.setattr(keep, "can_pack", lambda model: False)
    theirs = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=2e-4)


def test_short_responses_share_a_pass_and_do_not_meet(monkeypatch):
    """Bit by bit what each has alone, behind a prompt that is longer than a panel of keys, and fewer passes."""
    lm, counted = tiny_lm(dtype=torch.float32), []
    prompt, *several = prompts([37, 2, 16, 1, 9, 20, 60, 3, 48, 1, 0])
    groups = [(prompt, several), (prompt[:5], several[1:3]), ([7], []), (prompt, several[::-1])]
    alone = [
        [function(model, [(prompt, [one])])[0][0] for prompt, several in groups for one in several]
        for function, model in ((response_states, lm.get_decoder()), (response_logprobs, lm))
    ]
    real = stacks.Stack.__call__
    monkeypatch.setattr(stacks.Stack, "__call__", lambda self, *a, **b: (counted.append(a), real(self, *a, **b))[1])
    together = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups)
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip([one for several in ours for one in several], theirs, strict=True):
            assert torch.equal(one, other)
    assert len(counted) < 2 * (len(groups) + len(alone[0])) / 1.4


def test_an_empty_prompt_has_states_but_no_log_probs():
    lm = tiny_lm(dtype=torch.float32)
    (states,) = response_states(lm.get_decoder(), [([], [[5, 6], [7]])])
    assert [len(state) for state in states] == [2, 1]
    with pytest.raises(PyargsError, match="without a prompt"):
        response_logprobs(lm, [([], [[5, 6]])])


def test_one_stack_serves_a_model_and_its_decoder(packed):
    policy, _ = pair("shared lora")
    keep.stack_of(policy.get_decoder())
    full = keep.stack_of(policy)
    assert full is keep.stack_of(policy.get_decoder()) and len(packed) == 2


def test_reward_models_that_take_turns_share_the_packed_weights(packed):
    policy, one = pair("shared lora")
    two = copy.deepcopy(one)
    for name, parameter in two.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    rows = prompts([4, 2])
    for model in (one, two, one, two):
        same(decoded(policy, model, rows, USERS[:2]), plain(policy, model, rows, USERS[:2]))
    assert len(packed) == 1
    first, second = (keep.stack_of(policy, model.backbone) for model in (one, two))
    assert first is not second and first is keep.stack_of(policy, one.backbone)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1.0)
    same(decoded(policy, one, rows, USERS[:2]), plain(policy, one, rows, USERS[:2]))
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
        for layer in lora._layers(policy.get_decoder()):
            layer.scaling["default"] *= -3.0
    elif how == "adapter off":
        for layer in lora._layers(policy.get_decoder()):
            layer.enable_adapters(False)
    elif how == "hook":
        policy.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    elif how == "epsilon":
        policy.model.norm.variance_epsilon = 0.5


@pytest.mark.parametrize("how", ["fused optimizer", "data", "lora scaling", "adapter off", "hook", "epsilon"])
def test_what_is_changed_after_packing_is_seen(how, monkeypatch):
    _, model = pair("shared lora")
    policy = tiny_lm(dtype=torch.float32)
    policy.model = model.backbone
    groups = [([5, 6, 7], [[8, 9], [10]])]
    before = response_logprobs(policy, groups)
    changed(policy, how)
    ours = response_logprobs(policy, groups)
    monkeypatch.setattr(keep, "can_pack", lambda model: False)
    torch.testing.assert_close(ours, response_logprobs(policy, groups), atol=2e-4, rtol=2e-4)
    assert not torch.allclose(ours[0][0], before[0][0], atol=1e-2)


def test_features_and_log_probs_take_the_stack(monkeypatch):
    lm, packed = tiny_lm(dtype=torch.float32), []
    real = keep.stack_of
    monkeypatch.setattr(keep, "stack_of", lambda *a: (packed.append(a), real(*a))[1])
    response_states(lm.get_decoder(), [([5], [[6]])])
    response_logprobs(lm, [([5], [[6]])])
    assert len(packed) == 2


# -- the policy by itself ------------------------------------------------------------------------------------------------


def alike(lengths, seed=0):
    """Prompts of which many begin as the one before did: [(tokens taken over from it, length)]."""
    rows, generator = [[]], torch.Generator().manual_seed(seed)
    for kept, length in lengths:
        taken = rows[-1][: min(kept, length)]
        rows.append(taken + torch.randint(2, 61, (length - len(taken),), generator=generator).tolist())
    return rows[1:]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen2"]),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
    new=st.integers(1, 7),
    stop=st.sampled_from([None, 1, [1, 5, 9, 20, 33, 40, 41]]),
    seed=st.integers(0, 20),
)
def test_greedy_is_that_of_transformers(family, lengths, new, stop, seed):
    policy, rows = tiny_lm(family, seed=seed, dtype=torch.float32), alike(lengths, seed)
    policy.generation_config.eos_token_id = stop
    ours = policy_alone.generate(policy, rows, max_new_tokens=new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "possible", lambda *models: False)
        theirs = policy_alone.generate(policy, rows, max_new_tokens=new)
    same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_args_at_weight_0(dtype):
    policy, rows = tiny_lm(dtype=dtype, seed=3), prompts([4, 7, 2])
    model = reward_model(policy)
    guided = decoded(policy, model, rows, USERS, reward_weight=0.0, max_new_tokens=20)
    assert policy_alone.generate(policy, rows, max_new_tokens=20).tokens.tolist() == guided.tokens.tolist()


def test_what_prompts_share_is_computed_once(monkeypatch):
    policy, rows = tiny_lm(dtype=torch.float32), alike([(0, 9), (7, 9), (9, 9), (8, 8), (0, 3), (2, 7)])
    stack, counts, call = keep.stack_of(policy), [], stacks.Stack.__call__

    def counted(self, ids, cache, mask=None, **more):
        counts.append(ids.numel() if mask is None else int(mask.sum()))
        return call(self, ids, cache, mask, **more)

    monkeypatch.setattr(stacks.Stack, "__call__", counted)
    policy_alone.generate(policy, rows, max_new_tokens=1)
    assert counts == [9 + 3 + 7, 2 + 2 + 1]  # a prompt that another begins with still needs its own last state
    counts.clear()
    groups = [(row, [[5, 6]]) for row in rows]
    together = list(stacks.continuations(stack, groups))
    assert counts[::2] == [9, 2, 1, 1, 3, 5]
    for group, (last, (states,)) in zip(groups, together, strict=True):
        ((alone, (its,)),) = stacks.continuations(stack, [group])
        assert torch.equal(last, alone) and torch.equal(states, its)


def test_prompts_with_one_users_demonstrations_are_neighbours(monkeypatch):
    model = UserPolicy(tiny_lm(dtype=torch.float32), tokenizer=range(61), demonstrations="some")
    shown = {"ann": [9, 8, 7], "bob": [3, 4, 5, 6]}
    monkeypatch.setattr(model, "prompt_ids", lambda prompt, user, room: shown[user] + prompt)
    asked, users = [[11, 12], [20], [30, 31, 32], [40, 41]], ["ann", "bob", "ann", "bob"]
    for possible, expected in ((True, [[1, 3, 0, 2]]), (False, [[0, 1, 2, 3]])):
        monkeypatch.setattr(cpu, "possible", lambda *models, possible=possible: possible)
        got = list(decode_prompts(None, model, asked, users, batch_size=4, max_new_tokens=2))
        assert [numbers for numbers, _, _ in got] == expected
        for numbers, ids, decoded in got:
            assert ids == [shown[users[i]] + asked[i] for i in numbers] and len(decoded.tokens) == 4


def test_tokens_that_the_tokenizer_has_not_are_never_chosen():
    policy = tiny_lm(dtype=torch.float32, seed=2)
    rows = prompts([4, 7])
    policy.generation_config.eos_token_id = None
    free = policy_alone.generate(policy, rows, max_new_tokens=20).tokens
    policy.tokenizer = range(int(free.max()))  # the largest that was chosen is no token now
    for possible in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "possible", lambda *models, possible=possible: possible)
            assert policy_alone.generate(policy, rows, max_new_tokens=20).tokens.max() < free.max()


@pytest.mark.parametrize("possible", [True, False])
def test_a_policy_that_can_not_answer_says_so(possible, monkeypatch):
    policy = tiny_lm(dtype=torch.float32)
    if not possible:
        monkeypatch.setattr(cpu, "possible", lambda *models: False)
    for prompt, new, message in [
        ([], 2, "without a token"),
        ([5], 0, "at least 1, got 0"),
        ([5], -3, "at least 1"),
        ([5] * 120, 9, "120 prompt . 9 new tokens exceed the 128 positions of LlamaForCausalLM"),
    ]:
        with pytest.raises(PyargsError, match=message):
            policy_alone.generate(policy, [[5], prompt], max_new_tokens=new)
    with pytest.raises(PyargsError, match="must be a whole number, 0 to 60, got 61"):
        policy_alone.generate(policy, [[5, 61]], max_new_tokens=2)
    broken = tiny_lm(dtype=torch.float32)  # not one that was found to be whole before
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(PyargsError, match=r"not numbers in row\(s\) \[0, 1\]"):
        policy_alone.generate(broken, [[5], [6]], max_new_tokens=2)


def test_models_of_inference_mode():
    with torch.inference_mode():
        policy = tiny_lm(dtype=torch.float32)
    (values,) = response_logprobs(policy, [([5, 6], [[7]])])
    assert values[0].isfinite().all()


def test_a_cache_is_not_cut_below_nothing():
    stack = keep.stack_of(tiny_lm(dtype=torch.float32))
    cache = stack.cache(1, 8)
    with pytest.raises(PyargsError, match="cannot keep -5"):
        cache.cut(-5)
    with pytest.raises(RuntimeError, match="outside the cache"):
        cache.native.length = [-3]
    with pytest.raises(RuntimeError, match="for each row"):
        cache.native.length = [1, 1]


def test_without_the_extension_it_goes_through_transformers():
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, pyargs
from conftest import reward_model, tiny_lm
policy = tiny_lm(dtype=torch.float32)
print(pyargs.generate(policy, reward_model(policy), torch.tensor([[5, 6]]), None, ["ann"], max_new_tokens=3).tokens.shape)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parents[2])],
        env=os.environ | {"PYARGS_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and "torch.Size([1, 3])" in ran.stdout, ran.stderr
