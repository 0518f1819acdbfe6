"""Text of tokens piece by piece is the text of them all, and stop strings end it wherever the borders of tokens are."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pyargs.data.synthetic import tiny_tokenizer
from pyargs.serve.text import LETTERS, Stops, Stripped, Text, Writer, token_bytes

BYTE_LEVEL = tiny_tokenizer()


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are `▁`, one is put before a text and taken away again, unknown letters are bytes."""
    words = ["▁", "▁the", "▁cat", "s", "at", "▁▁", "é", ".", "the", "▁é", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = [(token, -float(i)) for i, token in enumerate(tokens)]
    inner = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SENTENCEPIECE = sentencepiece()
TOKENIZERS = {"byte level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids) -> list[str]:
    text = Text(tokenizer)
    return [*(text.add(token) for token in ids), text.rest()]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60))
def test_any_tokens_of_bytes(ids):
    assert "".join(pieces(BYTE_LEVEL, ids)) == whole(BYTE_LEVEL, ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(st.sampled_from("the cats é.\n😀日 ñ"), max_size=40), st.data())
def test_the_tokens_of_a_text_with_special_ones_between(name, written, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    for _ in range(data.draw(st.integers(0, 3))):
        ids.insert(data.draw(st.integers(0, len(ids))), tokenizer.eos_token_id)
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(259, len(SENTENCEPIECE) - 1), max_size=40))
def test_any_tokens_of_sentencepiece_that_are_no_bytes(ids):
    """Of bytes that are no characters all of a run change when one more comes; see `Text`."""
    assert "".join(pieces(SENTENCEPIECE, ids)) == whole(SENTENCEPIECE, ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(st.sampled_from("the cats é.\n😀日 ñ"), max_size=40), st.data())
def test_what_goes_on_with_a_text_is_the_rest_of_it(name, written, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    at = data.draw(st.integers(0, len(ids)))
    begun = whole(tokenizer, ids[:at])
    assume(not begun.endswith("\ufffd"))
    text = Text(tokenizer, ids[:at])
    assert begun + "".join([*(text.add(token) for token in ids[at:]), text.rest()]) == whole(tokenizer, ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_is_told_of_half_a_character(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("cat 😀 cat", add_special_tokens=False)["input_ids"]
    assert all("\ufffd" not in piece for piece in pieces(tokenizer, ids))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("written", ["the cat sat. " * 100, "日本" * 200, "é\n" * 200, "\ufffd" * 300])
def test_a_token_costs_the_same_however_long_the_answer_is(name, written):
    tokenizer, seen = TOKENIZERS[name], []

    class Counted:
        is_fast, all_special_ids, added_tokens_decoder = False, tokenizer.all_special_ids, tokenizer.added_tokens_decoder

        @staticmethod
        def decode(ids, **how):
            seen.append(len(ids))
            return tokenizer.decode(ids, **how)

    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    text = Text(Counted)
    for token in ids:
        text.add(token)
    assert len(ids) >= 200 and max(seen) < 20 and len(seen) < 4 * len(ids)


def cut(text: str, stops: list[str]) -> str:
    """The plain form: letter by letter, the text in front of the first stop string that is complete."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


few = st.text(st.sampled_from("ab\n "), max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(few, max_size=8), st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=5), max_size=4))
def test_stop_strings_across_all_borders(parts, stops):
    ends, told = Stops(stops), ""
    for part in parts:
        told += ends.add(part)
        assert cut("".join(parts), stops).startswith(told), "nothing is taken back"
    assert told + ends.rest() == cut("".join(parts), stops)
    assert ends.found == any(stop in "".join(parts) for stop in stops)


@settings(max_examples=100, deadline=None)
@given(st.lists(few, max_size=8))
def test_only_what_may_begin_a_stop_string_is_held_back(parts):
    ends, told = Stops(["ab"]), ""
    for i, part in enumerate(parts):
        told += ends.add(part)
        so_far = "".join(parts[: i + 1])
        assert ends.found or told == so_far.removesuffix("a")


@settings(max_examples=100, deadline=None)
@given(st.lists(few, max_size=8))
def test_white_space_around_is_left_out(parts):
    stripped = Stripped()
    assert "".join(map(stripped.add, parts)) == "".join(parts).strip()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text(st.sampled_from("the cats é.\n😀日"), max_size=40),
    st.lists(st.text(st.sampled_from("the cats é.\n😀"), min_size=1, max_size=4), max_size=4),
    st.booleans(),
)
def test_all_of_it_together(name, written, stops, strip):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    writer, told = Writer(tokenizer, stops, strip=strip), ""
    for token in ids:
        told += writer.add(token)
        if writer.stopped:
            break
    told += writer.rest()
    want = cut(whole(tokenizer, ids), stops)
    assert told == (want.strip() if strip else want)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_make_up_the_text(name):
    tokenizer = TOKENIZERS[name]
    written = "thecat😀é日."
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode().strip() == written
    assert [token_bytes(BYTE_LEVEL, BYTE_LEVEL.convert_tokens_to_ids(letter)) for letter in LETTERS] == [
        bytes([byte]) for byte in range(256)
    ]
