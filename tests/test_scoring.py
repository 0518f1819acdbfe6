"""States and log-probs of given responses: packed, cached and by themselves the same."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, tiny_lm
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import pack
from pyargs.methods import lore
from pyargs.scoring import features, response_logprobs, response_states
from pyargs.training import trainer


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
    from pyargs.scoring import groups

    model = trainer.train("lore", pairs, lore.Config(backbone=lm_folder, freeze_backbone=True, epochs=1))
    rows = pairs.select(range(6))
    data = features(model.backbone, model.tokenizer, rows)
    encoded, numbers = groups(model.tokenizer, rows, 512)
    packed = pack([encoded[g][0] for g, *_ in numbers], [[encoded[g][1][c], encoded[g][1][r]] for g, c, r in numbers])
    with torch.no_grad():
        batch = model(torch.arange(0, 12, 2), torch.arange(1, 12, 2), torch.zeros(6, dtype=torch.long), **vars(packed))
    cached = data.batch(torch.zeros(6, dtype=torch.long), last=True)
    torch.testing.assert_close(cached.hidden, batch.hidden, atol=2e-5, rtol=2e-5)
    assert torch.equal(features(model.backbone, model.tokenizer, rows).hidden, data.hidden)  # this time from the cache


def test_what_a_pair_looks_like_does_not_depend_on_other_rows(lm_folder):
    from pyargs.scoring import groups

    _, tokenizer = load_lm(lm_folder)
    row = {"user_id": "u", "prompt": "word " * 100, "chosen": "a b", "rejected": "c"}
    long = {**row, "chosen": "a longer answer than the other one " * 3}
    alone, _ = groups(tokenizer, Dataset.from_list([row]), 80)
    both, numbers = groups(tokenizer, Dataset.from_list([long, row]), 80)
    assert both[numbers[1][0]][0] == alone[0][0]
    assert all(len(prompt) + max(map(len, several)) <= 80 for prompt, several in both)
