"""Text to token ids: the only file that applies a chat template, and the one that packs responses behind their prompt."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyargs.errors import PyargsError

ROLES = ("system", "developer", "user", "assistant", "tool")


def encode_prompt(tokenizer, prompt: str | list[dict], max_tokens: int | None = None) -> list[int]:
    """Ids of a prompt, with the model's chat template and its generation prompt where it has one.

    prompt: one user turn as a str, or messages {"role", "content"}. Where the last is the assistant's, it is what the answer
    begins with: the model goes on with it. Control tokens come from the template alone: the text `<|im_end|>` in a content
    is text (tokens that the tokenizer calls special; others of its added tokens stay what they are).
    What is longer than max_tokens is shortened before templating: first the oldest turns go (a system turn stays), then the
    end of the last user's content is cut. The template is never cut, nor is what the answer begins with, so a too small
    max_tokens raises PyargsError; so do a template that can not go on with the assistant's turn, and a tokenizer that can
    not write a content without control tokens.
    """
    return shorten(tokenizer, prompt, max_tokens)[1]


def shorten(tokenizer, prompt: str | list[dict], max_tokens: int | None = None) -> tuple[list[dict], list[int]]:
    """The messages of a prompt as `encode_prompt` cuts them, and their ids."""
    messages = [dict(message) for message in as_messages(prompt)]
    ids = _template(tokenizer, messages)
    if max_tokens is None or len(ids) <= max_tokens:
        return messages, ids
    system = 1 if messages[0]["role"] in ("system", "developer") else 0
    begun = 1 if messages[-1]["role"] == "assistant" else 0
    while len(messages) - system > 1 + begun and len(ids) > max_tokens:
        # A user turn goes together with the reply to it: some templates refuse a history that opens with a reply.
        del messages[system : system + (2 if len(messages) - system > 2 + begun else 1)]
        ids = _template(tokenizer, messages)
    last = [{"content": ""}, *messages[system : len(messages) - begun]][-1]
    content = text_ids(tokenizer, last["content"])
    keep = len(content)
    while len(ids) > max_tokens:
        keep -= len(ids) - max_tokens
        if keep <= 0:
            raise PyargsError(f"max_tokens={max_tokens} leaves no room for the prompt inside its template: raise it")
        last["content"] = tokenizer.decode(content[:keep])
        ids = _template(tokenizer, messages)
    return messages, ids


def encode_response(tokenizer, text: str) -> list[int]:
    """Ids of a response as a decoder would have produced them: no special tokens, no terminator.

    The text of a special token is text here, too. Raises PyargsError for a response without tokens.
    """
    if not isinstance(text, str):
        raise PyargsError(f"a response must be a str, got {type(text).__name__}: {str(text)[:60]!r}")
    ids = text_ids(tokenizer, text)
    if not ids:
        raise PyargsError(f"the response {text!r} has no tokens: drop such rows")
    return ids


def encode_closed(tokenizer, prompt: str | list[dict], response: str) -> list[int]:
    """Ids of a whole conversation as the chat template closes it behind the response, without a generation prompt: what a
    sequence classifier was trained on. Without a template the response stands behind the prompt as it is.

    An assistant's last turn is what the response goes on with. Control tokens come from the template alone, as in
    `encode_prompt`.
    """
    messages = as_messages(prompt)
    if not tokenizer.chat_template:
        return [*_template(tokenizer, messages), *encode_response(tokenizer, response)]
    encode_response(tokenizer, response)  # refuses what is none
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    return _template(tokenizer, [*messages, {"role": "assistant", "content": begun + response}], closed=True)


def closing(tokenizer) -> list[int]:
    """Ids that the chat template writes behind a response. Raises PyargsError for a template that also writes something in
    front of it, which no generation prompt has."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "a"}]
    begun = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "a"}], tokenize=False)
    if not whole.startswith(f"{begun}a"):
        raise PyargsError(
            "this model's chat template writes a response otherwise than behind its generation prompt, so that ids of a "
            "prompt and a response make no conversation: rank texts (pair_scores), or give its tokenizer another chat_template"
        )
    return tokenizer(whole[len(begun) + 1 :], add_special_tokens=False)["input_ids"]


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """The prompt as messages. Raises PyargsError for none, an unknown role, a content that is not a str, another field."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise PyargsError(f"a prompt is a str or a list of messages {{'role', 'content'}}, got {str(prompt)[:60]!r}")
    if not messages:
        raise PyargsError("the prompt has no messages")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PyargsError(f"unknown role {role!r} of a message: the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise PyargsError(f"the content of a '{role}' message must be a str, got {type(content).__name__}")
        more = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
        if more:
            raise PyargsError(f"a message has the field '{more[0]}', but only role and content are read: leave it out")
    return list(messages)


def raw_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text that a model goes on with, without a chat template: the tokenizer adds its own start token if it has one.

    The text of a special token is text here, too.
    """
    return _ids(tokenizer, [text], "".join, add_special_tokens=True)


def text_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text alone, without special tokens, even if it has their texts."""
    return _ids(tokenizer, [text], "".join)


def _template(tokenizer, messages: list[dict], closed: bool = False) -> list[int]:
    """closed: without a generation prompt, the last turn is complete."""
    if not tokenizer.chat_template:
        # A base model: the turns as they are. The tokenizer adds its own start token if it has one.
        ids = _ids(tokenizer, [message["content"] for message in messages], "\n".join, add_special_tokens=True)
        if not ids:
            raise PyargsError("the prompt has no tokens: a model without a chat template needs a text to go on with")
        return ids
    goes_on = messages[-1]["role"] == "assistant" and not closed

    def render(contents: list[str]) -> str:
        filled = [message | {"content": content} for message, content in zip(messages, contents, strict=True)]
        try:
            return tokenizer.apply_chat_template(
                filled, add_generation_prompt=not (goes_on or closed), continue_final_message=goes_on, tokenize=False
            )
        except Exception as error:  # whatever the template raises, as most do for an order of roles that they do not know
            turns = ", ".join(message["role"] for message in messages)
            what = "go on with the assistant's last turn" if goes_on else "write this conversation"
            raise PyargsError(f"the model's chat template can not {what} (turns: {turns}): {error}") from error

    return _ids(tokenizer, [message["content"] for message in messages], render)


def _ids(tokenizer, contents: list[str], render: Callable, add_special_tokens: bool = False) -> list[int]:
    """Ids of the text render(contents), in which no content may produce a special token.

    If the text has the same special tokens as with harmless contents, it is read as it is. Otherwise each special token's text
    in a content is split after its first character, and the parts are read one by one. Raises PyargsError where that does not
    help, and where the template changes with the contents, so that the parts do not make up the text.
    """
    if any(re.search("[\ud800-\udfff]", content) for content in contents):
        raise PyargsError("a text holds half a character (a lone surrogate): it is not text")
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    numbers, texts = {*added, *tokenizer.all_special_ids}, {*added.values(), *tokenizer.all_special_tokens}

    def controls(ids: list[int], *but: int | None) -> list[int]:
        return [i for i in ids if i in numbers and i not in but]

    def read(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def read_all(texts: Iterable[str]) -> dict[str, list[int]]:
        """In one call: there may be a hundred thousand, and many alike."""
        different = list(dict.fromkeys(texts))
        found = tokenizer(different, add_special_tokens=False)["input_ids"] if different else []
        return dict(zip(different, found, strict=True))

    whole = render(contents)
    ids = tokenizer(whole, add_special_tokens=add_special_tokens)["input_ids"]
    harmless = render(["a" if content.strip() else content for content in contents])
    frame = tokenizer(harmless, add_special_tokens=add_special_tokens)["input_ids"]
    if controls(ids) == controls(frame):
        return ids
    mark = str(secrets.randbits(256))  # in no content, and digits stay where a template changes letters
    cut = re.compile(f"(?=(?:{'|'.join(map(re.escape, texts))}))(.)", re.DOTALL)
    first, *rest = render([cut.sub(rf"\g<1>{mark}", content) for content in contents]).split(mark)
    if "".join([first, *rest]) != whole:
        raise PyargsError(
            "a text holds what the model's chat template takes for a special token and writes otherwise: take it out of the "
            "text"
        )
    # Behind a line's end, since tokenizers of sentencepiece begin every text with a space of their own.
    ids, line, behind = read(first), read("\n"), read_all("\n" + part for part in rest)
    alone = read_all(part for part in rest if behind["\n" + part][: len(line)] != line)
    for part in rest:
        ids += alone[part] if part in alone else behind["\n" + part][len(line) :]
    bare = read(harmless)
    start = next((i for i in range(len(frame)) if frame[i : i + len(bare)] == bare), 0)
    ids = frame[:start] + ids + frame[start + len(bare) :]  # what the tokenizer adds around a text
    if controls(ids, tokenizer.unk_token_id) != controls(frame, tokenizer.unk_token_id):
        raise PyargsError(
            f"a text holds what this tokenizer reads as a special token ({', '.join(sorted(texts))[:200]}) and can not read "
            "otherwise: take it out of the text"
        )
    return ids


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as ids and mask [B, T], int64. The mask alone says what is padding: pad_id may be any id."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device="cpu")
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device="cpu")
    return ids, mask


@dataclass
class Packed:
    """R rows of tokens that hold S responses, several of which may stand behind one copy of their prompt.

    input_ids, position_ids int64 [R, L]; attention_mask bool [R, 1, L, L]: a response token sees the prompt and the
    response's own earlier tokens; None where each row holds one response, which causal attention serves; row, prompt_end,
    start, end int64 [S]: response s is input_ids[row, start:end], and its first token is predicted at position
    prompt_end - 1 of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    row: Tensor
    prompt_end: Tensor
    start: Tensor
    end: Tensor

    def to(self, device) -> Packed:
        return Packed(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], *, share: bool = True) -> Packed:
    """Packs each prompt with all its responses in one row: a forward pass then reads the prompt once.

    prompts: R id lists; responses: for each prompt the id lists of its responses. share=False gives each response a row
    of its own, for models whose layers do not follow an attention mask (state-space, sliding-window). Padding stands on
    the right and is seen by nothing else.
    """
    if not share:
        prompts = [p for p, several in zip(prompts, responses, strict=True) for _ in several]
        responses = [[r] for several in responses for r in several]
    length = max(len(p) + sum(map(len, several)) for p, several in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    position = torch.zeros_like(ids)
    mask = torch.zeros(len(prompts), 1, length, length, dtype=torch.bool)
    spans = []
    for r, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
        n = len(prompt)
        ids[r, :n], position[r, :n] = torch.tensor(prompt, dtype=torch.long), torch.arange(n)
        mask[r, 0, :n, :n] = torch.ones(n, n, dtype=torch.bool, device="cpu").tril()
        start = n
        for response in several:
            end = start + len(response)
            ids[r, start:end] = torch.tensor(response, device="cpu")
            position[r, start:end] = torch.arange(n, n + len(response), device="cpu")
            mask[r, 0, start:end, :n] = True
            size = len(response)
            mask[r, 0, start:end, start:end] = torch.ones(size, size, dtype=torch.bool, device="cpu").tril()
            spans.append((r, n, start, end))
            start = end
        mask[r, 0, range(start, length), range(start, length)] = True  # padding sees itself: no row of the softmax is empty
    row, prompt_end, start, end = torch.tensor(spans, device="cpu").T
    return Packed(ids, position, mask if share else None, row, prompt_end, start, end)
