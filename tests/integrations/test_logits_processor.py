"""Rewards as a logits processor: each call gives what a new processor would give, however the rows of a loop move."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from generating import PROMPTS, STOPS, usual
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from pyargs import Engine, RewardLogitsProcessor, RewardModel
from pyargs.errors import PyargsError, UnknownUser
from pyargs.models.token_reward import TokenReward
from pyargs.ops.library import has_extension

BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not has_extension, reason="no extension")), "eager"]
WEIGHTS = [1.5, -2.0, 0.0]
USERS = ["ann", "bob", "cid"]


@pytest.fixture(scope="module")
def models():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


def processor_of(model, users=("ann", "bob"), **how):
    how = dict(reward_weight=WEIGHTS[: len(users)], eos_token_id=STOPS, num_candidates=4) | how
    return RewardLogitsProcessor(model, list(users), **how)


def expected(model, text, user, weight, scores, k=4, stops=STOPS):
    """The definition: every candidate behind the text, in a pass of its own."""
    reward = lambda ids: model.head(  # noqa: E731
        model.backbone(torch.tensor([ids])).last_hidden_state[:, -1], model.users.rows([user])
    ).item()
    logprobs, found = scores.float().log_softmax(0), torch.full_like(scores, -torch.inf)
    for token in logprobs.topk(k).indices.tolist():
        found[token] = logprobs[token] + weight * (reward(text) if token in stops else reward([*text, token]))
    return found


def check(model, processor, texts, users, weights, ids=None, seed=0):
    ids = torch.tensor(texts) if ids is None else ids
    scores = torch.randn(len(texts), 61, generator=torch.Generator().manual_seed(seed)) * 2
    got = processor(ids, scores)
    for row, text in enumerate(texts):
        want = expected(model, text, users[row], weights[row], scores[row])
        torch.testing.assert_close(got[row], want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_greedy_gives_the_tokens_of_the_engine(backend, family):
    if backend == "cpu" and family == "mistral":
        pytest.skip("its window is not the stack's")
    dtype = torch.float32 if backend == "cpu" else torch.float64
    policy, model = tiny_lm(family).to(dtype), reward_model(tiny_lm(family, seed=3).to(dtype))
    processor = processor_of(model, backend=backend, attention_mask=usual()["attention_mask"])
    found = policy.generate(**usual(), logits_processor=LogitsProcessorList([processor]))[:, 5:].tolist()
    wish = dict(reward_weight=WEIGHTS[:2], num_candidates=4, max_new_tokens=12, stop=STOPS)
    for row, answer in zip(found, Engine(policy, model, backend=backend).generate(PROMPTS, USERS[:2], **wish), strict=True):
        n = len(answer.tokens)
        assert row[:n] == answer.tokens and set(row[n:]) <= {50, *STOPS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fewer", [dict(min_p=0.6), dict(reward_clip=0.3), dict(min_p=0.4, reward_clip=0.1)])
def test_fewer_candidates_and_clipped_rewards_are_those_of_the_engine(backend, fewer):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    policy, model = tiny_lm().to(dtype), reward_model(tiny_lm(seed=3).to(dtype))
    processor = processor_of(model, backend=backend, num_candidates=8, attention_mask=usual()["attention_mask"], **fewer)
    found = policy.generate(**usual(), logits_processor=LogitsProcessorList([processor]))[:, 5:].tolist()
    wish = dict(reward_weight=WEIGHTS[:2], num_candidates=8, max_new_tokens=12, stop=STOPS)
    engine = Engine(policy, model, backend=backend)
    answers, free = engine.generate(PROMPTS, USERS[:2], **wish, **fewer), engine.generate(PROMPTS, USERS[:2], **wish)
    for row, answer in zip(found, answers, strict=True):
        assert row[: len(answer.tokens)] == answer.tokens
    assert [one.tokens for one in answers] != [one.tokens for one in free]


def test_beams_need_their_candidates():
    with pytest.raises(PyargsError, match="min_p may leave fewer"):
        processor_of(reward_model(tiny_lm(seed=3)), num_beams=2, num_candidates=12, min_p=0.1)


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(["cpu", "eager"]))
def test_each_call_is_one_from_nothing_however_rows_move(data, backend):
    """Beams that reorder within their prompt, rows that leave, prompts that change, tokens that
    were no candidates, and the same call twice."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    model, beams = reward_model(tiny_lm(seed=3).to(dtype)), data.draw(st.integers(1, 2), "beams")
    many = data.draw(st.integers(1, 3), "prompts")
    processor = processor_of(model, USERS[:many], backend=backend, num_beams=beams, num_candidates=4 if beams == 1 else 6)
    k = processor.num_candidates

    def begin(step):  # with a first token of their own, so that nobody takes them for others' rows
        generator, length = torch.Generator().manual_seed(step), data.draw(st.integers(0, 3))
        made = torch.randint(2, 61, (many, length), generator=generator).tolist()
        return [(owner, [2 + step, *made[owner]]) for owner in range(many) for _ in range(beams)]

    rows = begin(0)
    for step in range(data.draw(st.integers(1, 5), "steps")):
        texts = [text for _, text in rows]
        scores = torch.randn(len(rows), 61, generator=torch.Generator().manual_seed(step)) * 2
        got = processor(torch.tensor(texts), scores)
        for (owner, text), own, one in zip(rows, scores, got, strict=True):
            torch.testing.assert_close(one, expected(model, text, USERS[owner], WEIGHTS[owner], own, k), atol=2e-4, rtol=2e-4)
        event = data.draw(st.sampled_from(["on", "on", "reorder", "leave", "new prompts", "again"]), "event")
        if event == "again":
            continue
        if event == "new prompts" and len(rows) == many * beams:
            rows = begin(step + 20)
            continue
        if event == "leave" and len(rows) > 1:
            kept = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows) - 1))]
            processor.keep(kept)
            rows, got = [rows[place] for place in kept], got[kept]
        source = list(range(len(rows)))
        if event == "reorder":
            source = [data.draw(st.sampled_from([j for j, one in enumerate(rows) if one[0] == owner])) for owner, _ in rows]
        tokens = [data.draw(st.sampled_from([int(one.argmax()), 7, 9])) for one in got]
        rows = [(rows[j][0], [*rows[j][1], token]) for j, token in zip(source, tokens, strict=True)]


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_are_those_over_the_definition(models, beams):
    """`generate` with the processor, and with one that computes everything from nothing."""
    policy, model = models

    class Slow:
        def __call__(self, input_ids, scores):
            pads = (usual()["attention_mask"] == 0).sum(1).repeat_interleave(beams).tolist()
            return torch.stack([
                expected(model, ids[pads[row] :], USERS[row // beams], WEIGHTS[row // beams], scores[row], k=3 * beams)
                for row, ids in enumerate(input_ids.tolist())
            ])  # fmt: skip

    asked = usual(num_beams=beams, max_new_tokens=5)
    ours = processor_of(model, num_beams=beams, num_candidates=3 * beams, attention_mask=asked["attention_mask"])
    want, got = (policy.generate(**asked, logits_processor=LogitsProcessorList([one])) for one in (Slow(), ours))
    assert torch.equal(got, want)


def test_fewer_candidates_than_beams_need_are_refused(models):
    with pytest.raises(PyargsError, match="2 beams with 2 stop tokens go on from 6 candidates.*num_candidates=6"):
        processor_of(models[1], num_beams=2, num_candidates=5)
    with pytest.raises(PyargsError, match="2 beams with 0 stop tokens go on from 4"):
        processor_of(models[1], num_beams=2, num_candidates=3, eos_token_id=None)
    processor_of(models[1], num_beams=2, num_candidates=6)
    processor = processor_of(models[1], ["ann"])  # beams that nobody told it of: seen once one takes another's place
    scores = torch.zeros(2, 61)
    processor(torch.tensor([[5, 6], [5, 6]]), scores)
    processor(torch.tensor([[5, 6, 7], [5, 6, 8]]), scores)
    with pytest.raises(PyargsError, match="2 beams"):
        processor(torch.tensor([[5, 6, 8, 9], [5, 6, 8, 2]]), scores)


def test_rows_that_leave_untold_are_found_by_their_tokens_and_an_ambiguous_match_is_an_error(models):
    model = models[1]
    processor = processor_of(model, USERS)
    texts = [[5, 6], [7, 8], [5, 6]]
    check(model, processor, texts, USERS, WEIGHTS)
    check(model, processor, [[7, 8, 9]], USERS[1:2], WEIGHTS[1:2])  # only bob's row can be this
    processor = processor_of(model, USERS)
    check(model, processor, texts, USERS, WEIGHTS)
    with pytest.raises(PyargsError, match="whose they are cannot be seen in their tokens: say processor.keep"):
        processor(torch.tensor([[5, 6, 9], [7, 8, 9]]), torch.zeros(2, 61))
    processor.keep([2, 1])
    check(model, processor, [[5, 6, 9], [7, 8, 9]], ["cid", "bob"], [0.0, -2.0])
    with pytest.raises(PyargsError, match="another user's row"):
        processor(torch.tensor([[7, 8, 9, 4], [5, 6, 9, 4]]), torch.zeros(2, 61))
    with pytest.raises(PyargsError, match="where one comes from"):
        processor(torch.tensor([[5, 6, 9, 4], [7, 8, 9, 4], [2, 2, 2, 2]]), torch.zeros(3, 61))
    for wrong in ([0, 0], [2], ["a"]):
        with pytest.raises(PyargsError, match="a row"):
            processor.keep(wrong)


def test_padding_on_the_left_by_the_attention_mask(models):
    model = models[1]
    ids, mask = torch.tensor([[1, 1, 5], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    processor = processor_of(model, attention_mask=mask)
    check(model, processor, [[5], [7, 8, 9]], USERS, WEIGHTS, ids)
    longer = torch.cat([ids, torch.tensor([[4], [4]])], 1)
    check(model, processor, [[5, 4], [7, 8, 9, 4]], USERS, WEIGHTS, longer)
    with pytest.raises(PyargsError, match="set processor.attention_mask"):
        processor(torch.tensor([[1, 3, 5], [2, 8, 9]]), torch.zeros(2, 61))
    processor.attention_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    check(model, processor, [[3, 5], [2, 8, 9]], USERS, WEIGHTS, torch.tensor([[1, 3, 5], [2, 8, 9]]))
    for wrong in (torch.ones(3, 3), torch.ones(2, 9), torch.tensor([[1, 1, 0], [1, 1, 1]])):
        processor.attention_mask = wrong
        with pytest.raises(PyargsError, match="attention_mask|padded on the left"):
            processor(ids, torch.zeros(2, 61))


def test_a_loop_without_gradients_or_in_inference_mode(models):
    processor = processor_of(models[1])
    with torch.inference_mode():
        check(models[1], processor, PROMPTS_OF_TWO := [[5, 6], [7, 8]], USERS, WEIGHTS)
    check(models[1], processor, [[*text, 9] for text in PROMPTS_OF_TWO], USERS, WEIGHTS)


def test_a_function_of_whole_texts_is_for_guide():
    model = RewardModel.from_function(lambda ids, mask: mask.sum(1).float(), None, device="cpu")
    with pytest.raises(PyargsError, match="take pyargs.guide"):
        processor_of(model)


def test_what_is_refused_at_once(models):
    policy, model = models
    mean = reward_model(tiny_lm(seed=3), pool="mean", step_reward="prefix_mean")
    for made, error, message in (
        (lambda: processor_of(TokenReward(tiny_lm(), None)), PyargsError, "head of a RewardModel"),
        (lambda: processor_of(mean), PyargsError, "mean over the answer"),
        (lambda: processor_of(model, ["nobody"]), UnknownUser, "nobody"),
        (lambda: processor_of(model, reward_weight=[1.0] * 3), PyargsError, "3 values for 2 rows"),
        (lambda: processor_of(model, num_candidates=65), PyargsError, "num_candidates"),
        (lambda: processor_of(model, eos_token_id="a"), PyargsError, "eos_token_id holds token ids"),
        (lambda: processor_of(model, eos_reward="after"), PyargsError, "eos_reward"),
    ):
        with pytest.raises(error, match=message):
            made()
    with pytest.raises(PyargsError, match="3 rows for 2 users"):
        processor_of(model)(torch.tensor([[5], [6], [7]]), torch.zeros(3, 61))
    with pytest.raises(PyargsError, match="not numbers in row"):
        processor_of(model)(torch.tensor([[5], [6]]), torch.full((2, 61), torch.nan))
    with pytest.raises(PyargsError, match="knows 61"):
        processor_of(model)(torch.tensor([[5], [6]]), torch.zeros(2, 99))
    with pytest.raises(PyargsError, match="only 3 tokens"):
        processor_of(model)(torch.tensor([[5], [6]]), torch.zeros(2, 3))
