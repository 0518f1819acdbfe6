"""The nouns that the rest of the package passes around: Users, Batch, Features, LogProbs, Decoded, Result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs.errors import PyargsError, UnknownUser, described, did_you_mean
from pyargs.files import read_json, read_tensors, write_json
from pyargs.user_ids import user_ids


class Users(nn.Module):
    """Ids and, for each named kind of vector, one row per user.

    vectors: name -> float tensor [users, ...]. A model without vectors is the same for everyone: it then knows no
    users, and `rows` answers 0 for any id.
    """

    def __init__(self, ids: Iterable[str] = (), **vectors: Tensor):
        super().__init__()
        self.ids = {user: row for row, user in enumerate(user_ids(ids))}
        self.vectors = nn.ParameterDict({name: nn.Parameter(value) for name, value in vectors.items()})
        for name, value in self.vectors.items():
            if len(value) != len(self.ids):
                raise PyargsError(f"users: {len(value)} rows of '{name}' for {len(self.ids)} different ids")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def personal(self) -> bool:
        return len(self.vectors) > 0

    def rows(self, users: Iterable[str]) -> Tensor:
        """Row of each user, int64 [n]. Raises UnknownUser, naming near ids, for an id that was never trained or adapted."""
        users = user_ids(users)
        if not self.personal:
            return torch.zeros(len(users), dtype=torch.long, device="cpu")
        missing = [user for user in users if user not in self.ids]
        if missing:
            raise UnknownUser(
                f"unknown user '{missing[0]}' ({len(self)} are known): adapt the model to this user first."
                + did_you_mean(missing[0], self.ids)
            )
        return torch.tensor([self.ids[user] for user in users], dtype=torch.long, device="cpu")

    def append(self, ids: Iterable[str], **vectors: Tensor) -> None:
        """Adds new users; `vectors` holds rows [n, ...] for each kind of vector. Raises on a known id or another shape."""
        ids = user_ids(ids)
        known = [user for user in ids if user in self.ids]
        if known or len(set(ids)) < len(ids):
            raise PyargsError(f"user '{(known or ids)[0]}' is there already: new users need new ids")
        if set(vectors) != set(self.vectors):
            raise PyargsError(f"users hold {sorted(self.vectors)}, got {sorted(vectors)}")
        for name, value in vectors.items():
            old = self.vectors[name]
            if value.shape != (len(ids), *old.shape[1:]):
                raise PyargsError(f"'{name}' must be {[len(ids), *old.shape[1:]]}, got {list(value.shape)}")
            self.vectors[name] = nn.Parameter(torch.cat([old.detach(), value.detach().to(old)]))
        if self.personal:
            self.ids.update({user: len(self.ids) + i for i, user in enumerate(ids)})

    def remove(self, ids: Iterable[str]) -> None:
        """Takes users and their vectors away; the others move up. Raises UnknownUser, and then removes nobody."""
        gone = set(self.rows(ids).tolist()) if self.personal else set()
        kept = [row for row in range(len(self)) if row not in gone]
        if gone:
            for name, value in self.vectors.items():
                self.vectors[name] = nn.Parameter(value.detach()[kept].clone())
            names = list(self.ids)
            self.ids = {names[row]: place for place, row in enumerate(kept)}

    def save(self, folder: str | Path) -> None:
        """Writes users.safetensors and users.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self.vectors.items()}, folder / "users.safetensors")
        write_json(folder / "users.json", list(self.ids))

    @classmethod
    def load(cls, folder: str | Path) -> Users:
        folder = Path(folder)
        ids, vectors = read_json(folder / "users.json"), read_tensors(folder / "users.safetensors")
        if not isinstance(ids, list) or not all(isinstance(user, str) for user in ids):
            raise PyargsError(f"{folder / 'users.json'} is no list of ids")
        with described(f"{folder / 'users.safetensors'} does not fit"):
            return cls(ids, **vectors)


@dataclass
class Batch:
    """Hidden states of N pairs, as a loss sees them. Index 0 of the second dimension is the chosen response, 1 the rejected.

    hidden float32 [N, 2, T, D]; mask bool [N, 2, T], true on response tokens (T = 1 where only the last one is kept);
    user int64 [N], rows of the user table; pair int64 [N], numbers of the pairs among the train rows; prompt float32 [N, D],
    the last state of the prompt by itself, for models that encode it apart; step: minibatches before this one.
    """

    hidden: Tensor
    mask: Tensor
    user: Tensor
    pair: Tensor | None = None
    prompt: Tensor | None = None
    step: int = 0

    def __len__(self) -> int:
        return len(self.user)

    def to(self, device) -> Batch:
        return Batch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()})


@dataclass
class Features:
    """Hidden states of a frozen backbone for a set of pairs. A response that several pairs use is stored once.

    hidden float32 [M, D]: states of the response tokens, one response after the other; offsets int64 [S + 1]: where each
    of the S responses starts; chosen, rejected int64 [N]: responses of each pair; users: N ids; prompt int64 [N]: where a
    model encodes prompts apart, the number of each pair's prompt, stored like a response.
    """

    hidden: Tensor
    offsets: Tensor
    chosen: Tensor
    rejected: Tensor
    users: list[str]
    prompt: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    def select(self, keep: Iterable[int]) -> Features:
        """The pairs with these numbers; hidden states are shared, not copied."""
        keep = torch.as_tensor(list(keep), dtype=torch.long)
        users = [self.users[i] for i in keep.tolist()]
        prompt = None if self.prompt is None else self.prompt[keep]
        return Features(self.hidden, self.offsets, self.chosen[keep], self.rejected[keep], users, prompt)

    def last(self) -> Tensor:
        """States [N, 2, D] of the last tokens."""
        return self.hidden[self.offsets[torch.stack([self.chosen, self.rejected], dim=1) + 1] - 1]

    def batch(self, user_rows: Tensor, index: Tensor | None = None, *, last: bool) -> Batch:
        """Pairs `index` (all by default) as a Batch; user_rows int64 [N] is `users.rows(self.users)`.

        last: only the last token of each response, for models that read no other.
        """
        index = torch.arange(len(self), device="cpu") if index is None else index
        response = torch.stack([self.chosen[index], self.rejected[index]], dim=1)  # [n, 2]
        start, end = self.offsets[response], self.offsets[response + 1]
        start = end - 1 if last else start
        length = end - start
        position = torch.arange(int(length.max()) if len(index) else 1, device="cpu")
        mask = position < length.unsqueeze(-1)  # [n, 2, T]
        hidden = self.hidden.new_zeros(*mask.shape, self.hidden.shape[-1])
        hidden[mask] = self.hidden[(start.unsqueeze(-1) + position)[mask]]  # padding can be most of a batch
        prompt = None if self.prompt is None else self.hidden[self.offsets[self.prompt[index] + 1] - 1]
        return Batch(hidden, mask, user_rows[index], pair=index, prompt=prompt)


@dataclass
class LogProbs:
    """Log-probs of N pairs under a language model, each summed over the response and its stop token.

    own float32 [N, 2] (chosen, rejected); generic float32 [N, 2]: the same for the user without a vector, where the model
    has user vectors; user, pair int64 [N] as in Batch; step: minibatches before this one.
    """

    own: Tensor
    generic: Tensor | None
    user: Tensor
    pair: Tensor
    step: int = 0

    def __len__(self) -> int:
        return len(self.user)


@dataclass
class Decoded:
    """What a decoder returns for B rows and N steps. After a row's stop token tokens are pad_id, the rest 0.

    tokens int64 [B, N] (the stop token included), rewards float32 [B, N] of the chosen candidates, slots int64 [B, N]:
    rank of the chosen candidate under the policy (0 is its favourite); spreads float32 [B, N]: standard deviation of the
    rewards over the k candidates; lengths int64 [B]: tokens before the stop token.
    """

    tokens: Tensor
    rewards: Tensor
    slots: Tensor
    spreads: Tensor
    lengths: Tensor

    def answers(self) -> list[list[int]]:
        """Each row's ids without stop token and padding."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    def texts(self, tokenizer) -> list[str]:
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in self.answers()]


@dataclass
class Result:
    """What a stage measured: values, with everything needed to say where they come from (`files.provenance`)."""

    stage: str
    values: dict
    config: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))
