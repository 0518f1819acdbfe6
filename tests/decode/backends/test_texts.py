"""Rewards of whole texts guide as a plain loop does, which calls the function on each candidate by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm
from datasets import Dataset
from decoding import Words, engine_of, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode.scorer import Scorer
from pyargs.errors import PyargsError
from pyargs.lm.tokenize import encode_prompt, encode_response
from pyargs.models.reward_model import RewardModel


def of_text(ids, mask):
    return torch.sin((ids * torch.arange(1, ids.shape[1] + 1) * mask).sum(1).double() * 0.37) + mask.sum(1) / 50


def alone(text) -> float:
    return of_text(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long)).item()


def by_hand(policy, prompt, weight, k, steps, eos_reward, stop):
    """The definition: (tokens, rewards)."""
    text, tokens, rewards, so_far = list(prompt), [], [], alone(prompt)
    for _ in range(steps):
        logprobs = policy(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        top = logprobs.sort(descending=True, stable=True)
        found = []
        for value, token in zip(top.values[:k].tolist(), top.indices[:k].tolist(), strict=True):
            reward = so_far if token in stop and eos_reward == "before" else alone([*text, token])
            found.append((value + weight * reward, token, reward))
        _, token, so_far = max(found, key=lambda one: one[0])
        tokens.append(token)
        rewards.append(so_far)
        text.append(token)
        if token in stop:
            break
    return tokens, rewards


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from(["before", "state"]),
    st.integers(0, 9),
    st.sampled_from([None, 3]),
)
def test_it_guides_as_a_plain_loop(rows, eos_reward, seed, prefill_tokens):
    """Rows of several lengths and numbers of candidates come and go, of which two are answered at a time."""
    policy, stop = tiny_lm(seed=seed), [1, 7, 9, 11]
    model = RewardModel.from_function(of_text, Words(61))
    engine = engine_of(policy, model, tokenizer=Words(61), max_rows=2, eos_reward=eos_reward, prefill_tokens=prefill_tokens)
    texts = prompts([length for length, *_ in rows], seed)
    asked = {
        engine.submit(text, reward_weight=2.0, num_candidates=k, max_new_tokens=steps, stop=stop): ([], text, k, steps)
        for text, (_, steps, k) in zip(texts, rows, strict=True)
    }
    while engine.busy:
        for event in engine.step():
            asked[event.number][0].append((event.token, event.reward))
    for found, text, k, steps in asked.values():
        tokens, rewards = by_hand(policy, text, 2.0, k, steps, eos_reward, stop)
        assert [token for token, _ in found] == tokens
        assert [reward for _, reward in found] == pytest.approx(rewards, abs=1e-5)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_the_policy_may_be_any(family):
    """One whose candidates cannot share a prefix, and one in float32 that the CPU stack computes."""
    policy = tiny_lm(family, dtype=torch.float32)
    engine = engine_of(policy, RewardModel.from_function(of_text, Words(61)), tokenizer=Words(61))
    (text,) = prompts([5])
    (answer,) = engine.generate([text], reward_weight=2.0, num_candidates=4, max_new_tokens=6, stop=[])
    assert answer.tokens == by_hand(policy, text, 2.0, 4, 6, "before", [])[0]


def test_an_encoder_guides_and_ranks():
    """What `from_sequence_classifier` refuses: a BERT, as any function."""
    tokenizer = tiny_tokenizer()
    size = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32, num_labels=1)
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", vocab_size=len(tokenizer), **size)
    ).eval()
    for parameter in bert.parameters():
        parameter.data.normal_(std=0.2)
    function = lambda ids, mask: bert(ids, attention_mask=mask).logits[:, 0]  # noqa: E731
    model = RewardModel.from_function(function, tokenizer, device="cpu")
    data = Dataset.from_list([{"user_id": "", "prompt": "Why?", "chosen": "happy cats", "rejected": "no"}])
    steps, rewards = model.pair_scores(data)
    prompt = encode_prompt(tokenizer, "Why?")
    for side, response in enumerate(("happy cats", "no")):
        ids = encode_response(tokenizer, response)
        with torch.no_grad():
            each = [bert(torch.tensor([[*prompt, *ids[: end + 1]]])).logits[0, 0] for end in range(len(ids))]
        assert rewards[0, side].item() == pytest.approx(each[-1].item(), abs=1e-5)
        assert steps[0, side].item() == pytest.approx(sum(map(float, each)), abs=1e-5)
    policy = tiny_lm(vocab=len(tokenizer), dtype=torch.float32)
    best = engine_of(policy, model, tokenizer=tokenizer, best_of=3).generate(["Why?"], max_new_tokens=5, seed=0, stop=[])[0]
    own = model.score([(prompt, [best.tokens])], [""])[0]
    assert max(best.rewards) == pytest.approx(own.item(), abs=1e-5)


def test_what_is_wrong_is_refused_by_name(tmp_path):
    def taste(ids, mask):
        return torch.full((len(ids),), float("nan"))

    policy, model = tiny_lm(), RewardModel.from_function(taste, Words(61))
    engine = engine_of(policy, model, tokenizer=Words(61))
    for call, message in [
        (lambda: engine.generate([[3]], reward_weight=1.0), "taste returned rewards"),
        (lambda: engine.generate([[3]]), "give reward_weight"),  # no unit of a strength
        (lambda: model.save_pretrained(tmp_path / "rm"), "nothing to save"),
        (lambda: Scorer(model), "call it in your loop"),
        (lambda: engine_of(policy, model, tokenizer=Words(61), backend="cuda-graph"), "one GPU"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
