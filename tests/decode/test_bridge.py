"""From one tokenizer to another by way of the text: what an answer says so far, and what a reward model reads of it."""

from __future__ import annotations

import codecs

import pytest
from decoding import Words
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokens import KINDS, byte_level, sentencepiece
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pyargs.decode.bridge import HALF, Bridge
from pyargs.errors import PyargsError
from pyargs.lm.tokenize import encode_response, text_ids

WRITTEN = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(["the cat", " ", "  ", "\n", "🙂", "👩‍🔬", "日本", "é", "e\u0301", "<s>", "</s>", "x"]), max_size=8
    ).map("".join),
).filter(lambda text: HALF not in text)
BYTE = {letter: byte for byte, letter in bytes_to_unicode().items()}


def said(name: str, ids) -> str:
    """The text of these tokens by their bytes, without what is no whole character yet."""
    written = KINDS[name]().convert_ids_to_tokens(ids)
    if name == "byte level":
        raw = bytes(BYTE[letter] for token in written for letter in token)
    else:
        raw = b"".join(
            bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode() for token in written
        ).removeprefix(b" ")
    return codecs.getincrementaldecoder("utf-8")().decode(raw, final=False)


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@example("🙂🙂")
@example("a 🙂 ")
@given(WRITTEN)
def test_an_answer_says_its_whole_characters(name, text):
    ours = KINDS[name]()
    bridge, ids, before = Bridge(ours, byte_level()), text_ids(ours, text), ""
    for end in range(1, len(ids) + 1):
        before = bridge.text(ids[:end], before)
        assert before == said(name, ids[:end]) == bridge.whole(ids[:end])


@pytest.mark.parametrize("name", list(KINDS))
@settings(max_examples=40, deadline=None)
@given(st.lists(WRITTEN, max_size=4))
def test_the_reward_model_reads_it_as_it_reads_responses(name, texts):
    theirs = KINDS[name]()
    for text, ids in zip(texts, Bridge(byte_level(), theirs).ids(texts), strict=True):
        assert ids == text_ids(theirs, text)
        if ids:
            assert ids == encode_response(theirs, text)
        assert theirs.bos_token_id not in ids and theirs.eos_token_id not in ids


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["byte level", "sentencepiece"]), st.data())
def test_any_tokens_have_a_text_that_never_ends_in_half_a_character(name, data):
    """Also those that no text is cut into: bytes alone, and control tokens, which say nothing."""
    ours = KINDS[name]()
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1), max_size=8))
    bridge, before = Bridge(ours, byte_level()), ""
    for end in range(1, len(ids) + 1):
        text = bridge.text(ids[:end], before)
        assert not text.endswith(HALF)
        assert ids[end - 1] not in ours.all_special_ids or text in (before, bridge.text(ids[:end], ""))
        before = text


def test_prompts_of_ids_are_read_as_text_behind_a_start_token():
    ours, theirs = byte_level(), sentencepiece()
    ids = ours.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True)["input_ids"]
    assert Bridge(ours, theirs).prompt(ids) == text_ids(theirs, "user\nthe cat\nassistant\n")
    with pytest.raises(PyargsError, match="special tokens alone"):
        Bridge(ours, theirs).prompt([ours.bos_token_id])


def test_what_is_no_tokenizer_of_transformers_is_refused():
    for pair in ((Words(30), byte_level()), (byte_level(), Words(30))):
        with pytest.raises(PyargsError, match="different tokenizers, and a Words is none of transformers"):
            Bridge(*pair)


def test_a_text_that_cannot_be_read_is_named(caplog):
    """A control token of one letter cannot be cut."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "¶": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="¶")
    assert Bridge(byte_level(), theirs).ids(["a", "a ¶", "a a"]) == [[2], None, [2, 2]]
    assert "reward of the text before it" in caplog.text
