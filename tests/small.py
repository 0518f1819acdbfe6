"""Every method in small: with a tiny language model and few steps, and what is asked of any model."""

from __future__ import annotations

import json

import torch
from formulas import USERS

from pyargs.decode.engine import Engine
from pyargs.lm.loading import load_lm
from pyargs.training import hooks

METHODS = hooks.names()

SMALL = {
    "lore": dict(rank=3),
    "pref": dict(rank=3),
    "pal": dict(variant="A", rank=2),
    "vpl": dict(latent=16),
    "mpu": dict(hidden=8),
    "pdpo": dict(soft_tokens=3, adapt_steps=5, adapt_lr=1e-2),
    "icl": dict(shots=3, max_length=768),
}


def config_of(name: str, folder: str, **more):
    recipe = hooks.method(name)
    fields = {"backbone": folder, **SMALL.get(name, {}), **more}
    if recipe.loss:
        fields = {"epochs": 1, "batch_size": 16, "lora_lr": 1e-2, **fields}
    return recipe.Config(**{"adapt_steps": 20, **fields} if hasattr(recipe.Config, "adapt_steps") else fields)


def scores(model, data) -> torch.Tensor:
    """What ranks a dataset's pairs under any kind of model, [N, 2]."""
    return model.pair_scores(data)[1] if hasattr(model, "pair_scores") else model.pair_logprobs(data)[0]


def answers(policy, model, prompts, users, *, batch_size=8, best_of=0, reward_weight=None, **more) -> list[list[int]]:
    """Tokens of any kind of model's answers. One that answers by itself takes no policy and no weight."""
    guided = hasattr(model, "pair_scores")
    engine = Engine(policy if guided else None, model, max_rows=batch_size, best_of=best_of)
    weight = {"reward_weight": reward_weight} if guided and not best_of else {}
    return [answer.tokens for answer in engine.generate(prompts, users, max_new_tokens=6, **weight, **more)]


def saved(recipe, config, folder, lm_folder):
    """An untrained model of a method in a folder."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(lm_folder)
    model = recipe.build(lm, tokenizer, USERS, config)
    model.about = {
        "method": recipe.__name__.rpartition(".")[2],
        "fields": vars(config),
        "backbone": lm_folder,
        "dtype": "float32",
    }
    model.save_pretrained(folder)
    return model


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
