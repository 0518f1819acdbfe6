"""Training and adaptation, the same for all methods: full (LoRA and head together) or on features of a frozen backbone."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import math
import pkgutil
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pyargs.config import check, check_kinds, option
from pyargs.data import of_split, with_text_ids
from pyargs.errors import PyargsError, described, did_you_mean, explained
from pyargs.files import read_tensors
from pyargs.lm import lora
from pyargs.lm.cache import can_share
from pyargs.lm.forward import fingerprint, load_lm
from pyargs.lm.tokenize import pack
from pyargs.models.reward_model import RewardModel
from pyargs.progress import progress_bar, watched
from pyargs.training import optimizers
from pyargs.types import Batch, Features, Users


@dataclass
class ModelConfig:
    """What every method has."""

    backbone: str = option("smollm2-135m", "the language model: embedded name, local folder or hub name")
    dtype: str = option(
        "float32", "of the backbone; heads, rewards and losses are float32 always: bf16 ties would count as errors",
        choices=["float32", "bfloat16"],
    )  # fmt: skip
    max_length: int = option(
        512, "tokens of prompt + response; the prompt's content is cut, never template or response (PAL's code; paper silent)",
        least=1,
    )  # fmt: skip
    seed: int = option(0, "of initialisation and order; the paper has 3 seeds")

    def __post_init__(self):
        check(self)


@dataclass
class FitConfig(ModelConfig):
    """What every method that trains the language model has. A method's own Config adds its fields and may change a default."""

    lora_rank: int = option(8, "LoRA rank (paper)", least=1)
    lora_alpha: float = option(16.0, "LoRA alpha (paper)")
    lora_dropout: float = option(0.0, "dropout before LoRA (paper silent; 0, as it names none)", least=0)
    rslora: bool = option(True, "scale LoRA by alpha / sqrt(rank) (paper)")
    lora_lr: float = option(5e-5, "learning rate of LoRA (paper)")
    target_modules: list[str] | None = option(
        None,
        "layers with LoRA (default: PEFT's choice for the family, mostly q_proj and v_proj, or all linear layers where it "
        "has none, as for Phi-3, OLMo2, Granite, SmolLM3; all-linear: all of them; paper silent)",
    )
    epochs: float | None = option(
        None, "passes over the train pairs (default: 2 in full as for PRISM and Pref-LaMP, 20 with a frozen backbone, where "
        "a pass takes a second and only the head must move; paper silent)"
    )  # fmt: skip
    batch_size: int = option(32, "pairs per step (most of the methods' own codes; paper silent)", least=1)
    accumulation: int = option(1, "parts of a batch whose gradients are added up, to save memory (paper silent)", least=1)
    warmup: float = option(0.03, "share of the steps with rising rate, then cosine (VPL, P-DPO; paper silent)", least=0)
    max_grad_norm: float = option(
        0.0, "length to which a step's gradient is cut; 0: never, in full training too, where the Trainer of transformers by "
        "itself cuts at 1 (paper silent)", least=0,
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory (paper silent)")
    checkpoint_steps: int = option(
        100, "steps between checkpoints of full training, from which a killed one goes on (paper silent)", least=1
    )


@dataclass
class HeadConfig(FitConfig):
    """What every method with a reward head has."""

    freeze_backbone: bool = option(False, "train the head alone on features that are computed once and cached (not the paper)")


@dataclass
class AdaptConfig(HeadConfig):
    """What every method with vectors that are fitted to new users has."""

    adapt_steps: int = option(500, "full-batch Adam steps for new users (LoRE's code; paper silent)", least=0)


def epochs(config: FitConfig) -> float:
    """Passes over the train pairs; the default depends on whether the backbone is frozen."""
    if config.epochs is None:
        return 20.0 if getattr(config, "freeze_backbone", False) else 2.0
    if config.epochs <= 0:
        raise PyargsError(f"epochs must be > 0, got {config.epochs}")
    return config.epochs


def method(name: str):
    """The module pyargs/methods/<name>.py, or the file itself where `name` is a path to a .py file, which is run.

    So a path must come from the caller, never out of a file.
    """
    from pyargs import methods

    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PyargsError(f"no method file {name}")
        own = f"pyargs_method_{Path(name).stem}"  # whatever the file is called, it takes no other module's place
        spec = importlib.util.spec_from_file_location(own, name)
        module = sys.modules[own] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    known = [m.name for m in pkgutil.iter_modules(methods.__path__)]
    if name not in known:
        raise PyargsError(f"unknown method '{name}'.{did_you_mean(name, known)}")
    return importlib.import_module(f"pyargs.methods.{name}")


def _recipe(model, given: str | None):
    """The method that made the model: the caller's, who may name a file, else what its folder says, which may not."""
    if given is not None:
        return method(given)
    name = model.about.get("method")
    if not isinstance(name, str) or name.endswith(".py"):
        raise PyargsError(
            f"the model says that the file {name} made it, and what a model says is not run. Fix: if you trust that file, "
            "name it yourself: adapt(model, rows, method=PATH), or --method PATH"
        )
    return method(name)


# -- training ----------------------------------------------------------------------------------------------------------


def bradley_terry(model: RewardModel, batch: Batch) -> Tensor:
    """-log sigma(R_u(x, y_w) - R_u(x, y_l)) of each pair, [N]."""
    chosen, rejected = model.rewards(batch).unbind(1)
    return -F.logsigmoid(chosen - rejected)


def train(name: str, dataset, config=None, *, checkpoints: str | Path | None = None):
    """Trains method `name` on the rows of `dataset` with split "train"; returns the model in eval mode.

    dataset: columns user_id, prompt, chosen, rejected, split. config: the method's Config (its defaults without).
    checkpoints: a folder from which full training goes on where it was killed; the caller removes it when the model is safe.
    Returns a RewardModel, TokenReward or UserPolicy. Raises PyargsError on an unknown method, without train rows, and on a
    loss that is not finite.
    """
    from transformers import set_seed

    recipe = method(name)
    config = config or recipe.Config()
    dataset = with_text_ids(dataset)
    rows = of_split(dataset, "train") if "split" in dataset.column_names else dataset
    set_seed(config.seed)
    lm, tokenizer = load_lm(config.backbone, dtype=config.dtype)
    decoder = lm.get_decoder()
    model = recipe.build(lm, tokenizer, list(dict.fromkeys(rows["user_id"])), config)
    model.about = {
        "method": name, "fields": asdict(config), "backbone": config.backbone, "dtype": config.dtype,
        "fingerprint": fingerprint(decoder), "max_length": config.max_length,
    }  # fmt: skip
    model.to(lm.device)
    if not hasattr(recipe, "loss"):
        return model.eval()

    if not len(rows):
        raise PyargsError("no rows with split 'train': there is nothing to train on")
    lm.requires_grad_(False)
    if hasattr(recipe, "warm_start"):
        recipe.warm_start(model, rows, config)
    set_seed(config.seed)  # what a warm start draws depends on the data
    if getattr(config, "freeze_backbone", False):
        train_head(recipe, model, model.read(rows), config)
    else:
        lora.add(
            decoder,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            rslora=config.rslora,
            target_modules=config.target_modules,
            dropout=config.lora_dropout,
        )
        _train_all(recipe, model, rows, config, checkpoints)
    if hasattr(recipe, "finish"):
        recipe.finish(model, config)
    return model.eval()


def _turns(recipe, model, config) -> list[set]:
    """The parameter sets that a minibatch updates in turn, each after a forward pass of its own; one set for most methods."""
    everything = {p for p in model.parameters() if p.requires_grad}
    return recipe.turns(model, config) if hasattr(recipe, "turns") else [everything]


def train_head(recipe, model: RewardModel, data: Features, config) -> None:
    """Trains head and users on features of a frozen backbone: AdamW on the recipe's loss, warm-up and cosine."""
    from transformers import get_cosine_schedule_with_warmup

    rows = model.users.rows(data.users)
    optimizer = optimizers.make(recipe, model, config)
    per_epoch = -(-len(data) // config.batch_size)
    steps = math.ceil(epochs(config) * per_epoch)  # as the Trainer counts
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    order = torch.Generator().manual_seed(config.seed)
    turns = _turns(recipe, model, config)
    model.head.train()
    with progress_bar(range(steps), desc="train", unit="step") as bar:
        for step in bar:
            if step % per_epoch == 0:
                shuffled = torch.randperm(len(data), generator=order, device="cpu").split(config.batch_size)
            batch = data.batch(rows, shuffled[step % per_epoch], last=not model.whole).to(model.device)
            batch.step = step
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
    model.head.eval()


def _collate(examples: list[dict], share: bool) -> dict[str, Tensor]:
    """Pairs as one Packed, each behind its prompt, with the numbers of their responses, users and pairs."""
    packed = pack([e["prompt"] for e in examples], [e["responses"] for e in examples], share=share)
    several = len(examples[0]["responses"])  # 2, or 3 where the prompt stands among them
    rejected = torch.arange(several - 1, several * len(examples), several, device="cpu")
    number = {name: torch.tensor([e[name] for e in examples], device="cpu") for name in ("user", "pair")}
    return {**vars(packed), "chosen": rejected - 1, "rejected": rejected, **number}


def _train_all(recipe, model, rows, config, checkpoints: str | Path | None) -> None:
    """LoRA and head together through transformers.Trainer, so that accelerate and its settings work."""
    from transformers import Trainer, TrainingArguments

    encoded, pairs = model.encode(rows)
    user = model.users.rows(rows["user_id"]).tolist()
    apart = getattr(model, "apart", False)
    examples = [
        {
            "prompt": encoded[g][0],
            "responses": [encoded[g][1][i] for i in ((0, c, r) if apart else (c, r))],
            "user": u,
            "pair": n,
        }
        for n, ((g, c, r), u) in enumerate(zip(pairs, user, strict=True))
    ]
    share = can_share(model.backbone)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    class PairTrainer(Trainer):
        def compute_loss(self, wrapped, inputs, return_outputs=False, **_):
            batch = wrapped(**inputs)
            batch.step = self.state.global_step
            loss = recipe.loss(self.accelerator.unwrap_model(wrapped), batch, config)
            _check_finite(loss, self.state.global_step)
            return (loss, batch) if return_outputs else loss

        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = optimizers.make(recipe, model, config)
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

        def _get_grad_norm(self, *_, **__):
            """Nobody asked for it, and sparse gradients have none."""

        # A checkpoint holds what is trained, not the frozen backbone.
        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in trained.items()}, Path(output_dir) / "trained.safetensors")

        def _save_checkpoint(self, *arguments):
            with explained(f"a checkpoint in {self.args.output_dir} cannot be written"):
                super()._save_checkpoint(*arguments)
                (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

        # And it is read as data: what is no checkpoint of this run is an error that names it, what is pickled is not run.
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
    if config.accumulation > 1 and len(_turns(recipe, model, config)) > 1:
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
        last = _last_checkpoint(Path(checkpoints)) if checkpoints else None
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # the Trainer prints its log; stdout is for results
        trainer = PairTrainer(model, arguments, data_collator=lambda some: _collate(some, share), train_dataset=examples)
        trainer.train(resume_from_checkpoint=last)
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_disable()


COMPLETE = "complete"
"""File that is written last into a checkpoint."""


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; others, of a run killed while it wrote, are removed."""
    complete = []
    for one in folder.glob("checkpoint-*"):
        if (one / COMPLETE).exists():
            complete.append(one)
        else:
            shutil.rmtree(one)
    return str(max(complete, key=lambda one: int(one.name.rpartition("-")[2]))) if complete else None


def _drop_others(model, active: set) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter not in active:
            parameter.grad = None


def _check_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise PyargsError(f"the loss is {loss.item()} at step {step}: lower the learning rates or look for broken rows")


# -- new users ---------------------------------------------------------------------------------------------------------


def adapt(model, dataset, *, steps: int | None = None, method: str | None = None, again: bool = False) -> list[str]:
    """Adds the users of the rows with split "support" to the model; returns their ids.

    again: users who are there already are adapted anew, from these rows alone; without it they are an error.
    Backbone, LoRA and shared head parameters stay as they are; rows of other splits are not looked at, so the query set
    can not reach the result. A method without users needs no adaptation and is left alone. The same model, rows and seed
    give the same result. method: the path of the .py file that the model was trained with, where it was one.
    """
    rows = of_split(with_text_ids(dataset), "support")
    if not len(rows):
        raise PyargsError("no rows with split 'support': there is nothing to adapt to")
    ids = list(dict.fromkeys(rows["user_id"]))
    recipe = _recipe(model, method)
    misfit = f"the model's fields do not fit the method {model.about.get('method')}"
    with described(misfit):
        made, kinds = model.about["fields"], typing.get_type_hints(recipe.Config)
        if gone := made.keys() - {field.name for field in fields(recipe.Config)}:
            raise PyargsError(
                f"{misfit}: it has no option '{min(gone)}', with which this model was made. A model of another version is not "
                "adapted, train it again"
            )
        check_kinds(made, {name: kinds[name] for name in made}, misfit)
        config = recipe.Config(**made)
    if steps is not None:
        if not hasattr(config, "adapt_steps"):
            raise PyargsError(f"{model.about['method']} takes no steps to adapt: leave adapt_steps out")
        config = replace(config, adapt_steps=steps)
    if not hasattr(recipe, "adapt"):
        return ids
    known = [user for user in ids if user in model.known_users]
    if known and not again:
        raise PyargsError(
            f"user '{known[0]}' is there already: ask for it (again=True, --again), or give new ids to new users"
        )
    found = []
    # Each user by itself, from reading its pairs on: in a batch with others its states would be rounded otherwise.
    for user, own in zip(ids, pairs_of_users(rows["user_id"], ids), strict=True):
        torch.manual_seed(config.seed)
        pairs = rows.select(own.tolist())
        support = recipe.support(model, pairs) if hasattr(recipe, "support") else model.read(pairs)
        found.append(recipe.adapt(model, support, [user], config))
    model.users.remove([user for user in known if user in model.users.ids])
    model.users.append(ids, **{name: torch.cat([one[name] for one in found]) for name in found[0]})
    model.about["adapted"] = list(dict.fromkeys([*model.about.get("adapted", []), *ids]))
    model.to(model.device)
    return ids


def losses_of(model: RewardModel, batch: Batch) -> Callable[[], Tensor]:
    """Bradley-Terry of the pairs [N], as a function of the vectors as they are when it is called."""
    return lambda: bradley_terry(model, batch)


def fit_users(
    model: RewardModel,
    support: Features,
    ids: Iterable[str],
    initial: dict[str, Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    objective: Callable[[RewardModel, Batch], Callable[[], Tensor]] = losses_of,
) -> dict[str, Tensor]:
    """Fits vectors of new users on their support pairs by full-batch Adam, the rest frozen.

    initial: start rows [n, ...] for each kind of vector; weight_decay: L2, as a term of the gradient; objective(model, batch)
    -> a function that gives the loss [N] of each of the user's pairs; their mean is minimised. One user after the other, each
    in a batch of its own: the order in which a product adds up depends on the batch, and Adam makes much of a last digit, so
    that in a common batch a user would depend on who else is adapted. Raises PyargsError for a user without a pair.
    """
    found = []
    for row, own in enumerate(pairs_of_users(support.users, ids)):
        start = {name: value[row : row + 1] for name, value in initial.items()}
        options = dict(steps=steps, lr=lr, weight_decay=weight_decay, objective=objective)
        found.append(_fit_user(model, support.select(own), start, **options))
    return {name: torch.cat([one[name] for one in found]) for name in initial}


def _fit_user(model: RewardModel, support: Features, initial: dict[str, Tensor], *, steps, lr, weight_decay, objective):
    """The vectors [1, ...] of the one user whose pairs these are."""
    users = Users(support.users[:1], **{name: value.clone() for name, value in initial.items()})
    head = copy.deepcopy(model.head, {id(model.users): users}).requires_grad_(False).eval()  # with this user for its own
    users.requires_grad_(True)
    probe = RewardModel(model.backbone, model.tokenizer, head.to(model.device), pool=model.pool, whole=model.whole)
    losses = objective(probe, support.batch(users.rows(support.users), last=not model.whole).to(model.device))
    optimizer = torch.optim.Adam(users.parameters(), lr=lr, weight_decay=weight_decay)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = losses().mean()
            _check_finite(loss, step)
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in users.vectors.items()}


def randn_rows(ids: Iterable[str], *shape: int, seed: int) -> Tensor:
    """Normal start values [n, *shape] that depend on the seed and each user's own id: not on who else is adapted."""
    numbers = [int(hashlib.sha256(f"{seed} {user}".encode()).hexdigest()[:15], 16) for user in ids]
    rngs = [torch.Generator().manual_seed(number) for number in numbers]
    return torch.stack([torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu") for rng in rngs])


def pairs_of_users(users: Sequence[str], ids: Iterable[str]) -> list[Tensor]:
    """For each id the numbers of its pairs, int64 [n]; users: the user of each pair. Raises PyargsError for one without."""
    numbers: dict[str, list[int]] = {user: [] for user in ids}
    for number, user in enumerate(users):
        numbers[user].append(number)
    for user, own in numbers.items():
        if not own:
            raise PyargsError(f"user '{user}' has no support pair")
    return [torch.tensor(own, device="cpu") for own in numbers.values()]
