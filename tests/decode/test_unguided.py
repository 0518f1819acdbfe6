"""Decoding without a reward: the checkpoint's own settings and rows that are no tokens do not count."""

from __future__ import annotations

import torch

from pyargs.lm.loading import load_lm


def test_plain_decoding_ignores_the_checkpoints_own_settings(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    before = unguided.generate(policy, prompts, max_new_tokens=8)
    policy.generation_config.repetition_penalty, policy.generation_config.do_sample = 5.0, True
    assert torch.equal(unguided.generate(policy, prompts, max_new_tokens=8).tokens, before.tokens)
    ids = torch.tensor([prompts[0]])
    for token in before.answers()[0]:
        assert policy(ids).logits[0, -1].argmax().item() == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    one, two = (unguided.generate(policy, prompts, max_new_tokens=8, do_sample=True, seed=s).tokens for s in (1, 1))
    assert torch.equal(one, two)
    assert unguided.generate(policy, [], max_new_tokens=8).tokens.shape[0] == 0


def test_rows_of_the_logits_that_are_no_tokens_are_never_drawn(lm_folder):
    from pyargs.decode import unguided

    policy, tokenizer = load_lm(lm_folder)
    policy.resize_token_embeddings(len(tokenizer) + 64)
    policy.get_output_embeddings().weight.data[-64:] = 3 * policy.get_output_embeddings().weight.data[:64]
    drawn = unguided.generate(policy, [[5, 6, 7]] * 64, max_new_tokens=4, do_sample=True, seed=0).tokens
    assert drawn.max() < len(tokenizer)
