"""Text at the edge of the decoder: a policy with its reward model, and answers to any number of prompts."""

from __future__ import annotations

from tqdm import tqdm

from pyargs.decode.args import generate
from pyargs.files import read_json
from pyargs.lm.encode import encode_prompt, left_pad
from pyargs.lm.hf import load_lm
from pyargs.models.reward_model import RewardModel


def load_pair(policy: str, model: str, *, dtype: str = "float32"):
    """A policy and a reward model; where both rest on the same weights and no LoRA changes them, they are loaded once."""
    lm, tokenizer = load_lm(policy, dtype=dtype)
    config = read_json(f"{model}/config.json")
    if config["backbone"] == policy and config["dtype"] == dtype and not config["lora"]:
        return lm, RewardModel.from_pretrained(model, backbone=lm.get_decoder(), tokenizer=tokenizer, device=lm.device)
    return lm, RewardModel.from_pretrained(model).merge()


def decode_prompts(policy, model: RewardModel, prompts, users, *, batch_size: int = 8, progress: str = "decode", **more):
    """Guided answers to any number of prompts, batch by batch of similar length, in the order given.

    prompts: str or messages; users: one id each; reward_weight: one for all, or a list with one for each; seed: each prompt
    samples by this and its number, whatever batch it is in; the rest as for `generate`.
    Yields (numbers of the prompts, their ids, Decoded).
    """
    tokenizer = model.tokenizer
    room = model.about.get("max_length")
    encoded = [encode_prompt(tokenizer, prompt, room) for prompt in prompts]
    weight, seed = more.pop("reward_weight"), more.pop("seed", 0)
    weights = list(weight) if isinstance(weight, (list, tuple)) else [weight] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with tqdm(total=len(order), desc=progress, unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            take = order[start : start + batch_size]
            ids, mask = left_pad([encoded[i] for i in take], pad_id=0)
            yield take, [encoded[i] for i in take], generate(
                policy, model, ids, mask, [users[i] for i in take],
                reward_weight=[weights[i] for i in take], seed=[seed * 1_000_003 + i for i in take], **more,
            )  # fmt: skip
            bar.update(len(take))
