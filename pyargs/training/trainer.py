"""Training, the same for all methods: LoRA and head together, or the head alone on features of a frozen backbone."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyargs.data import of_split, with_text_ids
from pyargs.errors import PyargsError, described, explained
from pyargs.files import read_tensors
from pyargs.lm import lora
from pyargs.lm.cache import can_share
from pyargs.lm.loading import fingerprint, load_lm
from pyargs.lm.tokenize import pack
from pyargs.models.reward_model import RewardModel
from pyargs.progress import progress_bar, watched
from pyargs.training import optimizers, processes
from pyargs.training.config import epochs
from pyargs.training.hooks import method
from pyargs.training.losses import check_finite
from pyargs.types import Features


def train(name: str, dataset, config=None, *, checkpoints: str | Path | None = None, note: Callable | None = None):
    """Trains method `name` on the rows of `dataset` with split "train"; returns the model in eval mode.

    dataset: columns user_id, prompt, chosen, rejected, split. config: the method's Config (its defaults without).
    checkpoints: a folder from which a killed training with LoRA continues; the caller removes it when the model is saved.
    note(model, step, steps, loss): is called behind each step.
    Returns a RewardModel, TokenReward or UserPolicy. Raises PyargsError on an unknown method, without train rows, and on a
    loss that is not finite.
    """
    from transformers import set_seed

    processes.start()
    recipe = method(name)
    config = config or recipe.Config()
    dataset = with_text_ids(dataset)
    rows = of_split(dataset, "train") if "split" in dataset.column_names else dataset
    set_seed(config.seed)
    lm, tokenizer = load_lm(config.backbone, dtype=config.dtype)
    decoder = lm.get_decoder()
    model = recipe.build(lm, tokenizer, list(dict.fromkeys(rows["user_id"])), config)
    model.about = {
        "method": name,
        "fields": asdict(config),
        "backbone": config.backbone,
        "dtype": config.dtype,
        "fingerprint": fingerprint(decoder),
        "max_length": config.max_length,
    }
    model.to(lm.device)
    if recipe.loss is None:
        return model.eval()

    if not len(rows):
        raise PyargsError("no rows with split 'train': there is nothing to train on")
    lm.requires_grad_(False)
    recipe.warm_start(model, rows, config)
    set_seed(config.seed)  # what a warm start draws depends on the data
    processes.agree(model)
    if getattr(config, "freeze_backbone", False):
        train_head(recipe, model, model.read(rows), config, note)
    else:
        lora.add(
            decoder,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            rslora=config.rslora,
            target_modules=config.target_modules,
            dropout=config.lora_dropout,
        )
        _train_all(recipe, model, rows, config, checkpoints, note)
    recipe.finish(model, config)
    return model.eval()


def train_head(recipe, model: RewardModel, data: Features, config, note: Callable | None = None) -> None:
    """Trains head and users on features of a frozen backbone: AdamW on the recipe's loss, warm-up and cosine."""
    from transformers import get_cosine_schedule_with_warmup

    rows = model.users.rows(data.users)
    optimizer = optimizers.make(recipe, model, config)
    per_epoch = -(-len(data) // config.batch_size)
    steps = math.ceil(epochs(config) * per_epoch)  # as the Trainer counts
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    order = torch.Generator().manual_seed(config.seed)
    turns = recipe.turns(model, config)
    model.head.train()
    with progress_bar(range(steps), desc="train", unit="step") as bar:
        for step in bar:
            if step % per_epoch == 0:
                shuffled = torch.randperm(len(data), generator=order, device="cpu").split(config.batch_size)
            mine, share = processes.part(shuffled[step % per_epoch])
            batch = data.batch(rows, mine, last=not model.needs_all_tokens).to(model.device)
            batch.step = step
            for active in turns:
                optimizer.zero_grad()
                loss = recipe.loss(model, batch, config) * share
                check_finite(loss, step)
                loss.backward()
                _drop_others(model, active)
                processes.add_up(model.parameters())
                optimizer.step()
            schedule.step()
            if note is not None:
                note(model, step, steps, processes.total(loss.item()))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    model.head.eval()


def _collate(examples: list[dict], share: bool) -> dict[str, Tensor]:
    """This process's pairs as one Packed, each behind its prompt, with the numbers of their responses, users and pairs, and
    the share of the batch that they are."""
    examples, part = processes.part(examples)
    packed = pack([e["prompt"] for e in examples], [e["responses"] for e in examples], share=share)
    several = len(examples[0]["responses"])  # 2, or 3 where the prompt stands among them
    rejected = torch.arange(several - 1, several * len(examples), several, device="cpu")
    number = {name: torch.tensor([e[name] for e in examples], device="cpu") for name in ("user", "pair")}
    return {**vars(packed), "chosen": rejected - 1, "rejected": rejected, **number, "part": part}


def _train_all(recipe, model, rows, config, checkpoints: str | Path | None, note: Callable | None) -> None:
    """LoRA and head together through transformers.Trainer, so that accelerate and its settings work."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    encoded, pairs = model.encode(rows)
    user = model.users.rows(rows["user_id"]).tolist()
    separately = getattr(model, "separate_prompt", False)
    examples = [
        {
            "prompt": encoded[g][0],
            "responses": [encoded[g][1][i] for i in ((0, c, r) if separately else (c, r))],
            "user": u,
            "pair": n,
        }
        for n, ((g, c, r), u) in enumerate(zip(pairs, user, strict=True))
    ]
    share = can_share(model.backbone)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    losses: list[float] = []  # of the parts of a step

    class Noting(TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            if note is not None:
                note(model, state.global_step - 1, state.max_steps, processes.total(sum(losses)))
            losses.clear()

    class PairTrainer(Trainer):
        def compute_loss(self, wrapped, inputs, return_outputs=False, **_):
            share = inputs.pop("part")
            batch = wrapped(**inputs)
            batch.step = self.state.global_step
            loss = recipe.loss(self.accelerator.unwrap_model(wrapped), batch, config) * share
            check_finite(loss, self.state.global_step)
            return (loss, batch) if return_outputs else loss

        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = optimizers.make(recipe, model, config)
            return self.optimizer

        def training_step(self, wrapped, inputs, num_items_in_batch=None):
            *first, last = recipe.turns(model, config)
            for active in first:  # each is a step of its own; the trainer makes the last one
                super().training_step(wrapped, inputs, num_items_in_batch)
                _drop_others(model, active)
                processes.add_up(model.parameters())
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss = super().training_step(wrapped, inputs, num_items_in_batch)
            _drop_others(model, last)
            if self.accelerator.sync_gradients:  # the last part of a step
                processes.add_up(model.parameters())
            losses.append(loss.item() if note is not None else 0.0)
            return loss

        def _get_grad_norm(self, *_, **__):
            """Not computed: it is not logged, and sparse gradients have no norm."""

        # A checkpoint holds what is trained, not the frozen backbone.
        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in trained.items()}, Path(output_dir) / "trained.safetensors")

        def _save_checkpoint(self, *arguments):
            if processes.number() == 0:  # on CPUs the Trainer takes every process for the first
                with explained(f"a checkpoint in {self.args.output_dir} cannot be written"):
                    super()._save_checkpoint(*arguments)
                    (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            processes.total(0)  # the others wait

        # It is read as data, and pickled code is never run. Another run's checkpoint is an error that names it.
        def _load_from_checkpoint(self, folder, model=None):
            found = read_tensors(Path(folder) / "trained.safetensors")
            lora.same_tensors(trained, found, Path(folder) / "trained.safetensors")
            for name, value in found.items():
                trained[name].data.copy_(value)

        def _load_optimizer_and_scheduler(self, folder):
            with described(f"the checkpoint {folder} is damaged: remove it"):
                super()._load_optimizer_and_scheduler(folder)

        def _load_rng_state(self, folder):
            with described(f"the checkpoint {folder} is damaged: remove it"):
                super()._load_rng_state(folder)

    if config.accumulation > config.batch_size:
        raise PyargsError(f"accumulation={config.accumulation} splits a batch of {config.batch_size}: it can be at most that")
    if config.accumulation > 1 and len(recipe.turns(model, config)) > 1:
        raise PyargsError("alternating updates need whole minibatches: use accumulation=1")
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.backbone.enable_input_require_grads()
    steps_per_epoch = -(-len(examples) // config.batch_size)
    with contextlib.ExitStack() as stack:
        folder = checkpoints or stack.enter_context(tempfile.TemporaryDirectory())
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=config.batch_size // config.accumulation,
            gradient_accumulation_steps=config.accumulation,
            num_train_epochs=epochs(config),
            lr_scheduler_type="cosine",
            warmup_steps=round(config.warmup * steps_per_epoch * epochs(config)),
            max_grad_norm=0.0,  # the optimizer clips, as it does with a frozen backbone
            seed=config.seed,
            save_strategy="steps" if checkpoints else "no",
            save_steps=config.checkpoint_steps,
            save_total_limit=2,  # the older one stays until the newer one is complete
            report_to="none",
            logging_strategy="no",
            remove_unused_columns=False,
            label_names=["chosen"],
            disable_tqdm=not watched(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        last = processes.of_first(lambda: _last_checkpoint(Path(checkpoints))) if checkpoints else None
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # the Trainer prints its log; stdout is for results
        trainer = PairTrainer(model, arguments, data_collator=lambda some: _collate(some, share), train_dataset=examples)
        trainer.add_callback(Noting)
        if processes.count() > 1:
            _same_for_all(trainer.accelerator)
        trainer.train(resume_from_checkpoint=last)
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_disable()


def _same_for_all(accelerator) -> None:
    """Makes accelerate neither wrap the model nor share out batches: every process sees all of them, and takes its part."""
    from accelerate.data_loader import prepare_data_loader

    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    alone = dict(num_processes=1, process_index=0, use_seedable_sampler=True, put_on_device=True)
    accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(loader, accelerator.device, **alone)


COMPLETE = "complete"
"""File that is written last into a checkpoint."""


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; the others are removed. Of these, runs that were killed have left parts."""
    number = lambda one: int(one.name.rpartition("-")[2])  # noqa: E731
    last = max((one for one in folder.glob("checkpoint-*") if (one / COMPLETE).exists()), key=number, default=None)
    for one in folder.glob("checkpoint-*"):
        if one != last:
            shutil.rmtree(one)
    return last and str(last)


def _drop_others(model, active: set) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in active:
            parameter.grad = None
