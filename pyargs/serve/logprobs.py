"""Log-probabilities of an answer's tokens in OpenAI's two forms; ours beside them: what the candidates earned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pyargs.decode.answer import Told
from pyargs.serve.text import token_bytes

LEAST = -9999.0
"""What OpenAI writes for a token that is next to impossible."""


class Said(NamedTuple):
    """A token of an answer, what the engine told of it, and where its text begins in the answer's."""

    token: int
    told: Told
    offset: int


def of_chat(tokenizer, said: Sequence[Said], most: int) -> dict:
    """As /v1/chat/completions tells them. most: candidates of each token; each has its `reward`, null where it has none."""
    content = []
    for one in said:
        candidates = one.told.candidates[:most]
        top = [{**_entry(tokenizer, each.token, each.logprob), "reward": each.reward} for each in candidates]
        content.append({**_entry(tokenizer, one.token, one.told.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def of_completion(tokenizer, said: Sequence[Said], most: int) -> dict:
    """As /v1/completions tells them: candidates by their text, with the chosen one among them."""
    top = []
    for one in said:
        pairs = [(one.token, one.told.logprob), *((each.token, each.logprob) for each in one.told.candidates[:most])]
        top.append({_piece(tokenizer, token)[0]: max(logprob, LEAST) for token, logprob in pairs})
    return {
        "tokens": [_piece(tokenizer, one.token)[0] for one in said],
        "token_logprobs": [max(one.told.logprob, LEAST) for one in said],
        "top_logprobs": top if most else None,
        "text_offset": [one.offset for one in said],
    }


def _entry(tokenizer, token: int, logprob: float) -> dict:
    text, own = _piece(tokenizer, token)
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": own}


@lru_cache(2**15)
def _piece(tokenizer, token: int) -> tuple[str, list[int]]:
    own = token_bytes(tokenizer, token)
    return own.decode(errors="replace"), [*own]
