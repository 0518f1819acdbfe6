"""Logits processors, stopping criteria and outputs of a guided loop see what they see in `generate` itself."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from generating import STOPS, guided, usual
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

from pyargs.data.synthetic import tiny_tokenizer
from pyargs.errors import PyargsError
from pyargs.models.token_reward import TokenReward


@pytest.fixture(scope="module")
def models():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


class Watching(LogitsProcessor):
    """Notes what it is given, and forbids the token of each row's place in the batch, and the one before."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        for row in range(len(scores)):
            scores[row, [22 + row, input_ids[row, -1]]] = -torch.inf
        return scores


def test_a_processor_sees_the_whole_batch_as_in_generate(models):
    """Also rows that have ended, and their padding: one that keeps a state for each row of the batch goes on."""
    ours, theirs = Watching(), Watching()
    asked = usual(eos_token_id=[47, 3, 13])
    want = models[0].generate(**asked, logits_processor=LogitsProcessorList([theirs]))
    got = guided(models, asked | {"logits_processor": LogitsProcessorList([ours])})
    assert torch.equal(got, want) and len(ours.seen) == len(theirs.seen)
    going = torch.ones(2, dtype=torch.bool)
    for (ids, scores), (others, plain) in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(ids, others)
        going &= ~torch.isin(ids[:, -1], torch.tensor([47, 3, 13])) | (ids.shape[1] == asked["input_ids"].shape[1])
        torch.testing.assert_close(scores[going], plain[going])
    assert not going.all()


@pytest.mark.parametrize("sample", [False, True])
def test_a_processors_minus_infinity_is_never_chosen_whatever_the_reward(models, sample):
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, ::2] = -torch.inf
            return scores

    asked = usual(eos_token_id=None, do_sample=sample, logits_processor=LogitsProcessorList([Even()]))
    found = guided(models, asked, reward_weight=30.0, num_candidates=8)
    assert (found[:, asked["input_ids"].shape[1] :] % 2 == 1).all()


def test_a_grammar_by_prefix_allowed_tokens_fn(models):
    asked = usual(prefix_allowed_tokens_fn=lambda row, ids: [5 + row, 9, 11 + row])
    assert torch.equal(guided(models, asked), models[0].generate(**asked))


def test_a_token_reward_follows_processors_too(models):
    policy, model = tiny_lm(), TokenReward(tiny_lm(seed=3), None)
    for k in (3, "all"):
        asked = usual(repetition_penalty=1.8, suppress_tokens=[49])
        assert torch.equal(guided((policy, model), asked, num_candidates=k, users=["", ""]), policy.generate(**asked))


class Sum(StoppingCriteria):
    """Ends a row once its tokens' sum can be divided."""

    def __init__(self, by):
        self.by = by

    def __call__(self, input_ids, scores, **more):
        return input_ids.sum(1) % self.by == 0


class SumWithPadding(Sum):
    eos_token_id = None  # transformers pads rows where a criterion has this name


CRITERIA = {
    "own": lambda: Sum(3), "own, padded": lambda: SumWithPadding(3), "length": lambda: MaxLengthCriteria(8),
    "shorter than the prompt": lambda: MaxLengthCriteria(2), "time": lambda: MaxTimeCriteria(0.0, 0.0),
    "no time": lambda: MaxTimeCriteria(99.0), "stop token": lambda: EosTokenCriteria(49),
    "strings": lambda: StopStringCriteria(tiny_tokenizer(), ["a", "e"]),
}  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(CRITERIA)), min_size=1, max_size=2, unique=True),
    stops=st.sampled_from([None, 3, STOPS]),
    rows=st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_stopping_criteria_are_those_of_generate(models, names, stops, rows):
    asked = usual(rows, eos_token_id=stops)
    want, got = (
        decode(asked | {"stopping_criteria": StoppingCriteriaList([CRITERIA[name]() for name in names])})
        for decode in (lambda asked: models[0].generate(**asked), lambda asked: guided(models, asked))
    )
    assert torch.equal(got, want)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=6), min_size=1, max_size=3),
    stops=st.sampled_from([None, STOPS, [3, 11, 22, 40, 47, 51]]),
    penalty=st.sampled_from([1.0, 1.5]),
    weight=st.sampled_from([0.0, 1.5, -2.0]),
    step_reward=st.sampled_from(["token", "prefix_mean"]),
)
def test_scores_and_logits_of_each_step(models, rows, stops, penalty, weight, step_reward):
    """Logits are the policy's own; scores are the processors' and w r on the candidates. A row that has ended is padded."""
    policy = models[0]
    model = reward_model(tiny_lm(seed=3), pool="mean", step_reward=step_reward)
    how = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=penalty)
    asked = usual(rows, eos_token_id=stops, max_new_tokens=5, **how)
    found = guided((policy, model), asked, reward_weight=weight, num_candidates=4)
    length = asked["input_ids"].shape[1]
    assert len(found.scores) == len(found.logits) == found.sequences.shape[1] - length
    plain = policy.generate(**asked | {"eos_token_id": None, "max_new_tokens": 1})
    torch.testing.assert_close(found.logits[0], plain.logits[0])
    for row, prompt in enumerate(rows):
        text, total, so_far, over = list(prompt), 0.0, None, False
        user = model.users.rows([["ann", "bob", "cid"][row]])
        for step, (scores, logits) in enumerate(zip(found.scores, found.logits, strict=True)):
            token = found.sequences[row, length + step].item()
            if over:
                assert token == 50 and scores[row, 50] == 0 and scores[row].isfinite().sum() == 1 and logits[row].isnan().all()
                continue
            own = policy(torch.tensor([text])).logits[0, -1].float()
            torch.testing.assert_close(logits[row], own)
            # Older transformers count the padding among what is repeated.
            padding = [1] * bool(plain.scores[0][row, 1] != plain.logits[0][row, 1])
            seen = torch.tensor(sorted({*text, *padding}))
            own[seen] = torch.where(own[seen] < 0, own[seen] * penalty, own[seen] / penalty)
            want = torch.full_like(own, -torch.inf)
            rewards = {}
            for one in [-1, *own.topk(4).indices.tolist()]:
                states = model.backbone(torch.tensor([text + [one] * (one >= 0)])).last_hidden_state[:, -1]
                rewards[one] = model.head(states, user).item()
            now = rewards.pop(-1)
            so_far = now if so_far is None else so_far
            for one, reward in rewards.items():
                rewards[one] = reward = so_far if one in (stops or []) else reward
                want[one] = own[one] + (weight / (step + 1) if step_reward == "prefix_mean" else weight) * reward
            torch.testing.assert_close(scores[row], want, atol=1e-4, rtol=1e-4)
            assert token == want.argmax() and token in rewards
            total += rewards[token]
            so_far = total / (step + 1) if step_reward == "prefix_mean" else rewards[token]
            text.append(token)
            over = token in (stops or [])


def test_outputs_only_where_they_are_asked_for(models):
    assert isinstance(guided(models, usual(output_scores=True, output_logits=True)), torch.Tensor)
    found = guided(models, usual(return_dict_in_generate=True))
    assert torch.equal(found.sequences, guided(models, usual())) and found.scores is None and found.logits is None
    model = TokenReward(tiny_lm(seed=3), None)
    with pytest.raises(PyargsError, match="output_scores needs num_candidates of 64 or less"):
        asked = usual(return_dict_in_generate=True, output_scores=True)
        guided((models[0], model), asked, num_candidates="all", users=["", ""])


def test_criteria_get_the_scores(models):
    class Unlikely(StoppingCriteria):
        """Ends a row whose last token had less than a part of the probability."""

        def __call__(self, input_ids, scores, **more):
            return scores[-1].softmax(1).gather(1, input_ids[:, -1:]).squeeze(1) < 0.2

    asked = usual(eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    asked["stopping_criteria"] = StoppingCriteriaList([Unlikely()])
    ours, theirs = guided(models, asked, num_candidates=61), models[0].generate(**asked)
    assert torch.equal(ours.sequences, theirs.sequences) and ours.sequences.shape[1] < 17
