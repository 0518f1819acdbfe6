"""The policy's own answers: greedy, kept, and kept apart by what computed them."""

from __future__ import annotations

import pytest
import torch

from pyargs.decode.engine import Engine
from pyargs.decode.prompts import greedy_answers
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt
from pyargs.ops.library import has_extension

PROMPTS = ["tell me a story", "what is new", "why", "tell me more", "who is there"]


def test_they_are_what_generate_writes(lm_folder):
    lm, tokenizer = load_lm(lm_folder)
    found = greedy_answers(lm_folder, PROMPTS, max_new_tokens=6, batch_size=2)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        own = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(own, skip_special_tokens=True).strip()


def test_none_is_written_twice_and_a_killed_run_goes_on(lm_folder, monkeypatch):
    want = greedy_answers(lm_folder, PROMPTS, max_new_tokens=4)
    asked, submit, step = [], Engine.submit, Engine.step
    monkeypatch.setattr(Engine, "submit", lambda self, prompt, **more: asked.append(prompt) or submit(self, prompt, **more))
    assert greedy_answers(lm_folder, PROMPTS[::-1], max_new_tokens=4) == want[::-1] and not asked

    def killed(self):
        events = step(self)
        if len(asked) and any(event.answer is not None for event in events):
            monkeypatch.setattr(Engine, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        return events

    more = {"max_new_tokens": 5, "batch_size": 1}
    monkeypatch.setattr(Engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        greedy_answers(lm_folder, PROMPTS, **more)
    assert sorted(asked) == sorted(PROMPTS)
    asked.clear()
    monkeypatch.setattr(Engine, "step", step)
    greedy_answers(lm_folder, PROMPTS, **more)
    assert len(asked) == len(PROMPTS) - 1, "the first was kept"


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_answers_of_another_backend_are_others(lm_folder, monkeypatch):
    greedy_answers(lm_folder, PROMPTS, max_new_tokens=3)
    asked, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, prompt, **more: asked.append(prompt) or submit(self, prompt, **more))
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    greedy_answers(lm_folder, PROMPTS, max_new_tokens=3)
    assert len(asked) == len(PROMPTS)
