"""In-context learning: what a user preferred before, shown in the prompt (methods ICL and ICL-RAG)."""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor

from pyargs.errors import PyargsError, UnknownUser, did_you_mean
from pyargs.lm.encode import check_messages, encode_prompt

TASK = "Below are examples of what one user prefers. Answer the last prompt as this user would prefer."


class Demonstrations:
    """The pairs that may be shown to a model, by user, and how `shots` of them are chosen and laid out.

    of_user: user -> [{"prompt", "chosen", "rejected"}]. retrieve: "random", seeded by `seed` and the user, the same for all
    prompts of the user; else the name of an embedding model: the pairs whose prompts are nearest by cosine, the most
    similar last. show: "pair" or "chosen". content_tokens: longest prompt shown of a pair. instruction: a text that all
    prompts begin with, said once at the beginning instead. max_tokens: length of a prompt with all that it shows, the same
    whether a response is to be scored or generated.
    """

    def __init__(
        self, *, shots: int, retrieve: str, show: str, content_tokens: int, instruction: str, max_tokens: int,
        seed: int, of_user: dict[str, list[dict]] | None = None,
    ):  # fmt: skip
        self.shots, self.retrieve, self.show, self.content_tokens = shots, retrieve, show, content_tokens
        self.instruction, self.max_tokens, self.seed = instruction, max_tokens, seed
        self.of_user = dict(of_user or {})
        self._embed = lru_cache(maxsize=None)(lambda text: embed(self.retrieve, [text])[0])

    def config(self) -> dict:
        names = ("shots", "retrieve", "show", "content_tokens", "instruction", "max_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def choose(self, prompt: str, user: str) -> list[dict]:
        """The pairs to show before a prompt, the most similar last; all of the user's where there are fewer than `shots`."""
        if user not in self.of_user:
            raise UnknownUser(
                f"no demonstrations of user '{user}': adapt the model to this user first." + did_you_mean(user, self.of_user)
            )
        pairs = self.of_user[user]
        if self.retrieve == "random":
            return random.Random(f"{self.seed} {user}").sample(pairs, min(self.shots, len(pairs)))
        similar = torch.stack([self._embed(pair["prompt"]) for pair in pairs]) @ self._embed(prompt)
        nearest = similar.argsort(descending=True, stable=True)[: self.shots].flip(0)
        return [pairs[i] for i in nearest.tolist()]

    def prompt_ids(self, tokenizer, prompt, user: str) -> list[int]:
        """Ids of the prompt with its demonstrations, in the model's template.

        What is longer than max_tokens loses demonstrations, the farthest first, then what `encode_prompt` cuts: the oldest
        turns, which stand before, and the end of the last content.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        check_messages(messages)
        *history, last = messages
        asked = last["content"].removeprefix(self.instruction)
        shown = self.choose(last["content"], user)

        def ids(room: int | None = None) -> list[int]:
            turn = {"role": "user", "content": self._layout(tokenizer, shown, asked)}
            return encode_prompt(tokenizer, [*history, turn], room)

        while len(found := ids()) > self.max_tokens and shown:
            shown = shown[1:]
        # Without demonstrations nothing of the layout can be lost: the rest is cut as any prompt is.
        return found if len(found) <= self.max_tokens else ids(self.max_tokens)

    def _layout(self, tokenizer, shown: list[dict], asked: str) -> str:
        if not shown:
            return self.instruction + asked
        parts = [self.instruction.strip() or TASK]
        for number, pair in enumerate(shown, 1):
            content = tokenizer(pair["prompt"].removeprefix(self.instruction), add_special_tokens=False)["input_ids"]
            lines = [
                f"Example {number}",
                f"Prompt: {tokenizer.decode(content[: self.content_tokens]).strip()}",
                f"Preferred: {pair['chosen'].strip()}",
            ]
            if self.show == "pair":
                lines.append(f"Not preferred: {pair['rejected'].strip()}")
            parts.append("\n".join(lines))
        parts.append(f"Prompt: {asked.strip()}\nPreferred:")
        return "\n\n".join(parts)


def last_user_text(prompt) -> str:
    """The prompt itself, or the content of a conversation's last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@lru_cache(maxsize=1)
def _embedder(name: str):
    from transformers import AutoModel, AutoTokenizer

    from pyargs.lm.hub import resolve

    path = resolve(name)
    try:
        return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    except OSError as error:
        raise PyargsError(f"cannot load the embedding model '{name}': {str(error).splitlines()[0]}") from error


@torch.no_grad()
def embed(name: str, texts: list[str]) -> Tensor:
    """Unit embeddings float32 [n, d]: mean over the tokens' last states of "minilm" or another sentence encoder."""
    tokenizer, model = _embedder(name)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    states = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(states.float(), dim=-1)
