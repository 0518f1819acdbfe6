"""The real SmolLM2 on the CPU stack, where the user's cache has it: the tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stacks import with_lora

import pyargs
from pyargs.heads import linear
from pyargs.lm.loading import load_lm
from pyargs.lm.stack import pack
from pyargs.models.reward_model import RewardModel
from pyargs.ops import score_select, topk_logprobs
from pyargs.types import Users


@pytest.fixture(scope="module")
def smollm2():
    folder = Path.home() / ".cache" / "pyargs" / "models" / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no SmolLM2 at {folder}: pyargs demo fetches it")
    return load_lm(str(folder), device="cpu")


def test_greedy_text_of_smollm2(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer("The first thing to know about winter is that it")["input_ids"]])
    stack = pack.pack(model)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=[])
    cache, text = stack.cache(1, 64), ids
    states = stack(ids, cache)
    while text.shape[1] < expected.shape[1]:
        token = stack.logits(states[:, -1]).argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
        states = stack(token, cache)
    assert text.tolist() == expected.tolist()


def test_args_of_two_users_on_smollm2(smollm2):
    """A stack that is policy and reward model at once gives the tokens of the engine."""
    model, tokenizer = smollm2
    texts = ["The first thing to know about winter is that it", "My favourite book is"]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask, batch, k, steps = encoded["input_ids"], encoded["attention_mask"], 2, 10, 16
    decoder = with_lora(model, std=0.01)
    torch.manual_seed(0)
    users = Users(["ann", "bob"], mixture=torch.randn(2, 8) * 2)
    head = linear.Head(model.config.hidden_size, 8, users, softmax=True, divisor=model.config.hidden_size**0.5)
    reward_model = RewardModel(decoder, tokenizer, head).eval()
    rows = [row[own].tolist() for row, own in zip(ids, mask.bool(), strict=True)]
    answers = pyargs.Engine(model, reward_model, backend="cpu").generate(
        rows, ["ann", "bob"], reward_weight=1.8, num_candidates=k, max_new_tokens=steps, stop=[]
    )
    guided = [slot > 0 for answer in answers for slot in answer.slots]
    assert any(guided) and not all(guided)  # the reward model decides, and not alone

    stack = pack.pack(model, adapter=decoder)
    cache = stack.cache(2 * batch, ids.shape[1] + steps + k)
    policy, reward = [0, 1], [2, 3]
    state = stack(ids.repeat(2, 1), cache, mask.repeat(2, 1), delta=[False, False, True, True])[:batch, -1]
    for step in range(steps):
        logprobs, candidates, _ = topk_logprobs(stack.logits(state), k)
        hidden = stack(candidates, cache, branches=True, rows=reward, delta=True)
        token, slot, _, _ = score_select(
            hidden,
            head.fold(users.rows(["ann", "bob"])).weight,
            torch.arange(batch),
            torch.full((batch,), 1.8),
            logprobs,
            candidates,
            torch.zeros(batch, dtype=torch.bool),
        )
        assert token.tolist() == [answer.tokens[step] for answer in answers]
        stack.commit(cache, slot, rows=reward)
        state = stack(token[:, None], cache, rows=policy)[:, -1]
