"""Overlap with a reference: real ROUGE, and BERTScore by hand."""

from __future__ import annotations

import gzip
import json
import logging
import types

import pytest
import torch
from company import in_threads

from pyargs.errors import PyargsError
from pyargs.metrics import overlap
from pyargs.metrics.overlap import bertscore, rouge


def test_rouge_equals_the_golden_values(shared_data):
    with gzip.open(shared_data / "metrics/rouge_golden.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 400
    for row in rows:
        got = rouge([row["candidate"]], [row["reference"]])
        for name in ("rouge1", "rougeL"):
            assert got[name] == pytest.approx(100 * row["no_stemmer"][name]["f"], abs=1e-9), row


def test_rouge_counts_empty_predictions():
    found = rouge(["the cat sat", " ", ""], ["the cat sat"] * 3)
    assert found["rouge1"] == pytest.approx(100 / 3) and found["empty"] == 2 and found["n"] == 3
    for predictions, references in ([], []), (["a"], []):
        with pytest.raises(PyargsError, match="one for each"):
            rouge(predictions, references)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A tiny random BERT that knows letters, saved as a folder; its tokenizer tells no limit, as many local ones."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_bertscore_of_the_same_text_is_100_and_of_nothing_0(bert):
    found = bertscore(["a bird in the hand", "", " ", "stones"], ["a bird in the hand", "words", "words", ""], model=bert)
    assert found["bertscore_each"][0] == pytest.approx(100, abs=1e-3) and found["bertscore_each"][1:] == [0, 0, 0]
    assert found["bertscore"] == pytest.approx(25, abs=1e-3) and found["model"] == f"{bert}, layer 3, not rescaled"
    assert bertscore(["", ""], ["a", "b"], model=bert)["bertscore"] == 0
    with pytest.raises(PyargsError, match="one for each"):
        bertscore(["a"], [])
    with pytest.raises(PyargsError, match="not possible"):
        bertscore(["a"], ["b"], model=bert, rescale=True)  # no baseline was ever computed for it
    with pytest.raises(PyargsError, match="not possible"):
        bertscore(["a"], ["b"], model="no/such-model")


def test_bertscore_by_hand_for_any_batch(bert):
    """Each token's best cosine in the other text, averaged over both directions; texts beyond the positions are cut."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()

    def states(text: str):
        ids = tokenizer(text, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
        return torch.nn.functional.normalize(model(ids).last_hidden_state[0], dim=-1)

    texts = ["one", "two words", "three words here", "and a sentence of some more words, with a comma", "long " * 30]
    with torch.no_grad():
        want = []
        for text, other in zip(texts, texts[::-1], strict=True):
            cosine = states(text) @ states(other).T
            # [CLS] and [SEP] may be found, but do not count.
            precision, recall = cosine[1:-1].max(1).values.mean(), cosine[:, 1:-1].max(0).values.mean()
            want.append(200 * (precision * recall / (precision + recall)).item())
    assert bertscore(texts, texts[::-1], model=bert)["bertscore_each"] == pytest.approx(want, abs=1e-2)


def test_a_whole_title_is_a_quotation():
    from pyargs.metrics.overlap import quotes

    title = "SpeedRead: a fast pipeline"
    assert quotes("We present speedread, a FAST pipeline for names", ["something else", title], 4)
    assert not quotes("SpeedRead: a fast pipe", [title], 4) and not quotes("a fast pipeline", [title], 4)
    assert not quotes("of a fast pipeline", ["a fast pipeline"], 4), "three words are anybody's"
    assert not quotes("", [title, ""], 4)


def test_other_threads_hear_of_what_is_loaded_meanwhile(monkeypatch, caplog):
    log = logging.getLogger("transformers.modeling_utils")

    def score(predictions, references):
        log.warning("of the scorer")
        in_threads(lambda i: log.warning("of another thread"), 1)
        return None, None, torch.ones(len(predictions))

    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(overlap, "_scorer", lambda *a: (types.SimpleNamespace(score=score), 1))
    before = log.level
    assert bertscore(["a"], ["b"])["bertscore"] == 100 and log.level == before
    log.warning("afterwards")
    assert caplog.messages == ["of another thread", "afterwards"]
