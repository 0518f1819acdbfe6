"""GenARM's decoder against its formula, and its own sampling."""

from __future__ import annotations

import pytest
import torch
from small import config_of

from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import left_pad
from pyargs.training import trainer


@pytest.mark.parametrize("whole", [False, True])
def test_tokenwise_decoding_against_its_formula(lm_folder, rows, whole):
    from pyargs.decode import genarm

    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids, mask = left_pad(prompts, 0)
    weights, k = [0.0, 1.5], None if whole else 5
    decoded = genarm.generate(policy, model, ids, mask, reward_weight=weights, num_candidates=k, max_new_tokens=6)
    for prompt, weight, answer, reward in zip(prompts, weights, decoded.answers(), decoded.rewards, strict=True):
        for n, token in enumerate(answer):
            context = torch.tensor([prompt + answer[:n]])
            logs = policy(context).logits[0, -1].log_softmax(-1)
            rewards = model.lm(context).logits[0, -1].log_softmax(-1)
            candidates = logs.topk(k or len(logs)).indices
            best = candidates[(logs + weight * rewards)[candidates].argmax()]
            assert token == best.item() and reward[n].item() == pytest.approx(rewards[token].item(), abs=1e-3)
    # sampling: seeded by row, the same alone
    options = dict(num_candidates=k, max_new_tokens=6, do_sample=True, reward_weight=1.0)
    both = genarm.generate(policy, model, ids, mask, seed=[3, 4], **options).answers()
    alone = genarm.generate(policy, model, torch.tensor([prompts[1]]), None, seed=[4], **options).answers()
    assert both[1] == alone[0] and both == genarm.generate(policy, model, ids, mask, seed=[3, 4], **options).answers()


def test_genarms_own_sampling_follows_its_distribution(lm_folder, rows):
    from pyargs.decode import genarm

    policy, _ = load_lm(lm_folder)
    model = trainer.train("genarm", rows, config_of("genarm", lm_folder))
    n, prompt = 4000, torch.tensor([[5, 6, 7]])
    drawn = genarm.generate(
        policy, model, prompt.repeat(n, 1), None, num_candidates=None, do_sample=True, max_new_tokens=1, seed=0
    ).tokens[:, 0]
    logs = policy(prompt).logits[0, -1].log_softmax(-1) + model.lm(prompt).logits[0, -1].log_softmax(-1)
    expected = logs.softmax(-1)[: len(model.tokenizer)]
    count = torch.bincount(drawn, minlength=len(expected)).float()
    # a stop token is drawn like any other
    assert ((count / n - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-3).all()
