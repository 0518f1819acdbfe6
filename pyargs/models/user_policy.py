"""UserPolicy: a language model that answers each user by itself, through a soft prompt (P-DPO) or demonstrations (ICL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError, described
from pyargs.files import read_tensors
from pyargs.lm import lora
from pyargs.lm.cache import can_share
from pyargs.lm.forward import token_logprobs
from pyargs.lm.tokenize import Packed, encode_prompt, pack
from pyargs.models import folder as folders
from pyargs.models.demonstrations import Demonstrations
from pyargs.scoring import encode_pairs, pair_logprobs
from pyargs.types import LogProbs, Users

GENERIC = -1
"""The user row of the generic user, who has no vector."""


class SoftPrompt(nn.Module):
    """`forward(user int64 [N]) -> [N, tokens, d]`, embeddings that stand before the prompt; user GENERIC has the generic ones.

    generic e_0 [tokens, d], and the users' vector "offset" [U, tokens, d]: e_u = e_0 + o_u. With clusters: centres
    [C, tokens, d], and the users' vector "mixture" [U, C]: e_u = sum_c softmax(mixture_u)_c centre_c; generic [C] holds the
    generic user's logits. Older folders lack it: there the generic prompt is the centres' mean.
    """

    def __init__(self, centres: Tensor, users: Users, generic: Tensor | None = None):
        super().__init__()
        self.centres = nn.Parameter(centres)  # [1, tokens, d] without clusters: e_0
        self.generic = None if generic is None else nn.Parameter(generic)
        self.users = users

    def forward(self, user: Tensor) -> Tensor:
        known = (user != GENERIC)[:, None, None]
        row = user.clamp(min=0)
        shares = None if self.generic is None else self.generic.softmax(0)
        generic = self.centres.mean(0) if shares is None else torch.einsum("c,ctd->td", shares, self.centres)
        generic = generic.expand(len(user), -1, -1)
        if len(self.users) == 0:
            return generic
        if "offset" in self.users.vectors:
            return generic + self.users.vectors["offset"][row] * known
        mixed = torch.einsum("nc,ctd->ntd", self.users.vectors["mixture"][row].softmax(-1), self.centres)
        return torch.where(known, mixed, generic)


class UserPolicy(nn.Module):
    """pi_u(y | x): lm with a soft prompt of the user, with demonstrations in the prompt, or with neither.

    It answers by itself, without a reward model and without candidates.
    """

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        *,
        soft: SoftPrompt | None = None,
        demonstrations: Demonstrations | None = None,
        about: dict | None = None,
    ):
        super().__init__()
        self.lm, self.tokenizer, self.soft, self.demonstrations = lm, tokenizer, soft, demonstrations
        self.nobody = Users()
        self.about = dict(about or {})

    @property
    def backbone(self) -> nn.Module:
        return self.lm.get_decoder()

    @property
    def users(self) -> Users:
        return self.nobody if self.soft is None else self.soft.users

    @property
    def known_users(self) -> Mapping:
        return self.users.ids if self.demonstrations is None else self.demonstrations.of_user

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def prompt_ids(self, prompt, user: str, max_tokens: int | None = None) -> list[int]:
        """Ids of a prompt for a user: demonstrations and template included, the soft prompt not.

        max_tokens: of the prompt alone; demonstrations are added to it.
        """
        if self.demonstrations is None:
            return encode_prompt(self.tokenizer, prompt, max_tokens)
        return self.demonstrations.prompt_ids(self.tokenizer, prompt, user, max_tokens)

    def encode(self, rows, *, stop: bool = True):
        """A dataset's pairs as token ids (`scoring.encode_pairs`). stop: with end tokens, for training."""
        length = self.about.get("max_length")
        render = None if self.demonstrations is None else self.prompt_ids
        return encode_pairs(self.tokenizer, rows, length, stop=stop, render=render)

    def embed(self, packed: Packed, user: Tensor) -> tuple[Packed, Tensor]:
        """Room for the soft prompt before each row of `packed`, and the embeddings [R, T + L, d]; user int64 [R]."""
        soft = self.soft(user)
        n, dtype = soft.shape[1], next(self.backbone.parameters()).dtype
        rows, length = packed.input_ids.shape
        embeds = torch.cat([soft.to(dtype), self.lm.get_input_embeddings()(packed.input_ids)], dim=1)
        mask = packed.attention_mask
        if mask is not None:
            mask = mask.new_ones(rows, 1, n + length, n + length).tril()
            mask[..., n:, n:] = packed.attention_mask
        first = torch.arange(n, device=soft.device).expand(rows, n)
        return Packed(
            torch.cat([packed.input_ids.new_zeros(rows, n), packed.input_ids], dim=1),
            torch.cat([first, packed.position_ids + n], dim=1),
            mask,
            packed.row,
            packed.prompt_end + n,
            packed.start + n,
            packed.end + n,
        ), embeds

    def logprobs(self, packed: Packed, user: Tensor) -> tuple[Tensor, Tensor]:
        """log pi_u(y_t | x, y_<t) of packed responses [S, T] and their mask; user int64 [S], one per response."""
        if self.soft is None:
            return token_logprobs(self.lm, packed)
        row_user = torch.full((len(packed.input_ids),), GENERIC, device=user.device)
        row_user[packed.row] = user  # all responses of a row are for one user
        return token_logprobs(self.lm, *self.embed(packed, row_user))

    def forward(
        self, chosen: Tensor, rejected: Tensor, user: Tensor, pair: Tensor | None = None, **packed: Tensor
    ) -> LogProbs:
        """Log-probs of pairs for their users and for the generic one; the fields of a Packed with the pairs side by side."""
        inputs, response = Packed(**packed), torch.stack([chosen, rejected], dim=1)
        each = user.new_empty(len(inputs.row))
        each[response] = user.unsqueeze(1)
        own = self.logprobs(inputs, each)[0].sum(1)[response]
        generic = self.logprobs(inputs, torch.full_like(each, GENERIC))[0].sum(1)[response]
        return LogProbs(own, generic, user, pair)

    def untrained(self, rows, *, stop: bool = True) -> Tensor:
        """Log-probs float32 [N, 2] of a dataset's pairs under the model without LoRA and soft prompt: DPO's reference."""
        with lora.disabled(self.backbone):
            return pair_logprobs(self.lm, *self.encode(rows, stop=stop))[0].float()

    def packed_pairs(self, encoded, pairs, size: int = 16) -> Iterator[tuple[Tensor, Packed]]:
        """The pairs of `encode` in small batches: their numbers, and a Packed with chosen and rejected of each in one row."""
        share = can_share(self.backbone)
        for take in torch.arange(len(pairs), device="cpu").split(size):
            some = [pairs[i] for i in take.tolist()]
            responses = [[encoded[g][1][i] for i in two] for g, *two in some]
            yield take, pack([encoded[g][0] for g, *_ in some], responses, share=share).to(self.device)

    @torch.no_grad()
    def pair_logprobs(self, rows) -> tuple[Tensor, Tensor]:
        """Log-probs of a dataset's pairs for their users, float64 [N, 2], and lengths int64 [N, 2]; no end tokens."""
        encoded, pairs = self.encode(rows, stop=False)
        if self.soft is None:
            return pair_logprobs(self.lm, encoded, pairs)
        users = self.users.rows(rows["user_id"]).to(self.device)
        total, length = torch.empty(len(pairs), 2, dtype=torch.float64), torch.empty(len(pairs), 2, dtype=torch.long)
        for take, packed in self.packed_pairs(encoded, pairs):
            values, mask = self.logprobs(packed, users[take].repeat_interleave(2))
            total[take], length[take] = values.double().sum(1).view(-1, 2).cpu(), mask.sum(1).view(-1, 2).cpu()
        same = torch.tensor([chosen == rejected for _, chosen, rejected in pairs], device="cpu")
        total[same, 1] = total[same, 0]  # one response twice is a tie, whatever its two places in a pass round to
        return total, length

    def merge(self) -> UserPolicy:
        """Adds LoRA to the weights for decoding (`lora.merge`); returns self."""
        lora.merge(self.backbone)
        return self

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder (`models/folder.py`); demonstrations.json holds users' texts where there are demonstrations."""
        shared = {} if self.soft is None else dict(self.soft.named_parameters(recurse=False))
        shared = {name: value.detach().contiguous() for name, value in shared.items()}
        shown = None if self.demonstrations is None else self.demonstrations.config()
        extra = {"demonstrations.json": self.demonstrations.of_user} if shown else {}
        folders.save(
            folder,
            "user_policy",
            self,
            shared,
            self.users,
            extra=extra,
            soft=self.soft is not None,
            generic="generic" in shared,
            demonstrations=shown,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        users: str | Path | None = None,
        lm: nn.Module | None = None,
        tokenizer=None,
        backbone: str | Path | None = None,
        dtype=None,
        device=None,
    ) -> UserPolicy:
        """Loads what `save_pretrained` wrote. lm, tokenizer: a model in memory already, to save loading it twice.

        users: the folder or hub name of its users, where they were pushed apart. backbone: the place that it was moved to;
        dtype: what it is cast to after its weights were checked.
        """
        folder = folders.locate(folder)
        config = folders.read_config(folder, "user_policy")
        lm, _, tokenizer = folders.load_backbone(
            folder, config, lm=lm, tokenizer=tokenizer, backbone=backbone, dtype=dtype, device=device
        )
        soft = _load_soft(folder, config, lm, users) if config["soft"] else None
        shown = config["demonstrations"]
        if shown is not None:
            shown = Demonstrations.load(shown, folders.users_folder(folder, config, users))
        about = folders.about(config, "soft", "generic", "demonstrations")
        model = cls(lm, tokenizer, soft=soft, demonstrations=shown, about=about)
        return model.to(folders.device_or_default(device)).eval()


def _load_soft(folder: Path, config: dict, lm: nn.Module, users: str | Path | None) -> SoftPrompt:
    file, shared = folder / "shared.safetensors", read_tensors(folder / "shared.safetensors")
    width = lm.get_input_embeddings().weight.shape[1]
    names = ["centres", *(["generic"] if config.get("generic", False) else [])]
    if set(shared) != set(names) or shared["centres"].ndim != 3 or shared["centres"].shape[-1] != width:
        found = {name: list(value.shape) for name, value in shared.items()}
        raise PyargsError(f"{file} does not fit: missing or unexpected {found}, not {names}, centres [C, tokens, {width}]")
    with described(f"{folder}: the soft prompts' parts do not fit each other"):
        soft = SoftPrompt(users=folders.load_users(folder, config, users), **shared)
        soft(torch.tensor([GENERIC, *range(len(soft.users))][:2]))
    return soft


def random_embeddings(lm: nn.Module, *shape: int) -> Tensor:
    """Embeddings [*shape, d] of random tokens, drawn with repetition, float32: where P-DPO's soft prompts begin."""
    table = lm.get_input_embeddings().weight.detach()
    count = torch.Size(shape).numel()
    if count < 1:
        raise PyargsError("a soft prompt needs at least one token")
    return table[torch.randint(len(table), (count,), device=table.device)].float().view(*shape, -1).clone()
