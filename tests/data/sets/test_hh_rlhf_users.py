"""Turns of the dialogues."""

from __future__ import annotations

from pyargs.data.sets import hh_rlhf_users


def test_turns_of_a_dialogue():
    found = hh_rlhf_users.messages("Human: Hi\nthere\n\nAssistant: Yes?\n\nHuman: One\n\nHuman: Two")
    assert found == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "One\n\nTwo"},
    ]
    assert hh_rlhf_users.messages("no mark") == [{"role": "user", "content": "no mark"}]
    assert hh_rlhf_users.messages("Human: a\n\nAssistant: \n\nHuman: b") == [{"role": "user", "content": "a\n\nb"}]
