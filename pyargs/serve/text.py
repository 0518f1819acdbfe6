"""The text of an answer as its tokens come, and where it ends: stop strings, also across the borders of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

HALF = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not one yet."""


def decoder(tokenizer) -> Callable[[list[int]], str]:
    """Ids to their text as it is: what `tokenizer.decode` does, which takes ten times as long for a few."""
    if tokenizer.is_fast:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    return partial(tokenizer.decode, clean_up_tokenization_spaces=False)


class Text:
    """Text of tokens, piece by piece: `add` gives what is certain by now, `rest` what was held back.

    tokenizer: of transformers. All pieces together are what it decodes from all tokens, without its special tokens and without
    cleaning spaces up. An incomplete character is held back: three tokens at most, as many as it may lack. (A tokenizer with
    byte tokens writes all of a run of them as U+FFFD where one is wrong; what was a character before that stays told.)
    A token costs the same however long the answer is: only the tokens behind the last certain text are decoded again, with
    those of the piece before, whose end may decide how they are written. behind: ids of a text that they go on with, if there
    is one: some tokenizers write the first token of a text without its space.
    """

    def __init__(self, tokenizer, behind: Sequence[int] = ()):
        self._decode = decoder(tokenizer)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(added.union(tokenizer.all_special_ids))
        self._ids: list[int] = []  # the last certain piece's, and those behind it
        self._told = 0  # characters of their text that have been told
        self._whole = 0  # so many of the ids end with a whole character
        for count in range(1, 5 if behind and behind[-1] not in self._special else 1):  # until they are whole characters
            if HALF not in (text := self._decode([*behind[-count:]])):
                self._ids, self._told, self._whole = [*behind[-count:]], len(text), len(behind[-count:])
                break

    def add(self, token: int) -> str:
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        held = len(text) - len(text.rstrip(HALF))
        if len(self._ids) - self._whole > 3:  # the first of them lack nothing any more
            held = min(held, 3)
        certain = len(text) - held
        new, self._told = text[self._told : certain], max(self._told, certain)
        if certain == len(text):
            self._forget(text, self._whole)
            self._whole = len(self._ids)
        elif len(self._ids) > 8:  # bytes that are no characters
            self._forget(text, len(self._ids) - 4)
        return new

    def rest(self) -> str:
        text = self._decode(self._ids)
        new, self._told = text[self._told :], len(text)
        return new

    def _forget(self, text: str, count: int) -> None:
        """Drops the first ids where the others alone are written in the same way."""
        rest = self._decode(self._ids[count:])
        if rest and text.endswith(rest) and self._told >= len(text) - len(rest):
            del self._ids[:count]
            self._told -= len(text) - len(rest)
            self._whole = 0


class Stops:
    """Ends a text in front of the stop string that is complete first; where two end there, in front of the longer one.

    `add` gives what of a text is certain not to be of a stop string, `rest` what was held back. What it gives does not depend
    on how the text is cut into pieces. found: whether a stop string has come; nothing follows then.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops, self._held, self.found = stops, "", False

    def add(self, text: str) -> str:
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held, self.found = "", True
            return text[: min(ends)[1]]
        begun = max(self._begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the text's end may begin the stop string."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Stripped:
    """A text without the white space around it, piece by piece, as `str.strip` makes it of the whole."""

    def __init__(self):
        self._begun, self._held = False, ""

    def add(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._begun, self._held = self._begun or bool(kept), text[len(kept) :]
        return kept


class Writer:
    """From tokens to what a client gets of their text. strip: without white space around it, as `Answer.text`. behind: ids of
    the text that it goes on with. stopped: a stop string has come."""

    def __init__(self, tokenizer, stops: Sequence[str] = (), *, strip: bool, behind: Sequence[int] = ()):
        self._text, self._stops = Text(tokenizer, behind), Stops(stops)
        self.length = 0  # of the text so far, that in front of a stop string included
        self._strip = Stripped().add if strip else str

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def add(self, token: int) -> str:
        text = self._text.add(token)
        self.length += len(text)
        return self._strip(self._stops.add(text))

    def rest(self) -> str:
        """What follows the last token."""
        return self._strip(self._stops.add(self._text.rest()) + self._stops.rest())


BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def letters() -> Iterator[tuple[str, int]]:
    """The letters that byte-level tokenizers write bytes in (GPT-2's `bytes_to_unicode`)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte if byte in plain else next(others)), byte


LETTERS = dict(letters())


def token_bytes(tokenizer, token: int) -> bytes:
    """The bytes that a token stands for; they need not be whole characters."""
    text = decoder(tokenizer)([token])
    if HALF not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if byte := BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    if all(letter in LETTERS for letter in piece):
        return bytes(LETTERS[letter] for letter in piece)
    return text.encode()
