"""What the examples share: their options, prompts, and a reward model with a weight to use it at."""

from __future__ import annotations

import argparse

from torch import Tensor

import pyargs
from pyargs import data
from pyargs.decode.strength import reward_std
from pyargs.lm.tokenize import encode_prompt, left_pad
from pyargs.training.hooks import method

PROMPTS = ["What makes a good cup of tea?", "How do I keep a houseplant alive through the winter?"]


def arguments(description: str, words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the policy: embedded name, local folder or hub name")
    parser.add_argument("--reward-model", metavar="FOLDER", help="of `pyargs train` or `adapt`, with a linear head")
    # Of the demo data: ada prefers longer words, ben shorter ones.
    parser.add_argument("--users", nargs=2, default=["ada", "ben"], help="whose reward guides the first and the second answer")
    parser.add_argument("--reward-weight", type=float, help="raw w (default: 1 / reward_std, measured on the two prompts)")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    return parser.parse_args(words)


def reward_model(folder: str | None, backbone: str) -> pyargs.RewardModel:
    """The model in `folder`; without one, a LoRE head trained on a few demo pairs over the frozen `backbone` (a minute)."""
    if folder:
        return pyargs.RewardModel.from_pretrained(folder)
    config = method("lore").Config(backbone=backbone, freeze_backbone=True)
    return pyargs.train("lore", data.load("demo", max_pairs=24), config)


def prompts(tokenizer) -> dict[str, Tensor]:
    """Ids and mask of the two prompts, int64 [2, T], padded on the left."""
    ids, mask = left_pad([encode_prompt(tokenizer, prompt) for prompt in PROMPTS], tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def unit_weight(policy, model: pyargs.RewardModel, inputs: dict[str, Tensor], users: list[str]) -> float:
    """1 / reward_std: rewards have no natural unit, so one and the same weight is weak for one model and wild for another."""
    mask = inputs["attention_mask"].bool()
    rows = [ids[own].tolist() for ids, own in zip(inputs["input_ids"], mask, strict=True)]
    unguided = pyargs.Engine(policy, model).generate(rows, users, reward_weight=0.0, max_new_tokens=16)
    return 1.0 / reward_std(unguided)


def show(tokenizer, users: list[str], tokens: Tensor) -> None:
    for user, prompt, row in zip(users, PROMPTS, tokens, strict=True):
        print(f"{user}: {prompt}\n    {tokenizer.decode(row, skip_special_tokens=True).strip()}\n")
