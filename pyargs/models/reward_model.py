"""RewardModel: a backbone (with LoRA), a head and its users; what LoRE, PReF, PAL, VPL, MPU and Global RM train."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError, described
from pyargs.files import read_tensors
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.called import Called
from pyargs.lm.forward import packed_states, spans
from pyargs.lm.tokenize import Packed, closing
from pyargs.models import folder as folders
from pyargs.scoring import before_pad, encode_pairs, features, response_states
from pyargs.types import Batch, Features, Users

SAVED = {
    "pool": "pool", "step_reward": "step_reward", "whole": "needs_all_tokens", "apart": "separate_prompt", "closed": "closed",
}  # fmt: skip
"""Names in config.json, and the fields that they are."""


class RewardModel(nn.Module):
    """The reward r_u(x, y) of response y to prompt x for user u.

    backbone: a decoder without output layer, of any dtype; its hidden states go to the head in float32.
    pool: the reward of a response is that of its last content token ("last"), the mean over its tokens ("mean", Global v2), or
    the reward of its tokens' mean state ("hidden").
    step_reward: what a decoder adds for a candidate, "token" (the candidate's own reward) or, with pool="mean",
    "prefix_mean" (the mean over the response so far).
    needs_all_tokens: training reads the states of all tokens even though the reward is the last one's (PAL).
    separate_prompt: the prompt and each response are read alone, and the head is given the prompt's last state (PAL-B).
    closed: sequence rewards are read off the whole conversation, which the chat template closes behind the response, at its
    last token that is no padding, as transformers' sequence classifiers do. A decoder reads candidates behind the generation
    prompt.
    about: JSON of how it was made (method, its fields, max_length, reward_std ...); saved with the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        head: nn.Module,
        *,
        pool: str = "last",
        step_reward: str = "token",
        needs_all_tokens: bool = False,
        separate_prompt: bool = False,
        closed: bool = False,
        about: dict | None = None,
    ):
        super().__init__()
        if pool not in ("last", "mean", "hidden"):
            raise PyargsError(f"pool is 'last', 'mean' or 'hidden', not '{pool}'")
        if step_reward not in ("token", "prefix_mean") or (step_reward == "prefix_mean" and pool != "mean"):
            raise PyargsError(f"step_reward='{step_reward}' with pool='{pool}': only 'mean' knows 'prefix_mean'")
        if closed and (pool != "last" or separate_prompt):
            raise PyargsError("a closed conversation has one reward, its last token's: closed goes with pool='last' alone")
        self.backbone, self.tokenizer, self.head = backbone, tokenizer, head
        self.pool, self.step_reward, self.separate_prompt, self.closed = pool, step_reward, separate_prompt, closed
        self.needs_all_tokens = needs_all_tokens or pool != "last"
        self.about = dict(about or {})

    @property
    def users(self) -> Users:
        return self.head.users

    @property
    def known_users(self) -> Mapping:
        """The ids of all users; none where the model is the same for everyone."""
        return self.users.ids

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    def read(self, rows) -> Features:
        """Hidden states of a dataset's pairs under the backbone as it is now."""
        form = dict(last=not self.needs_all_tokens, **self._form(self.closed))
        return features(self.backbone, self.tokenizer, rows, max_length=self.about.get("max_length"), **form)

    def encode(self, rows):
        """A dataset's pairs as token ids: `scoring.encode_pairs` in the form that this model reads."""
        return encode_pairs(self.tokenizer, rows, self.about.get("max_length"), **self._form(self.closed))

    def _form(self, closed: bool) -> dict:
        return dict(closed=True, pad=self._pad) if closed else dict(separate_prompt=self.separate_prompt)

    @property
    def _pad(self) -> int | None:
        """What transformers' classifiers leave out behind a conversation."""
        return self.backbone.config.get_text_config(decoder=True).pad_token_id

    def forward(self, chosen: Tensor, rejected: Tensor, user: Tensor, pair: Tensor | None = None, **packed) -> Batch:
        """Hidden states of pairs: `packed` are the fields of a Packed, chosen and rejected int64 [N] number its responses."""
        inputs = Packed(**packed)
        states, mask = spans(packed_states(self.backbone, inputs), inputs)
        length = mask.sum(1, keepdim=True)
        last = states.gather(1, (length - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        if not self.needs_all_tokens:
            states, mask = last, mask[:, :1]
        response = torch.stack([chosen, rejected], dim=1)
        prompt = last[chosen - 1, 0].float() if self.separate_prompt else None  # the prompt stands before its pair
        return Batch(states[response].float() * mask[response].unsqueeze(-1), mask[response], user, pair, prompt)

    def token_rewards(self, batch: Batch) -> Tensor:
        """Reward of the prefix that ends in each token, [N, 2, T]; 0 outside the mask."""
        mask = batch.mask
        if batch.prompt is not None:  # one serves all tokens of its pair
            return self.head(batch.hidden, batch.user[:, None, None].expand(mask.shape), batch.prompt[:, None, None]) * mask
        pair, side, place = mask.nonzero(as_tuple=True)  # padding can be most of a batch
        rewards = self.head(batch.hidden[pair, side, place], batch.user[pair])
        return rewards.new_zeros(mask.shape).index_put((pair, side, place), rewards)

    def step_rewards(self, batch: Batch) -> Tensor:
        """What a decoder adds at each token, [N, 2, T]: `token_rewards`, or their running mean (step_reward="prefix_mean")."""
        rewards = self.token_rewards(batch)
        if self.step_reward == "token":
            return rewards
        count = torch.arange(1, rewards.shape[-1] + 1, device=rewards.device)
        return rewards.cumsum(-1) / count * batch.mask

    def rewards(self, batch: Batch) -> Tensor:
        """Sequence rewards [N, 2] of the chosen and the rejected responses."""
        length = batch.mask.sum(-1, keepdim=True)
        if (length == 0).any():
            raise PyargsError("a response without a token has no reward")
        if self.pool == "mean":
            return self.token_rewards(batch).sum(-1) / length.squeeze(-1)
        if self.pool == "hidden":
            hidden = (batch.hidden * batch.mask.unsqueeze(-1)).sum(2, keepdim=True) / length.unsqueeze(-1)
        else:  # states past the last token may be anything, so that one alone goes through the head
            hidden = batch.hidden.gather(2, (length - 1).unsqueeze(-1).expand(-1, -1, -1, batch.hidden.shape[-1]))
        return self.token_rewards(replace(batch, hidden=hidden, mask=batch.mask[:, :, :1])).squeeze(-1)

    @torch.no_grad()
    def pair_scores(self, rows) -> tuple[Tensor, Tensor]:
        """For each pair: sums of what a decoder would add at each token, float64 [N, 2], and sequence rewards [N, 2]."""
        steps, rewards = self._scored(rows, closed=False)
        return steps, self._scored(rows, closed=True)[1] if self.closed else rewards

    def _scored(self, rows, closed: bool) -> tuple[Tensor, Tensor]:
        form = dict(last=closed, **self._form(closed))
        states = features(self.backbone, self.tokenizer, rows, max_length=self.about.get("max_length"), **form)
        user = self.users.rows(states.users)
        reward, steps = [], []
        for part in torch.arange(len(states), device="cpu").split(256):
            batch = states.batch(user, part, last=False).to(self.device)
            reward.append(self.rewards(batch).cpu())
            steps.append(self.step_rewards(batch).double().sum(-1).cpu())
        return torch.cat(steps), torch.cat(reward)

    @torch.no_grad()
    def score(self, groups, users) -> list[Tensor]:
        """Rewards of responses given as ids: groups [(prompt ids, [response ids])], one user each -> [responses] for each."""
        if self.closed:
            end = closing(self.tokenizer)
            groups = [(prompt, [before_pad([*one, *end], self._pad) for one in several]) for prompt, several in groups]
        return [torch.stack([self.rewards(one)[0, 0].cpu() for one in several]) for several in self._responses(groups, users)]

    @torch.no_grad()
    def step_sums(self, groups, users) -> list[Tensor]:
        """Sums of what a decoder would add at each token of responses, float64, for groups and users as of `score`."""
        sums = lambda batch: self.step_rewards(batch)[0, 0].double().sum().cpu()  # noqa: E731
        return [torch.stack([sums(one) for one in several]) for several in self._responses(groups, users)]

    def _responses(self, groups, users) -> Iterator[list[Batch]]:
        """Each response of each group as a pair of one response."""
        if self.separate_prompt:
            groups = [([], [prompt, *several]) for prompt, several in groups]
        for row, states in zip(self.users.rows(users).tolist(), response_states(self.backbone, groups), strict=True):
            prompt = states.pop(0)[-1:].to(self.device) if self.separate_prompt else None
            user, batches = torch.tensor([row], device=self.device), []
            for state in states:
                hidden = state.to(self.device)[None, None]
                mask = torch.ones(hidden.shape[:3], dtype=torch.bool, device=self.device)
                batches.append(Batch(hidden, mask, user, prompt=prompt))
            yield batches

    def merge(self) -> RewardModel:
        """Adds LoRA to the weights for decoding (`lora.merge`); returns self."""
        lora.merge(self.backbone)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder (`models/folder.py`); the backbone is not copied, its name and the hash of its weights are."""
        if isinstance(self.backbone, Called):
            raise PyargsError(f"the reward is your function {self.backbone.name_or_path}: there is nothing to save")
        kind = type(self.head).__module__.rpartition(".")[2]
        folders.save(
            folder,
            "reward_model",
            self,
            {name: value.contiguous() for name, value in self._shared().items()},
            self.users,
            **{name: getattr(self, field) for name, field in SAVED.items()},
            head={"kind": kind, **self.head.config()},
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        users: str | Path | None = None,
        backbone: nn.Module | str | Path | None = None,
        tokenizer=None,
        dtype=None,
        device=None,
    ):
        """Loads what `save_pretrained` wrote, from a local folder or the hub.

        users: the folder or hub name of its users, where they were pushed apart.
        backbone, tokenizer: a decoder in memory, such as `policy.get_decoder()` of the same base model; it is not changed.
        Policy and reward model then share weights, and decoding needs one pass for both. backbone may also be the place that
        it was moved to. dtype: what the backbone is cast to after its weights were checked.
        Raises PyargsError on a missing or unexpected key, and when the backbone's weights are not the ones of the training.
        """
        folder = folders.locate(folder)
        config = folders.read_config(folder, "reward_model")
        _, backbone, tokenizer = folders.load_backbone(
            folder, config, backbone=backbone, tokenizer=tokenizer, dtype=dtype, device=device
        )
        head = _load_head(folder, config, users)
        fields = {field: config.get(name, False) for name, field in SAVED.items()}  # older folders do not have all
        model = cls(backbone, tokenizer, head, **fields, about=folders.about(config, "head", *SAVED))
        shared = folders.load_shared(folder, model._shared())
        head.load_state_dict({name: value.float() for name, value in shared.items()}, strict=False, assign=True)
        model.to(folders.device_or_default(device)).eval()
        with described(f"{folder}: head, users and backbone do not fit each other"):
            model._try()
        return model

    @classmethod
    def from_sequence_classifier(
        cls,
        name_or_model: str | Path | nn.Module,
        tokenizer=None,
        *,
        users: Mapping[str, Mapping[str, float]] | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ):
        """A reward model that exists: an `AutoModelForSequenceClassification` of a decoder family, with its own score layer.

        name_or_model: a local folder, a hub name (safetensors alone, no code of theirs), or the classifier itself, which then
        needs its tokenizer and keeps its dtype and device. With one label it is a reward for everyone.
        users: by user id the weights of the labels by their names, 0 for those that are left out, negative for those that the
        user dislikes; by default each of several labels is a user of its own name. More users may come later, with
        `model.users.append(ids, mixture=[[a weight for each of model.about["labels"]]])`.
        Sequence rewards, as for RM accuracy, are the classifier's own outputs for whole conversations in its chat template.
        Raises PyargsError for encoders, score layers that are more than one matrix, labels that are not there, and labels that
        mean something only beside each other (single_label_classification) where a user's weights do not sum to 0.
        """
        from pyargs.models import sequence_classifier

        parts = sequence_classifier.parts(name_or_model, tokenizer, users, dtype=dtype, device=device)
        return cls(*parts[:3], closed=True, about=parts[3]).eval()

    @classmethod
    def from_function(
        cls, function: Callable[[Tensor, Tensor], Tensor], tokenizer, *, device: str | torch.device | None = None
    ):
        """Any function of whole texts as a reward for everyone: function(ids int64 [B, T], mask int64 [B, T]) -> float [B].

        It is called once a step, with all candidates of all rows, each behind its row's whole text: no cache, so this is
        the slow way. Texts are ids of `tokenizer` on this device, with the tokenizer's padding behind them. Rewards of pairs
        and of best-of-N are the function's, too. There is nothing to train or to save. Raises PyargsError with the function's
        name where it returns another shape, or what is not finite.
        """
        pad = getattr(tokenizer, "pad_token_id", None)
        model = cls(Called(function, 0 if pad is None else pad), tokenizer, linear.Head(1, 1, Users()))
        model.head.directions.data.fill_(1.0)
        return model.requires_grad_(False).to(folders.device_or_default(device)).eval()

    @torch.no_grad()
    def _try(self) -> None:
        """Scores a pair of zero states, so that a wrong file is noticed when it is loaded."""
        if self.users.personal and not len(self.users):
            return
        hidden = torch.zeros(
            1, 2, 1, self.backbone.config.get_text_config(decoder=True).hidden_size, dtype=torch.float32, device=self.device
        )
        mask = torch.ones(1, 2, 1, dtype=torch.bool, device=self.device)
        user = torch.zeros(1, dtype=torch.long, device=self.device)
        batch = Batch(hidden, mask, user, prompt=hidden[:, 0, 0] if self.separate_prompt else None)
        if not self.rewards(batch).isfinite().all():
            raise PyargsError("its rewards are no numbers")

    def _shared(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.head.state_dict().items() if not name.startswith("users.")}


def _load_head(folder: Path, config: dict, users: str | Path | None) -> nn.Module:
    """The head that config.json describes, with the folder's users. Its shared tensors are still to be loaded, and take no
    memory: the file may describe any sizes."""
    from pyargs import heads

    file, fields = folder / "config.json", dict(config["head"])
    kind, known = fields.pop("kind", None), [module.name for module in pkgutil.iter_modules(heads.__path__)]
    if kind not in known:
        raise PyargsError(f"{file}: the 'kind' of the head is one of {', '.join(known)}, not {kind!r}")
    users, shared = folders.load_users(folder, config, users), read_tensors(folder / "shared.safetensors")
    tensors = [*shared.values(), *users.vectors.values()]
    largest = max([len(tensors), *(size for value in tensors if value.numel() for size in value.shape)])
    for name, value in fields.items():  # before modules are made
        if isinstance(value, int) and value > largest:
            raise PyargsError(f"{file}: no tensor of the model is as large as the head's '{name}' says")
    made = importlib.import_module(f"pyargs.heads.{kind}").Head
    fields = getattr(made, "OLDER", {}) | fields
    with described(f"{file} describes no {kind} head"), torch.device("meta"):
        head = made(users=users, **fields)
        if head.config() != fields:
            raise PyargsError(f"{file}: the head needs {sorted(head.config())}, not {sorted(fields)}")
    return head
