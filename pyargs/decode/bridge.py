"""From a policy's tokens to those of a reward model with another tokenizer, by way of the text."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pyargs.errors import PyargsError
from pyargs.lm.tokenize import raw_ids, text_ids

log = logging.getLogger("pyargs")
HALF = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not one yet."""


class Bridge:
    """ours, theirs: the tokenizers of the policy and of the reward model."""

    def __init__(self, ours, theirs):
        for one in (ours, theirs):
            if not isinstance(one, PreTrainedTokenizerBase):
                raise PyargsError(
                    f"policy and reward model have different tokenizers, and a {type(one).__name__} is none of transformers, "
                    "through whose text candidates could go from one to the other"
                )
        self.ours, self.theirs = ours, theirs
        added = {number for number, token in theirs.added_tokens_decoder.items() if token.special}
        self._control = {*added, *theirs.all_special_ids}

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """The reward model's ids of a prompt that is known as the policy's ids alone: those of its text, without the special
        tokens of a template, behind the reward model's own start token."""
        found = raw_ids(self.theirs, self._decoded(ids))
        if not found:
            raise PyargsError("a prompt of special tokens alone is nothing to a reward model with another tokenizer: add text")
        return found

    def text(self, answer: Sequence[int], before: str) -> str:
        """Text of an answer without special tokens; `before` is that without the last token. Bytes at its end that are no
        whole character yet are left out."""
        text = self._decoded(answer)
        if not text.endswith(HALF):
            return text
        # A tokenizer with byte tokens writes all of a run of bytes so where one is wrong, also what was a character before.
        return max(text.rstrip(HALF), before, key=len)

    def whole(self, answer: Sequence[int]) -> str:
        """`text` of a whole answer."""
        text = ""
        for end in range(len(answer)):
            text = self.text(answer[: end + 1], text)
        return text

    def ids(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The reward model's ids of answers, as of responses that it was trained on: special tokens' texts are text. None for
        a text that its tokenizer cannot read so, which is logged."""
        if not texts:
            return []
        found = self.theirs(list(texts), add_special_tokens=False)["input_ids"]
        return [ids if self._control.isdisjoint(ids) else self._careful(text) for text, ids in zip(texts, found, strict=True)]

    def _careful(self, text: str) -> list[int] | None:
        try:
            return text_ids(self.theirs, text)
        except PyargsError as error:
            log.warning("a candidate earns the reward of the text before it: %s", error)
            return None

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.ours.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
