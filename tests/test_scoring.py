"""States and log-probs of given responses: packed, cached, by themselves, on the CPU stack and kept they are the same."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, tiny_lm
from datasets import Dataset
from decoding import prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyargs import scoring
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.lm.stack import keep
from pyargs.lm.stack import run as stacks
from pyargs.lm.tokenize import pack
from pyargs.methods import lore
from pyargs.ops.library import has_extension
from pyargs.scoring import features, response_logprobs, response_states
from pyargs.training import trainer

native = pytest.mark.skipif(not has_extension, reason="no extension")


@native
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


@native
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


@native
def test_an_empty_prompt_has_states_but_no_log_probs():
    lm = tiny_lm(dtype=torch.float32)
    (states,) = response_states(lm.get_decoder(), [([], [[5, 6], [7]])])
    assert [len(state) for state in states] == [2, 1]
    with pytest.raises(PyargsError, match="without a prompt"):
        response_logprobs(lm, [([], [[5, 6]])])


@native
def test_features_and_log_probs_take_the_stack(monkeypatch):
    lm, packed = tiny_lm(dtype=torch.float32), []
    real = keep.stack_of
    monkeypatch.setattr(keep, "stack_of", lambda *a: (packed.append(a), real(*a))[1])
    response_states(lm.get_decoder(), [([5], [[6]])])
    response_logprobs(lm, [([5], [[6]])])
    assert len(packed) == 2


@native
def test_models_of_inference_mode():
    with torch.inference_mode():
        policy = tiny_lm(dtype=torch.float32)
    (values,) = response_logprobs(policy, [([5, 6], [[7]])])
    assert values[0].isfinite().all()


@pytest.fixture
def computed(monkeypatch) -> list:
    """Grows with every computation of log-probs, and not where those that were kept are read."""
    found = []
    monkeypatch.setattr(scoring, "response_logprobs", lambda *a: (found.append(a), [[torch.zeros(1)]])[1])
    return found


def test_within_uncached_nothing_is_kept_and_the_numbers_are_the_same(tmp_path, lm_folder, rows):
    lm, tokenizer = load_lm(lm_folder)
    with scoring.uncached():
        without = features(lm.get_decoder(), tokenizer, rows.select(range(3)))
    assert not list((tmp_path / "cache").rglob("*"))
    kept = features(lm.get_decoder(), tokenizer, rows.select(range(3)))
    assert list((tmp_path / "cache").rglob("*.safetensors")) and torch.equal(without.hidden, kept.hidden)


def test_what_is_kept_is_of_the_model_as_it_is(computed):
    lm = tiny_lm(dtype=torch.float32)
    ask = lambda: scoring.policy_logprobs(lm, [([1], [[2]])])  # noqa: E731
    for _ in range(2):
        ask()
    assert len(computed) == 1
    lm.model.rotary_emb.inv_freq = lm.model.rotary_emb.inv_freq * 0.5
    ask()
    lm.model.layers[0].mlp.act_fn = nn.ReLU()
    ask()
    lm.model.layers[0].self_attn.scaling = 2.0
    for _ in range(2):
        ask()
    assert len(computed) == 4
    lm.model.layers[0].register_forward_hook(lambda *a: None)
    for _ in range(2):  # never kept
        ask()
    assert len(computed) == 6


def test_what_is_kept_of_other_arithmetic_is_not_taken(capability, computed):
    """Another processor, another torch or another build of the extension rounds otherwise: a cache may be shared by all."""
    lm = tiny_lm(dtype=torch.float32)
    ask = lambda: scoring.policy_logprobs(lm, [([1], [[2]])])  # noqa: E731
    ask()
    ask()
    assert len(computed) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        ask()
    from pyargs import _C

    _C.set_cpu_capability("avx2" if capability == "default" else "default")
    ask()
    assert len(computed) == 3


@pytest.mark.parametrize("family", FULL_ATTENTION)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_a_packed_pass_equals_one_pass_per_response(family, lengths, seed):
    lm = tiny_lm(family)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 61, (n,), generator=generator).tolist()  # noqa: E731
    groups = [(draw(3 + len(several)), [draw(n) for n in several]) for several in lengths]
    states, logprobs = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups, max_tokens=24)
    for (prompt, several), ours, logs in zip(groups, states, logprobs, strict=True):
        for response, state, log in zip(several, ours, logs, strict=True):
            ids = torch.tensor([prompt + response])
            full = lm.get_decoder()(ids).last_hidden_state[0]
            torch.testing.assert_close(state, full[len(prompt) :].float(), atol=2e-5, rtol=2e-5)
            want = lm(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1))
            torch.testing.assert_close(log, want.squeeze(1).float(), atol=2e-5, rtol=2e-5)


def test_models_that_cannot_branch_get_a_row_for_each_response():
    for family in ("mistral", "mamba"):
        lm = tiny_lm(family)
        groups = [([5, 6, 7, 8, 9, 10, 11], [[3, 4], [9, 9, 9]]), ([4], [[8]])]
        for (prompt, several), ours in zip(groups, response_states(lm.get_decoder(), groups), strict=True):
            for response, state in zip(several, ours, strict=True):
                full = lm.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0]
                torch.testing.assert_close(state, full[len(prompt) :].float(), atol=1e-5, rtol=1e-5)


def test_many_responses_to_one_prompt_go_to_several_rows(monkeypatch):
    """The prompt is repeated where a row would get too long, pairs stay together, and nothing changes."""
    from pyargs.lm import forward

    lm = tiny_lm()
    groups = [([5, 6, 7], [[n, n + 1, 3] for n in range(8)]), ([9] * 20, [[4, 4], [5]]), ([], [[1, 2], [3]])]
    whole, logs = response_states(lm.get_decoder(), groups), response_logprobs(lm, groups[:2])
    monkeypatch.setattr(forward, "ROW", 12)
    rows = [len(packed.input_ids) for _, packed in forward.batches(groups, lm.get_decoder(), 1, "rows")]
    assert rows == [1] * 5  # 8 responses of 3 tokens in rows of three, behind a prompt of 3; each of the others in one
    for one, two in zip(whole, response_states(lm.get_decoder(), groups), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    for one, two in zip(logs, response_logprobs(lm, groups[:2]), strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_training_on_features_is_training_on_text(lm_folder, pairs):
    """The cached features are what the model's own forward pass computes, padding and batch apart."""
    from pyargs.scoring import encode_pairs

    model = trainer.train("lore", pairs, lore.Config(backbone=lm_folder, freeze_backbone=True, epochs=1))
    rows = pairs.select(range(6))
    data = features(model.backbone, model.tokenizer, rows)
    encoded, numbers = encode_pairs(model.tokenizer, rows, 512)
    packed = pack([encoded[g][0] for g, *_ in numbers], [[encoded[g][1][c], encoded[g][1][r]] for g, c, r in numbers])
    with torch.no_grad():
        batch = model(torch.arange(0, 12, 2), torch.arange(1, 12, 2), torch.zeros(6, dtype=torch.long), **vars(packed))
    cached = data.batch(torch.zeros(6, dtype=torch.long), last=True)
    torch.testing.assert_close(cached.hidden, batch.hidden, atol=2e-5, rtol=2e-5)
    assert torch.equal(features(model.backbone, model.tokenizer, rows).hidden, data.hidden)  # this time from the cache


def test_what_a_pair_looks_like_does_not_depend_on_other_rows(lm_folder):
    from pyargs.scoring import encode_pairs

    _, tokenizer = load_lm(lm_folder)
    row = {"user_id": "u", "prompt": "word " * 100, "chosen": "a b", "rejected": "c"}
    long = {**row, "chosen": "a longer answer than the other one " * 3}
    alone, _ = encode_pairs(tokenizer, Dataset.from_list([row]), 80)
    both, numbers = encode_pairs(tokenizer, Dataset.from_list([long, row]), 80)
    assert both[numbers[1][0]][0] == alone[0][0]
    assert all(len(prompt) + max(map(len, several)) <= 80 for prompt, several in both)
