"""Planted users, and a random model that shows their rule."""

from __future__ import annotations

import pytest
import torch

from pyargs import data
from pyargs.data import synthetic
from pyargs.errors import PyargsError


def test_synthetic_follows_its_rule():
    dataset = synthetic.load(users=8, pairs=30, new_users=4, support=5, query=6, rank=2)
    assert len(dataset) == 8 * 30 + 4 * 11
    for r in dataset:
        number = int(r["user_id"][-2:])
        direction, sign = synthetic.rule(number, 2)
        assert sign * (synthetic.score(r["chosen"], direction) - synthetic.score(r["rejected"], direction)) >= 5
        assert len(r["chosen"].split()) == len(r["rejected"].split()) == 10
        assert {*r["prompt"].split(), *r["chosen"].split(), *r["rejected"].split()} <= set(synthetic.WORDS)
    assert len(set(dataset["attribute"])) == 4 and {"+animals-tools", "-animals+tools"} <= set(dataset["attribute"])
    assert {r["split"] for r in dataset if r["user_id"].startswith("new")} == {"support", "query"}


def test_synthetic_is_seeded_and_users_do_not_depend_on_each_other():
    few, many, other = (synthetic.load(users=n, seed=s) for n, s in ((2, 0), (4, 0), (2, 1)))
    assert data.content_hash(few) == data.content_hash(synthetic.load(users=2))
    assert data.content_hash(few) != data.content_hash(other)
    assert few["chosen"][:60] == many["chosen"][:60]
    for wrong in ({"rank": 4}, {"gap": 11}):
        with pytest.raises(PyargsError):
            synthetic.load(**wrong)


def test_planted_features():
    planted = synthetic.planted_features(dim=16, users=5, pairs=40, rank=3, seed=1)
    assert planted.chosen.shape == planted.rejected.shape == (200, 16) and planted.chosen.dtype == torch.float32
    torch.testing.assert_close(planted.directions @ planted.directions.T, torch.eye(3))
    torch.testing.assert_close(planted.mixtures.sum(-1), torch.ones(5))
    margin = (planted.heads[planted.user] * (planted.chosen - planted.rejected)).sum(-1)
    assert (margin > 0).all() and planted.user.bincount().tolist() == [40] * 5
    noisy = synthetic.planted_features(dim=16, users=5, pairs=400, rank=3, scale=1.0)
    margin = (noisy.heads[noisy.user] * (noisy.chosen - noisy.rejected)).sum(-1)
    # Bradley-Terry: the share of correct labels is the mean of sigmoid(|margin|).
    assert abs((margin > 0).float().mean() - margin.abs().sigmoid().mean()) < 0.04
    for one, two in zip(planted, synthetic.planted_features(dim=16, users=5, pairs=40, rank=3, seed=1), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiny_lm(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    folder = synthetic.tiny_lm(tmp_path / "lm", family=family, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert all(len(tokenizer(form).input_ids) == 1 for w in synthetic.WORDS for form in (w, f" {w}"))
    text = "tell me about the café's cat: 42\n\nnew lines"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    assert chat == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == chat and max(ids) < len(tokenizer) == model.config.vocab_size
    again = AutoModelForCausalLM.from_pretrained(synthetic.tiny_lm(tmp_path / "again", family=family, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_tiny_lm_shows_the_rule(tmp_path):
    """A linear head on the last state finds the planted direction: what the smoke run relies on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(synthetic.tiny_lm(tmp_path)).model
    tokenizer = synthetic.tiny_tokenizer()
    rows = [r for r in synthetic.load(users=4, pairs=150, new_users=0) if r["attribute"].endswith("animals-tools")]
    rows += [r for r in synthetic.load(users=4, pairs=150, new_users=0, seed=1) if "animals-tools" in r["attribute"]]

    def last(name: str):
        texts = [f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r[name]}" for r in rows]
        with torch.no_grad():
            return model(torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)).last_hidden_state[:, -1]

    delta = last("chosen") - last("rejected")
    train = torch.tensor([r["split"] == "train" for r in rows])
    head = torch.zeros(delta.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (torch.nn.functional.softplus(-delta[train] @ head).mean() + 3e-3 * head.square().sum()).backward()
        optimizer.step()
    assert (delta[~train] @ head > 0).float().mean() > 0.85
