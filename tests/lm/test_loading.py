"""Loading language models, and telling whether two tokenizers are the same."""

from __future__ import annotations

import json

import pytest

from pyargs.data import synthetic
from pyargs.data.synthetic import tiny_tokenizer
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm


def test_two_tokenizers_are_compared_once_and_again_when_they_change(monkeypatch):
    import gc
    import weakref

    from pyargs.lm.loading import same_tokenizer

    one, other = tiny_tokenizer(), tiny_tokenizer()
    counted = []
    kind = type(one)
    monkeypatch.setattr(kind, "get_vocab", lambda self, plain=kind.get_vocab: counted.append(1) or plain(self))
    assert all(same_tokenizer(one, other) for _ in range(5)) and len(counted) == 2
    one.add_tokens(["<new>"])
    assert not same_tokenizer(one, other) and not same_tokenizer(one, other) and len(counted) == 4
    other.add_tokens(["<new>"])
    assert same_tokenizer(one, other)
    one._tokenizer = tiny_tokenizer().backend_tokenizer  # another backend, which lacks the token
    assert not same_tokenizer(one, other)
    one._tokenizer.add_tokens(["<old>"])  # behind the tokenizer's back, and as long as the other one
    assert len(one) == len(other) and not same_tokenizer(one, other)
    gone = [weakref.ref(one), weakref.ref(other)]
    del one, other
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_folder_with_another_head_is_no_language_model(head, tmp_path):
    import transformers

    folder = synthetic.tiny_lm(tmp_path / "lm", tie=True)
    lm, tokenizer = load_lm(str(folder))
    other = getattr(transformers, f"AutoModelFor{head}").from_config(lm.config)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(PyargsError, match=f"LlamaFor{head}, whose head would be dropped"):
        load_lm(str(tmp_path / "other"))
    lm.get_decoder().save_pretrained(tmp_path / "base")  # a decoder by itself loses nothing: its output layer is tied
    tokenizer.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["architectures"] == ["LlamaModel"]
    load_lm(str(tmp_path / "base"))
