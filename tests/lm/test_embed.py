"""Embeddings: any sentence encoder, each text once."""

from __future__ import annotations

import numpy as np
import pytest

from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.lm import embed as module
from pyargs.lm.embed import embed

TEXTS = ["red dog near hill", "cat", "blue fox under snow and rain", "cat"]


def test_vectors_are_unit_and_those_of_sentence_transformers(encoder):
    from sentence_transformers import SentenceTransformer

    found = embed(encoder, TEXTS)
    assert found.dtype == np.float32 and found.shape == (4, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found[1], found[3])
    want = SentenceTransformer(encoder).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert embed(encoder, []).shape[0] == 0


def test_the_encoders_own_pooling_is_used(tmp_path, encoder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(encoder)
    mean = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), pooling_mode="mean")])
    mean.save(str(tmp_path / "mean"))
    found = embed(str(tmp_path / "mean"), TEXTS)
    np.testing.assert_allclose(found, mean.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    assert np.abs(found - embed(encoder, TEXTS)).max() > 1e-2  # of a causal model: the last token


def test_no_text_is_computed_twice_even_if_killed(encoder, monkeypatch):
    from sentence_transformers import SentenceTransformer

    seen, real = [], SentenceTransformer.encode

    def encode(self, texts, **more):
        if len(seen) >= 4:
            raise KeyboardInterrupt
        seen.extend(texts)
        return real(self, texts, **more)

    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    monkeypatch.setattr(module, "CHUNK", 2)
    texts = [f"cat dog {'red ' * i}" for i in range(7)]
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, texts)
    first = seen[:]
    assert len(first) == 4
    seen.clear()
    embed(encoder, texts)
    assert not set(seen) & set(first) and len(seen) == 3
    seen.clear()
    embed(encoder, texts[::-1])
    assert not seen


def test_another_model_of_the_same_name_has_other_vectors(tmp_path):
    folder = tmp_path / "encoder"
    synthetic.tiny_lm(folder, seed=0)
    one = embed(str(folder), TEXTS)
    synthetic.tiny_lm(folder, seed=1)
    assert np.abs(one - embed(str(folder), TEXTS)).max() > 1e-3


def test_a_name_on_the_hub(encoder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or encoder)
    np.testing.assert_array_equal(embed("Qwen/Qwen3-Embedding-0.6B", TEXTS), embed(encoder, TEXTS))
    assert asked == ["Qwen/Qwen3-Embedding-0.6B"]


def test_refuses(tmp_path, encoder):
    with pytest.raises(PyargsError, match="text 1 to embed is list"):
        embed(encoder, ["a", ["b"]])
    with pytest.raises(PyargsError, match="cannot load the embedding model 'nobody/nothing'"):
        embed("nobody/nothing", ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PyargsError, match="cannot load the embedding model"):
        embed(str(tmp_path / "empty"), ["a"])
    assert not list(tmp_path.glob("cache/embeddings/empty*"))
