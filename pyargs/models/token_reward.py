"""TokenReward: a language model whose log-probs are the rewards, for every token of the vocabulary in one pass (GenARM)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyargs.lm import lora
from pyargs.lm.forward import token_logprobs
from pyargs.lm.tokenize import Packed
from pyargs.models import folder as folders
from pyargs.scoring import encode_pairs, pair_logprobs, response_logprobs
from pyargs.types import LogProbs, Users


class TokenReward(nn.Module):
    """r(v | x, y_<t) = log pi_r(v | x, y_<t), the same for all users; a response's reward is the sum over its tokens.

    lm: a causal language model of transformers, with LoRA after training. It learns to stop, so its training counts the
    end token; rewards that are compared or reported do not.
    """

    step_reward = "token"

    def __init__(self, lm: nn.Module, tokenizer, *, about: dict | None = None):
        super().__init__()
        self.lm, self.tokenizer = lm, tokenizer
        self.users = Users()
        self.about = dict(about or {})

    @property
    def backbone(self) -> nn.Module:
        return self.lm.get_decoder()

    @property
    def known_users(self) -> Mapping:
        return {}

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def encode(self, rows):
        """A dataset's pairs as token ids (`scoring.encode_pairs`), end tokens included."""
        return encode_pairs(self.tokenizer, rows, self.about.get("max_length"), stop=True)

    def forward(
        self, chosen: Tensor, rejected: Tensor, user: Tensor, pair: Tensor | None = None, **packed: Tensor
    ) -> LogProbs:
        """Log-probs of pairs: `packed` are the fields of a Packed, chosen and rejected int64 [N] number its responses."""
        values, _ = token_logprobs(self.lm, Packed(**packed))
        return LogProbs(values.sum(1)[torch.stack([chosen, rejected], dim=1)], None, user, pair)

    def pair_scores(self, rows) -> tuple[Tensor, Tensor]:
        """Sums of what a decoder would add at each token, float64 [N, 2], and sequence rewards [N, 2]: the same here."""
        total, _ = pair_logprobs(self.lm, *encode_pairs(self.tokenizer, rows, self.about.get("max_length")))
        return total, total.float()

    def score(self, groups, users) -> list[Tensor]:
        """Rewards of responses given as ids: groups [(prompt ids, [response ids])] -> [responses] for each. No user counts."""
        return [torch.stack([one.sum() for one in several]) for several in response_logprobs(self.lm, groups)]

    def step_sums(self, groups, users) -> list[Tensor]:
        """Sums of what a decoder would add at each token of responses, float64, for groups and users as of `score`."""
        return [torch.stack([one.double().sum() for one in several]) for several in response_logprobs(self.lm, groups)]

    def merge(self) -> TokenReward:
        """Adds LoRA to the weights for decoding (`lora.merge`); returns self."""
        lora.merge(self.backbone)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder (`models/folder.py`) with the adapter; the backbone's name and the hash of its weights are noted."""
        folders.save(folder, "token_reward", self, {}, self.users)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, backbone: str | Path | None = None, dtype=None, device=None
    ) -> TokenReward:
        """Loads what `save_pretrained` wrote, from a local folder or the hub.

        backbone: the place that it was moved to; dtype: what it is cast to after its weights were checked.
        """
        folder = folders.locate(folder)
        config = folders.read_config(folder, "token_reward")
        lm, _, tokenizer = folders.load_backbone(folder, config, backbone=backbone, dtype=dtype, device=device)
        folders.load_shared(folder, {})
        return cls(lm, tokenizer, about=folders.about(config)).to(folders.device_or_default(device)).eval()
