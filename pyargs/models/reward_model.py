"""RewardModel: a backbone (with LoRA), a head and its users. Every pointwise method of the paper makes one of these."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyargs import __version__
from pyargs.errors import PyargsError
from pyargs.files import read_json, read_tensors, write_json, writing
from pyargs.lm.encode import Packed
from pyargs.lm.hf import default_device, fingerprint, load_lm, packed_states, spans
from pyargs.types import Batch, Users

CARD = """---
library_name: pyargs
base_model: {backbone}
tags: [reward-model, personalization]
---
# Personalized reward model: {method}

{users} users on the backbone `{backbone}`{lora}. Made with pyargs {version}; load it with
`pyargs.RewardModel.from_pretrained(folder)`. The rewards compare responses to one prompt; their scale means nothing else.
"""


class RewardModel(nn.Module):
    """r_u(x, y) for users u.

    backbone: a decoder without output layer; its hidden states go to the head in float32 whatever its own dtype is.
    pool "last": the reward of a response is that of its last content token; "mean": the mean over its tokens (Global v2).
    step_reward: what a decoder adds for a candidate, "token" (the candidate's own reward) or, with pool="mean",
    "prefix_mean" (the mean over the response so far).
    about: free JSON facts about how it was made (method, its fields, max_length, reward_std once tuned ...).
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        head: nn.Module,
        *,
        pool: str = "last",
        step_reward: str = "token",
        about: dict | None = None,
    ):
        super().__init__()
        if pool not in ("last", "mean"):
            raise PyargsError(f"pool is 'last' or 'mean', not '{pool}'")
        if step_reward not in ("token", "prefix_mean") or (step_reward == "prefix_mean" and pool == "last"):
            raise PyargsError(f"step_reward='{step_reward}' with pool='{pool}': only 'mean' knows 'prefix_mean'")
        self.backbone, self.tokenizer, self.head = backbone, tokenizer, head
        self.pool, self.step_reward = pool, step_reward
        self.about = dict(about or {})

    @property
    def users(self) -> Users:
        return self.head.users

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    def forward(self, chosen: Tensor, rejected: Tensor, user: Tensor, **packed: Tensor) -> Batch:
        """Hidden states of pairs: `packed` are the fields of a Packed, chosen and rejected int64 [N] number its responses."""
        inputs = Packed(**packed)
        hidden, mask = spans(packed_states(self.backbone, inputs), inputs)
        if self.pool == "last":
            last = mask.sum(1, keepdim=True) - 1
            hidden = hidden.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            mask = mask[:, :1]
        pair = torch.stack([chosen, rejected], dim=1)
        return Batch(hidden[pair].float(), mask[pair], user)

    def token_rewards(self, batch: Batch) -> Tensor:
        """Reward of the prefix that ends in each token, [N, 2, T]; 0 outside the mask."""
        user = batch.user[:, None, None].expand(batch.mask.shape)
        return self.head(batch.hidden, user) * batch.mask

    def step_rewards(self, batch: Batch) -> Tensor:
        """What a decoder adds at each token, [N, 2, T]: `token_rewards`, or their running mean (step_reward="prefix_mean")."""
        rewards = self.token_rewards(batch)
        if self.step_reward == "token":
            return rewards
        count = torch.arange(1, rewards.shape[-1] + 1, device=rewards.device)
        return rewards.cumsum(-1) / count * batch.mask

    def rewards(self, batch: Batch) -> Tensor:
        """Sequence rewards [N, 2] of the chosen and the rejected responses."""
        rewards = self.token_rewards(batch)
        length = batch.mask.sum(-1)
        if self.pool == "mean":
            return rewards.sum(-1) / length
        return rewards.gather(-1, length.unsqueeze(-1) - 1).squeeze(-1)

    def merge(self) -> RewardModel:
        """Adds LoRA to the float32 backbone's weights, so that a pass costs no more than the backbone alone; returns self.

        For decoding, not for training on. `save_pretrained` still writes the adapter. A bfloat16 backbone is left as it is:
        its weights are too coarse for the small change.
        """
        from peft.tuners.lora import LoraLayer

        for layer in self.backbone.modules():
            if isinstance(layer, LoraLayer) and layer.get_base_layer().weight.dtype == torch.float32:
                layer.merge()
        return self

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, head.safetensors, users.{safetensors,json}, a card and, with LoRA, PEFT's adapter files.

        The backbone itself is not copied: its name and the hash of its weights are.
        """
        with writing(folder, ("adapter_config.json", "adapter_model.safetensors")) as out:
            out.mkdir()
            adapter = self.adapter()
            if adapter:
                self.backbone.peft_config["default"].save_pretrained(out)
                save_file(adapter, out / "adapter_model.safetensors")
            save_file(self._shared(), out / "head.safetensors")
            self.users.save(out)
            kind = type(self.head).__module__.rpartition(".")[2]
            write_json(out / "config.json", {
                "pyargs": __version__, **self.about, "pool": self.pool, "step_reward": self.step_reward,
                "head": {"kind": kind, **self.head.config()}, "lora": bool(adapter), "users": _shapes(self.users),
            })  # fmt: skip
            card = CARD.format(
                backbone=self.about.get("backbone"), method=self.about.get("method"), users=len(self.users) or "all",
                lora=" with a LoRA adapter" if adapter else "", version=__version__,
            )  # fmt: skip
            (out / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backbone: nn.Module | None = None, tokenizer=None, device=None):
        """Loads what `save_pretrained` wrote, from a local folder or the hub.

        backbone, tokenizer: a decoder that is in memory already (say, `policy.get_decoder()` of the same base model), to
        save loading it twice; not with LoRA, which would change the other owner's model. Raises PyargsError on a missing
        or unexpected key and when the backbone's weights are not the ones of the training.
        """
        folder = Path(folder)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(str(folder)))
            except Exception as error:
                raise PyargsError(f"'{folder}' is neither a local folder nor within reach on the hub: {error}") from error
        config = read_json(folder / "config.json")
        if backbone is not None and config["lora"]:
            raise PyargsError("this model has a LoRA adapter, which would change the shared backbone: leave backbone out")
        if backbone is None:
            model, tokenizer = load_lm(config["backbone"], dtype=config["dtype"], device=device)
            backbone = model.get_decoder()
        if "fingerprint" in config and fingerprint(backbone) != config["fingerprint"]:
            raise PyargsError(
                f"the weights of '{config['backbone']}' are not those that this reward model was trained on: "
                "load the backbone of the training (same revision, same dtype)"
            )
        if config["lora"]:
            _load_adapter(backbone, folder)
        head = dict(config.pop("head"))
        kind = head.pop("kind")
        head = importlib.import_module(f"pyargs.heads.{kind}").Head(users=Users.load(folder), **head)
        found, expected = _shapes(head.users), config.pop("users")
        if found != expected:
            raise PyargsError(f"{folder}/users.safetensors does not fit: it holds {found}, the head needs {expected}")
        for known in ("lora", "pyargs"):
            config.pop(known)
        model = cls(backbone, tokenizer, head, pool=config.pop("pool"), step_reward=config.pop("step_reward"), about=config)
        shared = read_tensors(folder / "head.safetensors")
        _same_keys(set(model._shared()), set(shared), folder / "head.safetensors")
        head.load_state_dict({**head.state_dict(), **shared})
        return model.to(device or default_device()).eval()

    def _shared(self) -> dict[str, Tensor]:
        state = self.head.state_dict()
        return {name: value.contiguous() for name, value in state.items() if not name.startswith("users.")}

    def adapter(self) -> dict[str, Tensor]:
        """The LoRA weights under PEFT's names; empty without LoRA."""
        if not hasattr(self.backbone, "peft_config"):
            return {}
        from peft import get_peft_model_state_dict

        return {name: value.detach().contiguous() for name, value in get_peft_model_state_dict(self.backbone).items()}


def add_lora(backbone: nn.Module, *, rank: int, alpha: float, rslora: bool, target_modules, dropout: float = 0.0) -> None:
    """Puts LoRA layers into the backbone, in place; only they stay trainable. float32 weights even beside a bf16 base."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else None,
        base_model_name_or_path=backbone.config.name_or_path or None,
    )  # fmt: skip
    inject_adapter_in_model(config, backbone)
    backbone.peft_config = {"default": config}
    _lora_in_float32(backbone)


def _lora_in_float32(backbone: nn.Module) -> None:
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _load_adapter(backbone: nn.Module, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(folder)
    inject_adapter_in_model(config, backbone)
    backbone.peft_config = {"default": config}
    _lora_in_float32(backbone)
    saved = read_tensors(folder / "adapter_model.safetensors")
    _same_keys(set(get_peft_model_state_dict(backbone)), set(saved), folder / "adapter_model.safetensors")
    set_peft_model_state_dict(backbone, saved)


def _shapes(users: Users) -> dict[str, list[int]]:
    return {name: list(value.shape[1:]) for name, value in users.vectors.items()}


def _same_keys(expected: set[str], found: set[str], file: Path) -> None:
    if expected != found:
        raise PyargsError(
            f"{file} does not fit: missing {sorted(expected - found)[:5]}, unexpected {sorted(found - expected)[:5]}"
        )
