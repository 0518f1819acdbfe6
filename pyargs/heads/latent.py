"""Latent user: reward = decoder([W_s h; z_u]), z_u inferred by an encoder from the user's pairs (VPL; decodes as F3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyargs.heads import Folded, Linear, mlp, product
from pyargs.types import Users


class Encoder(nn.Module):
    """Pairs of one user -> mean and log-variance of the latent, both [..., Z] in [-1, 1].

    forward(pairs [N, m, 2, D] (chosen, rejected), mask [N, m]): each pair is encoded by 2D -> Z -> Z -> Z with leaky relu, the
    codes attend to each other (one head), are averaged, and go through two linear layers. The order within a pair is the
    label. A user without pairs has the code 0. attention_bias: whether query, key and value have biases.
    """

    def __init__(self, dim: int, latent: int, *, attention_bias: bool = True):
        super().__init__()
        leaky = lambda: nn.LeakyReLU(0.2)  # noqa: E731
        self.pair = nn.Sequential(Linear(2 * dim, latent), leaky(), Linear(latent, latent), leaky(), Linear(latent, latent))
        self.query, self.key, self.value = (Linear(latent, latent, bias=attention_bias) for _ in range(3))
        self.mean, self.logvar = Linear(latent, latent), Linear(latent, latent)

    def forward(self, pairs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.pair(pairs.flatten(-2).float())
        score = self.query(codes) @ self.key(codes).transpose(1, 2) / math.sqrt(codes.shape[-1])
        score = score.masked_fill(~mask.unsqueeze(1), torch.finfo(score.dtype).min)
        seen = (score.softmax(-1) @ self.value(codes)).masked_fill(~mask.unsqueeze(-1), 0.0)
        code = seen.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.mean(code).clamp(-1, 1), self.logvar(code).clamp(-1, 1)


class Head(nn.Module):
    """`forward(hidden [..., D], user [...]) -> reward [...]` in float32; users' vector "latent" [U, Z] is the encoder's mean.

    decode(hidden, z [..., Z]) is the same for any z. With normalized=True a user's z is the mean scaled to length sqrt(Z),
    which all z of the training have; without it the mean itself, as in VPL's code. attention_bias: of the encoder, as in
    VPL's code. No output bias, as in `mlp`.
    """

    OLDER = {"attention_bias": False}  # fields that older folders lack

    def __init__(self, dim: int, latent: int, users: Users, *, normalized: bool = True, attention_bias: bool = True):
        super().__init__()
        self.encoder = Encoder(dim, latent, attention_bias=attention_bias)
        self.score = Linear(dim, dim, bias=False)
        self.score.weight.data *= 0.01
        self.first, self.second = Linear(dim + latent, latent), Linear(latent, latent)
        self.last = Linear(latent, 1, bias=False)
        self.users, self.normalized = users, normalized

    def config(self) -> dict:
        return {
            "dim": self.score.in_features,
            "latent": self.second.in_features,
            "normalized": self.normalized,
            "attention_bias": self.encoder.query.bias is not None,
        }

    def decode(self, hidden: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([self.score(hidden.float()), z], dim=-1)
        x = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)
        return self.last(x).squeeze(-1)

    def user_latents(self, user: Tensor) -> Tensor:
        """z [..., Z] of user rows [...]."""
        mean = self.users.vectors["latent"][user]
        return unit(mean) if self.normalized else mean

    def forward(self, hidden: Tensor, user: Tensor) -> Tensor:
        return self.decode(hidden, self.user_latents(user))

    @torch.no_grad()
    def fold(self, user: Tensor) -> Folded:
        """W_s goes into the first layer, and the latent into a bias [B, Z] of each row."""
        dim = self.score.in_features
        ours, latents = self.first.weight[:, :dim], self.first.weight[:, dim:]
        own = product(self.user_latents(user).unsqueeze(1), latents).squeeze(1) + self.first.bias
        return mlp.fold(ours @ self.score.weight, own, None, self.second, self.last.weight, "leaky_relu")


def unit(z: Tensor) -> Tensor:
    """z scaled to length sqrt(Z)."""
    return math.sqrt(z.shape[-1]) * F.normalize(z, dim=-1)
