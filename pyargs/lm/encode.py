"""Text to token ids: the only file that applies a chat template, and the one that packs responses behind their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyargs.errors import PyargsError


def encode_prompt(tokenizer, prompt: str | list[dict], max_tokens: int | None = None) -> list[int]:
    """Ids of a prompt, with the model's chat template and its generation prompt where it has one.

    prompt: one user turn as a str, or messages {"role", "content"} that end with a user turn. What is longer than
    max_tokens is shortened before templating: first the oldest turns go (a system turn stays), then the end of the last
    content is cut. The template is never cut, so a too small max_tokens raises PyargsError.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    check_messages(messages)
    ids = _template(tokenizer, messages)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    system = 1 if messages[0]["role"] == "system" else 0
    while len(messages) - system > 1 and len(ids) > max_tokens:
        # A user turn goes together with the reply to it: some templates refuse a history that opens with a reply.
        del messages[system : system + (2 if len(messages) - system > 2 else 1)]
        ids = _template(tokenizer, messages)
    content = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    keep = len(content)
    while len(ids) > max_tokens:
        keep -= len(ids) - max_tokens
        if keep <= 0:
            raise PyargsError(f"max_tokens={max_tokens} leaves no room for the prompt inside its template: raise it")
        messages[-1]["content"] = tokenizer.decode(content[:keep])
        ids = _template(tokenizer, messages)
    return ids


def encode_response(tokenizer, text: str) -> list[int]:
    """Ids of a response as a decoder would have produced them: no special tokens, no terminator."""
    if not isinstance(text, str):
        raise PyargsError(f"a response must be a str, got {type(text).__name__}: {str(text)[:60]!r}")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PyargsError(f"the response {text!r} has no tokens: drop such rows")
    return ids


def check_messages(messages: list[dict]) -> None:
    """Raises PyargsError for a conversation without turns or a content that is not a str."""
    if not messages:
        raise PyargsError("the prompt has no messages")
    for message in messages:
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise PyargsError(f"the content of a '{message.get('role')}' message must be a str, got {kind}")


def _template(tokenizer, messages: list[dict]) -> list[int]:
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)
    # A base model: the turns as they are. The tokenizer adds its own start token if it has one.
    return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as ids and mask [B, T], int64. The mask alone says what is padding: pad_id may be any id."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@dataclass
class Packed:
    """R rows of tokens that hold S responses, several of which may stand behind one copy of their prompt.

    input_ids, position_ids int64 [R, L]; attention_mask bool [R, 1, L, L]: a response token sees the prompt and the
    response's own earlier tokens; row, prompt_end, start, end int64 [S]: response s is input_ids[row, start:end], and its
    first token is predicted at position prompt_end - 1 of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    prompt_end: Tensor
    start: Tensor
    end: Tensor

    def to(self, device) -> Packed:
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


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
        mask[r, 0, :n, :n] = torch.ones(n, n).tril().bool()
        start = n
        for response in several:
            end = start + len(response)
            ids[r, start:end] = torch.tensor(response)
            position[r, start:end] = torch.arange(n, n + len(response))
            mask[r, 0, start:end, :n] = True
            mask[r, 0, start:end, start:end] = torch.ones(len(response), len(response)).tril().bool()
            spans.append((r, n, start, end))
            start = end
        mask[r, 0, range(start, length), range(start, length)] = True  # padding sees itself: no row of the softmax is empty
    row, prompt_end, start, end = torch.tensor(spans).T
    return Packed(ids, position, mask, row, prompt_end, start, end)
