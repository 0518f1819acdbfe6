"""Requests to an engine that come and go, and what each would get alone."""

from __future__ import annotations

import threading

import pytest
from decoding import USERS, prompts
from hypothesis import strategies as st

STOPS = [(), (1,), (1, 7, 9, 11, 13, 20, 21, 30, 31, 40, 41, 50, 51)]


@st.composite
def wishes(draw, most: int = 6, clip: bool = True):
    """Requests: (prompt, user, more for `submit`, the step in which it comes, that in which it is cancelled or None). clip:
    some have a reward_clip."""
    seed = draw(st.integers(0, 99))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=most))
    found = []
    for i, prompt in enumerate(prompts(lengths, seed)):
        more = dict(
            reward_weight=draw(st.sampled_from([0.0, 0.3, 1.5, 4.0])),
            num_candidates=draw(st.sampled_from([1, 2, 5, 7])),
            max_new_tokens=draw(st.integers(1, 9)),
            temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 2.0])),
            top_p=draw(st.sampled_from([1.0, 1.0, 0.4])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.5])),
            stop=draw(st.sampled_from(STOPS)),
            seed=draw(st.integers(0, 9)),
        )
        if clip and (bound := draw(st.sampled_from([None, None, 0.05, 0.8]))):
            more["reward_clip"] = bound
        when = draw(st.integers(0, 5))
        found.append((prompt, USERS[(seed + i) % 3], more, when, draw(st.sampled_from([None, None, when + 1, when + 3]))))
    return found


def play(engine, requests):
    """Answers to requests that come and go as they say."""
    numbers, step = {}, 0
    while len(numbers) < len(requests) or engine.busy:
        for i, (prompt, user, more, when, _) in enumerate(requests):
            if when == step:
                numbers[i] = engine.submit(prompt, user, **more)
        for i, (*_, gone) in enumerate(requests):
            if gone == step and i in numbers:
                engine.cancel(numbers[i])
        engine.step()
        step += 1
    return [engine.answer(numbers[i]) for i in range(len(requests))]


def answer(make, prompt, user, more):
    """Of an engine that has nothing else to do."""
    engine = make(1)
    number = engine.submit(prompt, user, **more)
    while engine.busy:
        engine.step()
    return engine.answer(number)


def check_company(make, requests, room, exact=False, alone=None):
    """Each answer is what the same request gets alone, as far as it went. make(room), alone(1): engines."""
    together = play(make(room), requests)
    for (prompt, user, more, _, gone), got in zip(requests, together, strict=True):
        want = answer(alone or make, prompt, user, more)
        n = len(got.tokens)
        assert got.tokens == want.tokens[:n] and got.slots == want.slots[:n]
        for one, other in ((got.rewards, want.rewards[:n]), (got.spreads, want.spreads[:n])):
            assert one == (other if exact else pytest.approx(other, abs=2e-5, rel=2e-5))
        if gone is None:
            assert (got.tokens, got.finish_reason) == (want.tokens, want.finish_reason)
        assert got.finish_reason in ("stop", "length", "cancelled")


def in_threads(function, count: int) -> None:
    """function(i) for each i, all at once."""
    threads = [threading.Thread(target=function, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
