"""Loading language models, and telling whether two tokenizers are the same."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import reward_model

from pyargs.data import synthetic
from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode.engine import Engine
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


def test_a_policy_is_placed_by_a_device_map(lm_folder, tmp_path):
    """As far as a CPU shows it: accelerate's hooks around each part, which move what comes in to where the part lies."""
    from accelerate import dispatch_model

    def answers(lm) -> tuple[str, list[list[int]]]:
        engine = Engine(lm, reward_model(plain))
        found = engine.generate([[5, 6, 7], [9, 8]], ["ann", "bob"], reward_weight=2.0, max_new_tokens=5)
        return engine.backend, [answer.tokens for answer in found]

    plain, _ = load_lm(lm_folder, device="cpu")
    mapped, _ = load_lm(lm_folder, device_map={"": "cpu"})
    assert answers(mapped) == answers(plain)
    parts = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    hooked = dispatch_model(load_lm(lm_folder, device="cpu")[0], parts, force_hooks=True)
    assert hooked.model.norm._hf_hook is not None
    assert answers(hooked) == ("eager", answers(plain)[1])
    with pytest.raises(PyargsError, match="device and device_map both say"):
        load_lm(lm_folder, device="cpu", device_map="auto")
    with pytest.raises(PyargsError, match="no device 'moon'|moon"):
        load_lm(lm_folder, device_map={"": "moon"})


def test_weights_that_come_and_go_are_refused(lm_folder, tmp_path):
    from accelerate import disk_offload

    lm = disk_offload(load_lm(lm_folder, device="cpu")[0], str(tmp_path), torch.device("cpu"))
    assert lm(torch.tensor([[5, 6, 7]])).logits.isfinite().all(), "transformers itself can run it"
    with pytest.raises(PyargsError, match="device_map has put weights on the disk or the host"):
        Engine(lm)
