"""The two halves, lifted out: in a loop of somebody else they give what the engine gives."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, pair_in_float32, prompts, shared_pair
from families import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode.engine import Engine
from pyargs.decode.policy import Policy
from pyargs.decode.scorer import Scorer
from pyargs.errors import PyargsError


def by_hand(policy, scorer, rows, users, weight, k, steps):
    """Tokens by argmax of log pi + w r over the top k, with rows that leave and come back in the middle."""
    texts = {i: list(row) for i, row in enumerate(rows)}
    policy.prefill(list(texts), list(texts.values()))
    scorer.prefill(list(texts), list(texts.values()), users)
    for step in range(steps):
        logprobs, candidates = policy.next_logits().log_softmax(1).topk(k)
        assert policy.rows == scorer.rows
        token = candidates.gather(1, (logprobs + weight * scorer.score(candidates)).argmax(1, keepdim=True)).squeeze(1)
        names = list(policy.rows)
        for row, one in zip(names, token.tolist(), strict=True):
            texts[row].append(one)
        policy.advance(names, token)
        scorer.advance(names, token)
        if step == 1:  # one leaves and comes back
            policy.drop(names[:1])
            scorer.drop(names[:1])
            policy.prefill(names[:1], [texts[names[0]]])
            scorer.prefill(names[:1], [texts[names[0]]], [users[names[0]]])
    return [texts[i][len(row) :] for i, row in enumerate(rows)]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_loop_by_hand_is_the_engine(backend):
    policy, model = pair_in_float32("own") if backend == "cpu" else shared_pair("own", "personal mlp", 3)
    rows, users = prompts([3, 8, 1]), USERS
    engine = Engine(policy, model, backend=backend)
    want = engine.generate(rows, users, reward_weight=2.0, num_candidates=4, max_new_tokens=6, stop=[])
    got = by_hand(Policy(policy, backend=backend), Scorer(model, backend=backend), rows, users, 2.0, 4, 6)
    assert got == [one.tokens for one in want]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_rows_may_have_fewer_candidates(backend):
    """-1 stands behind them; what is tried is what all together get, and what is chosen is followed."""
    model = reward_model(tiny_lm(seed=3, dtype=torch.float32 if backend == "cpu" else torch.float64))
    scorer = Scorer(model, backend=backend)
    scorer.prefill([0, 1, 2], prompts([3, 6, 2]), USERS)
    several = torch.tensor([[4, 5, 6, 7], [9, 8, 7, 6], [11, 12, 13, 14]])
    whole = scorer.score(several)
    for counts in ([2, 3, 1], [4, 1, 1], [2, 2, 2]):
        left = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
        found = scorer.score(several.masked_fill(~left, -1))
        torch.testing.assert_close(found[left], whole[left], atol=1e-5, rtol=1e-5)
        assert found[~left].isnan().all()
    scorer.advance([0, 1, 2], several[:, 1])  # of the last row no candidate
    again = Scorer(model, backend=backend)
    texts = [[*text, one] for text, one in zip(prompts([3, 6, 2]), several[:, 1].tolist(), strict=True)]
    again.prefill([0, 1, 2], texts, USERS)
    torch.testing.assert_close(scorer.score(several), again.score(several), atol=1e-5, rtol=1e-5)
    for wrong in ([[-1, 4]] * 3, [[4, -1, 5]] * 3):
        with pytest.raises(PyargsError, match="at least one candidate"):
            scorer.score(wrong)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(["cpu", "eager"]))
def test_rewards_are_those_of_the_text_whoever_is_here_and_whatever_came_next(data, backend):
    """Rows join, leave, and go on one by one, by candidates or other tokens: a reward is that of the whole text."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    model = reward_model(tiny_lm(seed=3, dtype=dtype))
    scorer, texts, users = Scorer(model, backend=backend, max_rows=3), {}, {}
    for step in range(data.draw(st.integers(2, 8))):
        if len(texts) < 3 and data.draw(st.booleans()) or not texts:
            (text,) = prompts([data.draw(st.integers(1, 6))], step)
            texts[step], users[step] = text, data.draw(st.sampled_from(USERS))
            scorer.prefill([step], [text], [users[step]])
        rows = data.draw(st.lists(st.sampled_from(sorted(texts)), min_size=1, unique=True))
        candidates = torch.tensor(prompts([data.draw(st.integers(1, 4))] * len(rows), step + 50)[: len(rows)])
        candidates = candidates.view(len(rows), -1)
        got = scorer.score(candidates, rows)
        for row, own, rewards in zip(rows, candidates.tolist(), got, strict=True):
            for token, reward in zip(own, rewards.tolist(), strict=True):
                state = model.backbone(torch.tensor([[*texts[row], token]])).last_hidden_state[0, -1:]
                want = model.head(state, model.users.rows([users[row]])).item()
                assert reward == pytest.approx(want, abs=2e-4, rel=2e-4)
        going = data.draw(st.lists(st.sampled_from(sorted(texts)), unique=True))
        if going:
            taken = [candidates[rows.index(row), 0].item() if row in rows and row % 2 else 7 for row in going]
            scorer.advance(going, taken)
            for row, token in zip(going, taken, strict=True):
                texts[row].append(token)
        if len(texts) > 1 and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(texts)))
            scorer.drop([gone])
            del texts[gone]


def test_what_is_wrong_is_refused_by_name():
    policy, model = shared_pair("own", "linear", 0)
    scorer, half = Scorer(model, max_rows=2), Policy(policy, max_rows=2)
    scorer.prefill(["a"], [[3, 4]], ["ann"])
    half.prefill(["a"], [[3, 4]])
    for call, message in [
        (lambda: scorer.prefill(["a"], [[3]], ["ann"]), "here already"),
        (lambda: scorer.prefill(["b"], [[3]], ["zoe"]), "unknown user"),
        (lambda: scorer.prefill(["b", "c"], [[3], [4]], ["ann", "bob"]), "room for 2"),
        (lambda: scorer.prefill(["b"], [[]], ["ann"]), "at least one token"),
        (lambda: scorer.prefill(["b"], [[3]], ["ann", "bob"]), "one user for each"),
        (lambda: scorer.score([[3, 4]], ["z"]), "not here"),
        (lambda: scorer.score([[3], [4]]), "values for 1 rows"),
        (lambda: scorer.score([[10**6]]), "tokens of the"),
        (lambda: half.advance(["a"], [3, 4]), "values for 1 rows"),
        (lambda: half.drop(["z"]), "not here"),
        (lambda: scorer.advance(["a"], [10**6]), "0 to"),
        (lambda: half.advance(["a"], [-1]), "0 to"),
        (lambda: half.advance(["a"], torch.tensor([1.5])), "token"),
        (lambda: Scorer(policy), "RewardModel"),
        (lambda: Scorer(model, max_rows=0), "max_rows"),
        (lambda: Policy(policy, max_rows=1.5), "max_rows"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
    assert scorer.rows == half.rows == ["a"]
    model.backbone.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(PyargsError, match="changed"):
        scorer.score([[3]])


def test_what_was_refused_left_no_trace():
    """Rows of a model whose cache has no places come in together: the second prefill is refused, and the first goes on."""
    policy, model = random_lm("mistral", 0), reward_model(random_lm("mistral", 1))
    scorer, half = Scorer(model), Policy(policy)
    (text,) = prompts([4])
    for one, more in ((scorer, [["ann"]]), (half, [])):
        one.prefill(["a"], [text], *more)
        with pytest.raises(PyargsError, match="when no row is here"):
            one.prefill(["b"], [text], *more)
        with pytest.raises(PyargsError):
            one.advance(["a"], [10**6])
        one.advance(["a"], [7])
        assert one.rows == ["a"]
    want = policy(torch.tensor([[*text, 7]])).logits[0, -1]
    torch.testing.assert_close(half.next_logits()[0], want.float())
    states = model.backbone(torch.tensor([[*text, 7, 9]])).last_hidden_state[0, -1:]
    torch.testing.assert_close(scorer.score([[9]])[0], model.head(states, model.users.rows(["ann"])).float())


def test_rows_stay_on_one_side_of_a_border():
    """longrope turns all rows of a pass as the longest asks."""
    short, long = prompts([4, 14])  # the border is at 12 tokens
    policy, model = random_lm("phi3 longrope", 0), reward_model(random_lm("phi3 longrope", 1))
    for make, more in ((lambda: Scorer(model), [["ann"]]), (lambda: Policy(policy), [])):
        one = make()
        one.prefill(["a"], [short], *more)
        with pytest.raises(PyargsError, match="longrope"):
            one.prefill(["b"], [long], *more)
        with pytest.raises(PyargsError, match="longrope"):
            for _ in range(12):
                one.advance(["a"], [7])
        one = make()
        one.prefill(["b"], [long], *more)
        one.advance(["b"], [7])  # beyond the border it goes on
    want = policy(torch.tensor([[*long, 7]])).logits[0, -1]
    torch.testing.assert_close(one.next_logits()[0], want.float())


def test_dropout_is_refused():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    policy.train()  # drops nothing
    Policy(policy)
    for lm in (policy, model.backbone):
        lm.train()
        for layer in (lm.model if lm is policy else lm).layers:
            layer.self_attn.attention_dropout = 0.5
    for call in (lambda: Policy(policy), lambda: Scorer(model), lambda: Engine(policy), lambda: Engine(tiny_lm(), model)):
        with pytest.raises(PyargsError, match=r"eval\(\)"):
            call()
    policy.eval()
    Policy(policy)
