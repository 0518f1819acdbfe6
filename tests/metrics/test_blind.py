"""Scorers that know neither the user nor language."""

from __future__ import annotations

import pytest


def test_blind_scorers():
    from pyargs.metrics.blind import blind, contents, overlap

    instruct = "Name it: "
    prompts = [f"{instruct}red fox", f"{instruct}blue owl", f"{instruct}old hen"]
    found = blind(prompts, ["red fox.", "an owl it is", "hen"], ["a cow", "owl", "the name"], ["a", "a", "b"], embedder=None)
    assert {n: (f["accuracy"], f["reversed"], f["tie_rate"]) for n, f in found.items()} == {
        "words": (33.33, 33.33, 33.33),
        "characters": (66.67, 33.33, 0.0),
        "lines": (0.0, 0.0, 100.0),
        "terminator": (33.33, 0.0, 66.67),
        "brackets": (0.0, 0.0, 100.0),
        "word_overlap": (66.67, 33.33, 0.0),
    }
    assert contents(prompts) == ["red fox", "blue owl", "old hen"]
    assert contents([[{"role": "user", "content": "x"}, {"role": "user", "content": "last"}]]) == ["last"]
    assert overlap("The red-fox, 12", "FOX fox 12 cow") == pytest.approx(2 / 3) and overlap("a", "...") == 0


def test_blind_cosine(encoder):
    from pyargs.lm.embed import embed
    from pyargs.metrics.blind import blind

    prompts, chosen, rejected = ["red fox", "blue owl"], ["red", "cow hen"], ["rain", "blue"]
    found = blind(prompts, chosen, rejected, ["a", "b"], embedder=encoder)[f"{encoder}_cosine"]
    one, two, three = (embed(encoder, texts) for texts in (prompts, chosen, rejected))
    assert found["accuracy"] == 50 * sum((one * two).sum(1) > (one * three).sum(1)) and found["n"] == 2
