"""The data types that the rest of the package shares: Users, Batch, Features, LogProbs, Result."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs.errors import PyargsError, UnknownUser, described, did_you_mean
from pyargs.files import read_json, read_tensors, write_text
from pyargs.user_ids import UserRows, user_ids

START = "start.safetensors"
"""In a model's folder: `Users.start`."""


class Users(nn.Module):
    """Ids and, for each named kind of vector, one row per user.

    vectors: name -> float tensor [users, ...], not copied. ids: user -> row. trained: how many users the model was trained
    on; theirs are the first rows, and adapted users follow. A model without vectors is the same for everyone: it knows no
    users, and `rows` gives 0 for any id. start: the mean [1, ...] of trained users who are not in the table, where new ones
    begin; empty as long as they are.

    Adding or removing a user costs its own rows only. Afterwards `vectors` holds new Parameters, in the same memory as long as
    there is room. Removing users changes the order of rows: whoever asks for rows and then reads them holds `lock` meanwhile.
    """

    def __init__(self, ids: Iterable[str] = (), **vectors: Tensor):
        super().__init__()
        self.lock = threading.RLock()
        self.ids = UserRows(ids)
        self.trained = len(self.ids)
        self.vectors = nn.ParameterDict({name: nn.Parameter(value) for name, value in vectors.items()})
        self.start: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # of each kind of vector the memory with places for more users, once some came
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
                + did_you_mean(missing[0], self.ids),
                missing[0],
            )
        return torch.tensor([self.ids[user] for user in users], dtype=torch.long, device="cpu")

    def append(self, ids: Iterable[str], **vectors: Tensor) -> None:
        """Adds new users behind the others, as adapted ones; `vectors` holds rows [n, ...] for each kind of vector.

        Raises PyargsError on a known id or another shape, and then adds nobody.
        """
        with self.lock:
            ids = user_ids(ids)
            known = [user for user in ids if user in self.ids]
            if known or len(set(ids)) < len(ids):
                raise PyargsError(f"user '{(known or ids)[0]}' is there already: new users need new ids")
            if set(vectors) != set(self.vectors):
                raise PyargsError(f"users hold {sorted(self.vectors)}, got {sorted(vectors)}")
            vectors = {name: torch.as_tensor(value) for name, value in vectors.items()}
            for name, value in vectors.items():
                old = self.vectors[name]
                if value.shape != (len(ids), *old.shape[1:]):
                    raise PyargsError(f"'{name}' must be {[len(ids), *old.shape[1:]]}, got {list(value.shape)}")
            if not self.personal:
                return
            before, count = len(self), len(self) + len(ids)
            rooms = {name: self._room_for(name, count) for name in vectors}
            for name, room in rooms.items():
                room[before:count] = vectors[name].detach()
                self._replace(name, room[:count])
            self.ids.append(ids)

    def remove(self, ids: Iterable[str]) -> None:
        """Takes users away and overwrites their vectors. Raises UnknownUser, and then removes nobody.

        The last rows move into the gaps: rows of trained users into gaps among these, then the last of all into the rest.
        """
        with self.lock:
            gone = set(self.rows(ids).tolist()) if self.personal else set()
            if not gone:
                return
            trained = {row for row in gone if row < self.trained}
            left, count = self.trained - len(trained), len(self) - len(gone)
            self._fill(trained, self.trained)
            self._fill({*range(left, self.trained), *(gone - trained)}, len(self))
            self.trained = left
            self.ids.cut(count)
            for name, value in self.vectors.items():
                data = value.detach()
                data[count:] = 0
                data = data[:count]
                if data.untyped_storage().nbytes() > 4 * data.nbytes:  # give back what most users have left
                    self._room.pop(name, None)
                    data = data.clone()
                self._replace(name, data)

    def _fill(self, free: set[int], end: int) -> None:
        """Moves rows so that, of those before `end`, the last ones are free in the place of these."""
        left = end - len(free)
        to, of = [row for row in sorted(free) if row < left], [row for row in range(left, end) if row not in free]
        for value in self.vectors.values():
            data = value.detach()
            data[to] = data[of]
        for place, row in zip(to, of, strict=True):
            self.ids.move(row, place)

    def _room_for(self, name: str, count: int) -> Tensor:
        """The memory of a kind of vector, with places for `count` rows; if it must be allocated, for half as many again."""
        old, room = self.vectors[name].detach(), self._room.get(name)
        if room is None or room.data_ptr() != old.data_ptr() or len(room) < count:
            room = torch.cat([old, old.new_zeros(count + count // 2 + 1 - len(old), *old.shape[1:])])
            self._room[name] = room
        return room

    def _replace(self, name: str, value: Tensor) -> None:
        self.vectors[name] = nn.Parameter(value, requires_grad=self.vectors[name].requires_grad)

    def _apply(self, *args, **options):
        """As for any module. Vectors that this moved elsewhere (`to`, `half`) leave no memory behind."""
        super()._apply(*args, **options)
        self._room = {name: room for name, room in self._room.items() if room.data_ptr() == self.vectors[name].data_ptr()}
        return self

    def __getstate__(self) -> dict:
        """A copy of the table has memory and a lock of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"} | {"_room": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()

    def save(self, folder: str | Path) -> None:
        """Writes users.safetensors, users.json, the ids by row, one on a line, and start.safetensors if there is a `start`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self.vectors.items()}, folder / "users.safetensors")
        write_text(folder / "users.json", json.dumps(self.ids.ids, ensure_ascii=False, separators=(",\n", ":")) + "\n")
        if self.start:
            save_file({name: value.detach().cpu().contiguous() for name, value in self.start.items()}, folder / START)

    @classmethod
    def load(cls, folder: str | Path) -> Users:
        """Reads what `save` wrote. The vectors are mapped from the file: pages are read when they are used, and copied when
        they are written to."""
        folder = Path(folder)
        ids, vectors = read_json(folder / "users.json"), read_tensors(folder / "users.safetensors")
        if not isinstance(ids, list) or not {*map(type, ids)} <= {str}:
            raise PyargsError(f"{folder / 'users.json'} is no list of ids")
        try:
            with described(f"{folder / 'users.safetensors'} does not fit"):
                return cls(ids, **vectors)
        except PyargsError as error:
            raise PyargsError(f"{folder / 'users.json'} and its vectors: {error}") from error


@dataclass
class Batch:
    """Hidden states of N pairs, as a loss sees them. Index 0 of the second dimension is the chosen response, 1 the rejected.

    hidden float32 [N, 2, T, D]; mask bool [N, 2, T], true on response tokens (T = 1 where only the last one is kept);
    user int64 [N], rows of the user table; pair int64 [N], numbers of the pairs among the train rows; prompt float32 [N, D],
    the last state of the prompt alone, for models that encode it separately; step: minibatches before this one.
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
    model encodes prompts separately, the number of each pair's prompt, stored like a response.
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
class Result:
    """What a stage measured, with settings, inputs and `files.provenance`."""

    stage: str
    values: dict
    config: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))
