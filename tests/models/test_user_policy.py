"""Policies with a soft prompt: one causal sequence of soft prompt, prompt and response."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm
from small import config_of

from pyargs.data import of_split, synthetic
from pyargs.decode.engine import Engine
from pyargs.lm.loading import load_lm
from pyargs.lm.stack import run
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.ops.library import has_extension
from pyargs.training import trainer
from pyargs.types import Users


def test_a_soft_prompt_is_embeddings_before_the_prompt(lm_folder, rows):
    model = trainer.train("pdpo", rows, config_of("pdpo", lm_folder, epochs=0.5))
    prompts, users = [[5, 6, 7], [8, 9, 10, 11, 12]], ["user_01", "user_00"]
    found = [answer.tokens for answer in Engine(None, model).generate(prompts, users, max_new_tokens=5)]
    for prompt, user, answer in zip(prompts, users, found, strict=True):
        soft = model.soft(model.users.rows([user]))
        for n in range(len(answer)):
            embeds = torch.cat([soft, model.lm.get_input_embeddings()(torch.tensor([prompt + answer[:n]]))], dim=1)
            assert model.lm(inputs_embeds=embeds).logits[0, -1].argmax().item() == answer[n]


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_one_users_demonstrations_are_read_once(monkeypatch):
    """Whatever the order of the prompts: those of a user are answered one behind the other."""
    model = UserPolicy(tiny_lm(dtype=torch.float32), tokenizer=None, demonstrations="some")
    shown = {"ann": list(range(2, 22)), "bob": list(range(40, 60))}
    monkeypatch.setattr(model, "prompt_ids", lambda prompt, user, room: shown[user] + [30 + int(prompt)])
    monkeypatch.setattr(model, "tokenizer", Numbers())
    read, call = [], run.Stack.__call__

    def counted(self, ids, cache, mask=None, **more):
        read.append(ids.numel() if mask is None else int(mask.sum()))
        return call(self, ids, cache, mask, **more)

    monkeypatch.setattr(run.Stack, "__call__", counted)
    for room in (1, 2, 6):
        read.clear()
        answers = Engine(None, model, max_rows=room).generate([str(i) for i in range(6)], ["ann", "bob"] * 3, max_new_tokens=1)
        assert [answer.prompt[-1] for answer in answers] == list(range(30, 36)), "in the order of the prompts"
        assert sum(read) <= 2 * 20 + 6, f"{sum(read)} tokens: each user's 20 once, and each prompt's own"


class Numbers:
    """As much of a tokenizer as the engine asks for."""

    def __len__(self):
        return 61

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


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
    tokenizer = synthetic.tiny_tokenizer()
    lm = tiny_lm("mistral", vocab=len(tokenizer), dtype=torch.float32)
    model = UserPolicy(lm, tokenizer, soft=SoftPrompt(torch.randn(1, 3, 32), Users(["user_00"], offset=torch.randn(1, 3, 32))))
    query = of_split(rows, "train").filter(lambda row: row["user_id"] == "user_00").select(range(3))
    swapped = query.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    torch.testing.assert_close(model.pair_logprobs(query)[0], model.pair_logprobs(swapped)[0].flip(1))
