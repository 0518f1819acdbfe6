"""Training and adaptation, the same for all methods: full (LoRA and head together) or on features of a frozen backbone."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pkgutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from pyargs.config import option
from pyargs.data import of_split
from pyargs.errors import PyargsError, did_you_mean
from pyargs.features import features, groups
from pyargs.lm.cache import can_branch
from pyargs.lm.encode import pack
from pyargs.lm.hf import fingerprint, load_lm
from pyargs.models.reward_model import RewardModel, add_lora
from pyargs.types import Batch, Features, Users


@dataclass
class FitConfig:
    """What every method shares. A method's own Config adds its fields and may change a default."""

    backbone: str = option("smollm2-135m", "model under the head: embedded name, local folder or hub name")
    dtype: str = option(
        "float32", "of the backbone; heads and losses are float32 always: bf16 ties would count as errors",
        choices=["float32", "bfloat16"],
    )  # fmt: skip
    freeze_backbone: bool = option(False, "train the head alone on features that are computed once and cached")
    lora_rank: int = option(8, "LoRA rank (paper)")
    lora_alpha: float = option(16.0, "LoRA alpha (paper)")
    rslora: bool = option(True, "scale LoRA by alpha / sqrt(rank) (paper)")
    lora_lr: float = option(5e-5, "learning rate of LoRA (paper)")
    target_modules: list[str] | None = option(
        None, "layers with LoRA (default: PEFT's choice, q_proj and v_proj; paper silent)"
    )
    epochs: float | None = option(
        None, "passes over the train pairs (default: 2 in full as for PRISM and Pref-LaMP, 20 with a frozen backbone, where "
        "a pass takes a second and only the head must move; paper silent)"
    )  # fmt: skip
    batch_size: int = option(32, "pairs per step (most of the methods' own codes; paper silent)")
    accumulation: int = option(1, "steps whose gradients are added up: batch_size is divided by it, memory falls with it")
    max_length: int = option(512, "tokens of prompt + response; the prompt's content is cut, never template or response")
    warmup: float = option(0.03, "share of the steps with rising learning rate, then cosine (VPL, P-DPO; paper silent)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "of initialisation and order; the paper has 3 seeds")
    adapt_steps: int = option(500, "full-batch Adam steps for new users (LoRE's code; paper silent)")


def epochs(config: FitConfig) -> float:
    """Passes over the train pairs; the default depends on whether the backbone is frozen."""
    if config.epochs is None:
        return 20.0 if config.freeze_backbone else 2.0
    if config.epochs <= 0:
        raise PyargsError(f"epochs must be > 0, got {config.epochs}")
    return config.epochs


def method(name: str):
    """The module pyargs/methods/<name>.py, or the file itself where `name` is a path to a .py file."""
    from pyargs import methods

    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PyargsError(f"no method file {name}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = sys.modules[Path(name).stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    known = [m.name for m in pkgutil.iter_modules(methods.__path__)]
    if name not in known:
        raise PyargsError(f"unknown method '{name}'.{did_you_mean(name, known)}")
    return importlib.import_module(f"pyargs.methods.{name}")


# -- training ----------------------------------------------------------------------------------------------------------


def bradley_terry(model: RewardModel, batch: Batch) -> Tensor:
    """-log sigma(R_u(x, y_w) - R_u(x, y_l)), mean over the pairs."""
    chosen, rejected = model.rewards(batch).unbind(1)
    return -F.logsigmoid(chosen - rejected).mean()


def train(name: str, dataset, config=None) -> RewardModel:
    """Trains method `name` on the rows of `dataset` with split "train"; returns the model in eval mode.

    dataset: columns user_id, prompt, chosen, rejected, split. config: the method's Config (its defaults without).
    Raises PyargsError on an unknown method, without train rows, and on a loss that is not finite.
    """
    from transformers import set_seed

    recipe = method(name)
    config = config or recipe.Config()
    rows = of_split(dataset, "train") if "split" in dataset.column_names else dataset
    if not len(rows):
        raise PyargsError("no rows with split 'train': there is nothing to train on")
    if config.batch_size < 1 or config.accumulation < 1:
        raise PyargsError("batch_size and accumulation must be at least 1")
    set_seed(config.seed)
    lm, tokenizer = load_lm(config.backbone, dtype=config.dtype)
    decoder = lm.get_decoder()
    about = {
        "method": name, "fields": asdict(config), "backbone": config.backbone, "dtype": config.dtype,
        "fingerprint": fingerprint(decoder), "max_length": config.max_length,
    }  # fmt: skip
    users = list(dict.fromkeys(rows["user_id"]))
    model = recipe.build(decoder, tokenizer, users, config)
    model.about = about
    model.to(lm.device)
    decoder.requires_grad_(False)
    if config.freeze_backbone:
        train_head(
            recipe,
            model,
            features(decoder, tokenizer, rows, max_length=config.max_length, last=model.pool == "last"),
            config,
        )
    else:
        add_lora(
            decoder,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            rslora=config.rslora,
            target_modules=config.target_modules,
        )
        _train_all(recipe, model, rows, config)
    return model.eval()


def _optimizer(recipe, model: RewardModel, config) -> torch.optim.Optimizer:
    """AdamW over the recipe's `groups`, or over head and users at head_lr and LoRA at lora_lr, without weight decay."""
    if hasattr(recipe, "groups"):
        groups = recipe.groups(model, config)
    else:
        parts = ((model.head, config.head_lr), (model.backbone, config.lora_lr))
        groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for part, lr in parts]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.999), weight_decay=0.0)


def _turns(recipe, model: RewardModel, config) -> list[set]:
    """The parameter sets that a minibatch updates in turn, each after a forward pass of its own; one set for most methods."""
    everything = {p for p in model.parameters() if p.requires_grad}
    return recipe.turns(model, config) if hasattr(recipe, "turns") else [everything]


def train_head(recipe, model: RewardModel, data: Features, config) -> None:
    """Trains head and users on features of a frozen backbone: AdamW on the recipe's loss, warm-up and cosine."""
    from transformers import get_cosine_schedule_with_warmup

    rows = model.users.rows(data.users)
    optimizer = _optimizer(recipe, model, config)
    per_epoch = -(-len(data) // config.batch_size)
    steps = round(epochs(config) * per_epoch)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    order = torch.Generator().manual_seed(config.seed)
    turns = _turns(recipe, model, config)
    model.head.train()
    with trange(steps, desc="train", unit="step") as bar:
        for step in bar:
            if step % per_epoch == 0:
                shuffled = torch.randperm(len(data), generator=order).split(config.batch_size)
            batch = data.batch(rows, shuffled[step % per_epoch], last=model.pool == "last").to(model.device)
            for active in turns:
                optimizer.zero_grad()
                loss = recipe.loss(model, batch, config)
                _check_finite(loss, step)
                loss.backward()
                _drop_others(model, active)
                optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")


def _train_all(recipe, model: RewardModel, rows, config) -> None:
    """LoRA and head together through transformers.Trainer, so that accelerate, several devices and mixed precision work."""
    from transformers import Trainer, TrainingArguments

    encoded, pairs = groups(model.tokenizer, rows, config.max_length)
    user = model.users.rows(rows["user_id"]).tolist()
    examples = [
        {"prompt": encoded[g][0], "pair": (encoded[g][1][c], encoded[g][1][r]), "user": u}
        for (g, c, r), u in zip(pairs, user, strict=True)
    ]
    share = can_branch(model.backbone)

    def collate(batch: list[dict]) -> dict[str, Tensor]:
        packed = pack([e["prompt"] for e in batch], [e["pair"] for e in batch], share=share)
        chosen = torch.arange(0, 2 * len(batch), 2)
        return {
            **vars(packed),
            "chosen": chosen,
            "rejected": chosen + 1,
            "user": torch.tensor([e["user"] for e in batch]),
        }

    class PairTrainer(Trainer):
        def compute_loss(self, wrapped, inputs, return_outputs=False, **_):
            batch = wrapped(**inputs)
            loss = recipe.loss(self.accelerator.unwrap_model(wrapped), batch, config)
            _check_finite(loss, self.state.global_step)
            return (loss, batch) if return_outputs else loss

        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = _optimizer(recipe, model, config)
            return self.optimizer

        def training_step(self, wrapped, inputs, num_items_in_batch=None):
            *first, last = _turns(recipe, model, config)
            for active in first:  # whole steps of their own; the trainer makes the last one
                super().training_step(wrapped, inputs, num_items_in_batch)
                _drop_others(model, active)
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss = super().training_step(wrapped, inputs, num_items_in_batch)
            _drop_others(model, last)
            return loss

    if config.accumulation > config.batch_size:
        raise PyargsError(f"accumulation={config.accumulation} splits a batch of {config.batch_size}: it can be at most that")
    if config.accumulation > 1 and len(_turns(recipe, model, config)) > 1:
        raise PyargsError("alternating updates need whole minibatches: use accumulation=1")
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.backbone.enable_input_require_grads()
    steps_per_epoch = -(-len(examples) // config.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            per_device_train_batch_size=config.batch_size // config.accumulation,
            gradient_accumulation_steps=config.accumulation,
            num_train_epochs=epochs(config),
            lr_scheduler_type="cosine",
            warmup_steps=round(config.warmup * steps_per_epoch * epochs(config)),
            max_grad_norm=0.0,
            seed=config.seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            remove_unused_columns=False,
            label_names=["chosen"],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log; stdout is for results
            PairTrainer(model, arguments, data_collator=collate, train_dataset=examples).train()


def _drop_others(model: RewardModel, active: set) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in active:
            parameter.grad = None


def _check_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise PyargsError(f"the loss is {loss.item()} at step {step}: lower the learning rates or look for broken rows")


# -- new users ---------------------------------------------------------------------------------------------------------


def adapt(model: RewardModel, dataset, *, steps: int | None = None) -> list[str]:
    """Adds the users of the rows with split "support" to the model; returns their ids.

    Backbone, LoRA and shared head parameters stay as they are; rows of other splits are not looked at, so the query set
    can not reach the result. A model without user vectors needs no adaptation and is left alone.
    """
    rows = of_split(dataset, "support")
    if not len(rows):
        raise PyargsError("no rows with split 'support': there is nothing to adapt to")
    ids = list(dict.fromkeys(rows["user_id"]))
    recipe = method(model.about["method"])
    if not model.users.personal:
        return ids
    config = recipe.Config(**model.about["fields"])
    if steps is not None:
        config.adapt_steps = steps
    support = features(model.backbone, model.tokenizer, rows, max_length=config.max_length, last=model.pool == "last")
    model.users.append(ids, **recipe.adapt(model, support, ids, config))
    model.to(model.device)
    return ids


def fit_users(
    model: RewardModel,
    support: Features,
    ids: Iterable[str],
    initial: dict[str, Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
) -> dict[str, Tensor]:
    """Fits vectors of new users by Bradley-Terry on their support pairs, all users in one full batch, the rest frozen.

    initial: start rows [n, ...] for each kind of vector. The loss is the sum over users of each one's mean, so that no
    user's result depends on who else is adapted. Raises PyargsError for a user without a pair.
    """
    users = Users(ids, **initial)
    rows = users.rows(support.users)
    count = torch.bincount(rows, minlength=len(users))
    if (count == 0).any():
        raise PyargsError(f"user '{list(users.ids)[int((count == 0).nonzero()[0])]}' has no support pair")
    head = copy.deepcopy(model.head).requires_grad_(False)
    head.users = users
    probe = RewardModel(model.backbone, model.tokenizer, head.to(model.device), pool=model.pool)
    batch = support.batch(rows, last=model.pool == "last").to(model.device)
    weight = (1.0 / count.to(batch.user.device))[batch.user]
    optimizer = torch.optim.Adam(users.parameters(), lr=lr, weight_decay=weight_decay)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            chosen, rejected = probe.rewards(batch).unbind(1)
            loss = -(F.logsigmoid(chosen - rejected) * weight).sum()
            _check_finite(loss, _)
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in users.vectors.items()}
