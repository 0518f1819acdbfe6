"""In-context learning: a user's earlier preferences, shown in the prompt (methods ICL and ICL-RAG)."""

from __future__ import annotations

import random
from pathlib import Path

from pyargs.config import check_kinds
from pyargs.errors import PyargsError, UnknownUser, did_you_mean, extra
from pyargs.files import read_json
from pyargs.lm.embed import embed
from pyargs.lm.tokenize import as_messages, encode_prompt, shorten, text_ids
from pyargs.user_ids import user_id

TASK = "Below are examples of what one user prefers. Answer the last prompt as this user would prefer."


KINDS = {
    "shots": int,
    "retrieve": str,
    "show": str,
    "content_tokens": int,
    "instruction": str,
    "demonstration_tokens": int,
    "max_tokens": int | None,
    "seed": int,
    "prompt_name": str,
    "response_name": str,
}
"""The fields of `Demonstrations.config`."""


class Demonstrations:
    """The pairs that may be shown to a model, by user, and how `shots` of them are chosen and laid out.

    of_user: user -> [{"prompt", "chosen", "rejected"}]. retrieve: "random", seeded by `seed` and the user, the same for all
    prompts of the user; "bm25", or the name of an embedding model: the pairs whose prompts are nearest by shared words or by
    cosine, the most similar last. show: "pair" or "chosen". content_tokens: longest prompt shown of a pair. instruction: a
    text that all prompts begin with, said once at the beginning instead. prompt_name, response_name: what the fields are
    called, such as Abstract and title. demonstration_tokens: the most tokens that demonstrations add to a prompt.
    max_tokens: in older folders, the most tokens of prompt and demonstrations together, instead of demonstration_tokens.
    """

    def __init__(
        self,
        *,
        shots: int,
        retrieve: str,
        show: str,
        content_tokens: int,
        instruction: str,
        seed: int,
        demonstration_tokens: int = 0,
        max_tokens: int | None = None,
        prompt_name: str = "Prompt",
        response_name: str = "",
        of_user: dict[str, list[dict]] | None = None,
    ):
        self.shots, self.retrieve, self.show, self.content_tokens = shots, retrieve, show, content_tokens
        self.demonstration_tokens, self.max_tokens = demonstration_tokens, max_tokens
        self.instruction, self.seed = instruction, seed
        self.prompt_name, self.response_name = prompt_name, response_name
        self.of_user = dict(of_user or {})
        self._vectors: dict[str, object] = {}  # of the texts embedded so far

    def config(self) -> dict:
        return {name: getattr(self, name) for name in KINDS}

    @classmethod
    def load(cls, fields: dict, folder: Path) -> Demonstrations:
        """From what `config` gave and the folder's demonstrations.json. Raises PyargsError where one of them is damaged."""
        file = folder / "demonstrations.json"
        if isinstance(fields, dict) and isinstance(fields.get("max_tokens"), int):
            fields = {"demonstration_tokens": 0, **fields}  # saved before these had a limit of their own
        check_kinds(fields, KINDS, f"{folder / 'config.json'}, demonstrations")
        if strange := fields.keys() - KINDS.keys():
            raise PyargsError(f"{folder / 'config.json'}, demonstrations: unknown field '{min(strange)}'")
        for name, least in (("shots", 0), ("content_tokens", 1), ("demonstration_tokens", 0), ("max_tokens", 1)):
            if fields[name] is not None and fields[name] < least:
                raise PyargsError(f"{folder / 'config.json'}, demonstrations: '{name}' must be at least {least}")
        if fields["show"] not in ("pair", "chosen"):
            raise PyargsError(f"{folder / 'config.json'}, demonstrations: 'show' is pair or chosen, not '{fields['show']}'")
        of_user = read_json(file)
        check_kinds({"users": of_user}, {"users": dict[str, list[dict[str, str]]]}, str(file))
        for user, pairs in of_user.items():
            if any(set(pair) != {"prompt", "chosen", "rejected"} for pair in pairs):
                raise PyargsError(f"{file}: a pair of user '{user}' has other fields than prompt, chosen, rejected")
        return cls(**fields, of_user=of_user)

    def remove(self, users: list[str]) -> None:
        """Takes users away, with all that was kept of their texts."""
        for user in users:
            del self.of_user[user]
        self._vectors.clear()

    def choose(self, prompt: str, user: str) -> list[dict]:
        """The pairs to show before a prompt, the most similar last; all of the user's where there are fewer than `shots`."""
        user = user_id(user)
        if user not in self.of_user:
            raise UnknownUser(
                f"no demonstrations of user '{user}': adapt the model to this user first." + did_you_mean(user, self.of_user)
            )
        pairs = self.of_user[user]
        if self.retrieve == "random":
            return random.Random(f"{self.seed} {user}").sample(pairs, min(self.shots, len(pairs)))
        similar = self._similar(prompt, [pair["prompt"] for pair in pairs])
        nearest = sorted(range(len(pairs)), key=lambda i: (-similar[i], i))[: self.shots]
        return [pairs[i] for i in reversed(nearest)]

    def _similar(self, prompt: str, shown: list[str]) -> list[float]:
        """Compares prompts without what all of them begin with, which would make all similar."""
        query, *texts = [text.removeprefix(self.instruction) for text in (prompt, *shown)]
        if self.retrieve == "bm25":
            return bm25(query, texts)
        new = [text for text in dict.fromkeys((query, *texts)) if text not in self._vectors]
        self._vectors |= dict(zip(new, embed(self.retrieve, new), strict=True))
        return [float(self._vectors[text] @ self._vectors[query]) for text in texts]

    def prompt_ids(self, tokenizer, prompt, user: str, max_tokens: int | None = None) -> list[int]:
        """Ids of the prompt with its demonstrations, in the model's template.

        max_tokens: of the prompt alone, which is cut by `encode_prompt` as without demonstrations. Where demonstrations need
        too much room, the least similar are left out. Raises PyargsError where template or instruction would be cut.
        """
        said = last_user_text(prompt)
        shown = self.choose(said, user)
        max_tokens = max_tokens if self.max_tokens is None else self.max_tokens
        messages, alone = shorten(tokenizer, prompt, max_tokens)
        place = max(i for i, message in enumerate(messages) if message["role"] == "user")
        asked = messages[place]["content"]
        if said.startswith(self.instruction):
            asked = asked[len(self.instruction) :]
            if not asked and said != self.instruction:
                raise PyargsError(f"max_tokens={max_tokens} leaves no room behind the instruction: raise it")
        room = len(alone) + self.demonstration_tokens if self.max_tokens is None else self.max_tokens
        for first in range(len(shown)):
            turn = {"role": "user", "content": self._layout(tokenizer, shown[first:], asked)}
            ids = encode_prompt(tokenizer, [*messages[:place], turn, *messages[place + 1 :]])
            if len(ids) <= room:
                return ids
        return alone

    def _layout(self, tokenizer, shown: list[dict], asked: str) -> str:
        parts = [self.instruction.strip() or TASK]
        preferred = f"Preferred {self.response_name}".strip()
        for number, pair in enumerate(shown, 1):
            content = text_ids(tokenizer, pair["prompt"].removeprefix(self.instruction))
            lines = [
                f"Example {number}",
                f"{self.prompt_name}: {tokenizer.decode(content[: self.content_tokens]).strip()}",
                f"{preferred}: {pair['chosen'].strip()}",
            ]
            if self.show == "pair":
                lines.append(f"Not {preferred.lower()}: {pair['rejected'].strip()}")
            parts.append("\n".join(lines))
        parts.append(f"{self.prompt_name}: {asked.strip()}\n{preferred}:")
        return "\n\n".join(parts)


def bm25(query: str, texts: list[str]) -> list[float]:
    """Okapi BM25 of the query in each of the texts; English stop words do not count."""
    with extra("evaluate", "retrieval by bm25"):
        import bm25s

    asked, *words = bm25s.tokenize([query, *texts], return_ids=False, show_progress=False)
    known = [word for word in asked if any(word in found for found in words)]
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return index.get_scores(known).tolist()


def last_user_text(prompt) -> str:
    """The prompt itself, or what the user said last in a conversation. Raises PyargsError where the user said nothing."""
    said = [message["content"] for message in as_messages(prompt) if message["role"] == "user"]
    if not said:
        raise PyargsError("the prompt has no turn of the user's, where demonstrations stand: add one")
    return said[-1]
