"""Policies with a soft prompt: one causal sequence of soft prompt, prompt and response."""

from __future__ import annotations

import pytest
import torch
from small import config_of

from pyargs.data import of_split, synthetic
from pyargs.lm.loading import load_lm
from pyargs.training import trainer
from pyargs.types import Users


def test_a_soft_prompt_is_embeddings_before_the_prompt(lm_folder, rows):
    model = trainer.train("pdpo", rows, config_of("pdpo", lm_folder, epochs=0.5))
    from pyargs.decode import unguided

    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_01", "user_00"]
    found = unguided.generate(model, prompts, users, max_new_tokens=5).answers()
    for prompt, user, answer in zip(prompts, users, found, strict=True):
        soft = model.soft(model.users.rows([user]))
        for n in range(len(answer)):
            embeds = torch.cat([soft, model.lm.get_input_embeddings()(torch.tensor([prompt + answer[:n]]))], dim=1)
            assert model.lm(inputs_embeds=embeds).logits[0, -1].argmax().item() == answer[n]


def test_p_dpo_scores_against_plain_passes(lm_folder, rows):
    """Soft prompt, prompt and response as one causal sequence: the same log-probs; the reference is the base model."""
    model = trainer.train("pdpo", rows, config_of("pdpo", lm_folder, epochs=0.5))
    base, _ = load_lm(lm_folder)
    query = of_split(rows, "train").select(range(3))
    total, _ = model.pair_logprobs(query)
    untrained = model.untrained(query, stop=False)
    words = model.lm.get_input_embeddings()
    for n, row in enumerate(query):
        prompt = model.prompt_ids(row["prompt"], row["user_id"])
        soft = model.soft(model.users.rows([row["user_id"]]))
        for side, text in enumerate((row["chosen"], row["rejected"])):
            response = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + response])
            picked = torch.tensor(response).unsqueeze(1)
            with torch.no_grad():
                logs = model.lm(inputs_embeds=torch.cat([soft, words(ids)], dim=1)).logits[0].log_softmax(-1)
                plain = base(ids).logits[0].log_softmax(-1)
            start = soft.shape[1] + len(prompt) - 1
            assert total[n, side].item() == pytest.approx(logs[start:-1].gather(1, picked).sum().item(), abs=1e-3)
            assert untrained[n, side].item() == pytest.approx(
                plain[len(prompt) - 1 : -1].gather(1, picked).sum().item(), abs=1e-3
            )


def test_p_dpo_scores_with_a_model_that_cannot_branch(rows):
    """Layers that follow no mask get a row for each response: the second one must not see the first."""
    from conftest import tiny_lm

    from pyargs.models.user_policy import SoftPrompt, UserPolicy

    tokenizer = synthetic.tiny_tokenizer()
    lm = tiny_lm("mistral", vocab=len(tokenizer), dtype=torch.float32)
    model = UserPolicy(lm, tokenizer, soft=SoftPrompt(torch.randn(1, 3, 32), Users(["user_00"], offset=torch.randn(1, 3, 32))))
    query = of_split(rows, "train").filter(lambda row: row["user_id"] == "user_00").select(range(3))
    swapped = query.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    torch.testing.assert_close(model.pair_logprobs(query)[0], model.pair_logprobs(swapped)[0].flip(1))
