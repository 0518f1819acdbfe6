"""What becomes of a request: an event at each step, and an answer with what was chosen, rewarded, and why it ended."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, Words, chosen, engine_of, prompts, wishes

STOPS = list(range(1, 61, 3))


def pair():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


@pytest.mark.parametrize("stop", [[], STOPS])
def test_answers_leave_the_stop_token_out_and_say_why_they_ended(stop):
    rows, wish = prompts([2, 6, 4]), dict(max_new_tokens=[3, 12, 7], stop=stop)
    steps = chosen(*pair(), rows, USERS, **wish)
    engine = engine_of(*pair())
    numbers = [engine.submit(row, user, **own) for row, user, own in zip(rows, USERS, wishes(3, **wish), strict=True)]
    while engine.busy:
        engine.step()
    for number, row, user, step, limit in zip(numbers, rows, USERS, steps, wish["max_new_tokens"], strict=True):
        answer = engine.answer(number)
        assert (answer.number, answer.user, answer.prompt, answer.backend) == (number, user, row, "eager")
        stopped = step.tokens[-1] in stop
        assert answer.finish_reason == ("stop" if stopped else "length")
        assert all(token not in stop for token in answer.tokens)
        kept = len(step.tokens) - stopped
        assert (answer.tokens, answer.slots, answer.rewards) == tuple(part[:kept] for part in step)
        assert stopped or kept == limit
        assert len(answer.spreads) == kept and answer.text is None


def test_an_answers_text_is_its_tokens_decoded():
    policy, model = pair()
    model.tokenizer = Words(61)
    (answer,) = engine_of(policy, model).generate(prompts([4]), ["ann"], reward_weight=1.0, max_new_tokens=5)
    assert answer.text == Words(61).decode(answer.tokens)


def test_rewards_and_spreads_are_those_of_the_candidates():
    policy, model = pair()
    (prompt,) = prompts([4])
    wish = dict(reward_weight=2.0, num_candidates=5, max_new_tokens=6, stop=[])
    (answer,) = engine_of(policy, model).generate([prompt], ["bob"], **wish)
    user = model.users.rows(["bob"])
    for n, (slot, reward, spread) in enumerate(zip(answer.slots, answer.rewards, answer.spreads, strict=True)):
        text = prompt + answer.tokens[:n]
        candidates = policy(torch.tensor([text])).logits[0, -1].topk(5).indices
        texts = torch.cat([torch.tensor([text]).expand(5, -1), candidates.unsqueeze(1)], dim=1)
        rewards = model.head(model.backbone(texts).last_hidden_state[:, -1], user.expand(5))
        assert reward == pytest.approx(rewards[slot].item(), abs=1e-5)
        assert spread == pytest.approx(rewards.std(correction=0).item(), abs=1e-5)


def test_a_stream_is_the_answer_token_by_token():
    engine, wish = engine_of(*pair()), dict(reward_weight=2.0, max_new_tokens=9)
    for row, user in zip(prompts([2, 6]), USERS, strict=False):
        *before, last = engine.stream(row, user, **wish)
        (answer,) = engine.generate([row], [user], **wish)
        told = [event.token for event in (*before, last)]
        assert told[: len(answer.tokens)] == answer.tokens == last.answer.tokens
        assert len(told) - len(answer.tokens) == (answer.finish_reason == "stop")
        assert all(event.answer is None for event in before)
