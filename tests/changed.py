"""Pairs of models that tests change, and what is asked of them before and after."""

from __future__ import annotations

import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, chosen, engine_of, prompts

from pyargs.decode.backends import cpu
from pyargs.lm import lora


def parts(decoder):
    """A layer, its MLP and a linear layer (or GPT-2's of the same meaning) of a decoder."""
    if hasattr(decoder, "h"):
        return decoder.h[0], decoder.h[0].mlp, decoder.h[0].mlp.c_fc
    return decoder.layers[0], decoder.layers[0].mlp, decoder.layers[0].mlp.gate_proj


def pair(family="llama", dtype=torch.float32):
    policy = tiny_lm(family, dtype=dtype)
    return policy, reward_model(policy)


FEW = dict(reward_weight=2.0, num_candidates=3, max_new_tokens=4, stop=[])


def decoded(policy, model):
    return chosen(policy, model, prompts([3, 5]), USERS[:2], **FEW)


def fast(policy, model) -> bool:
    """Whether one pass of the CPU stack serves both."""
    return engine_of(policy, model).backend == "cpu" and cpu.shares(policy, model.backbone)


def adapted():
    policy = tiny_lm(dtype=torch.float32)
    model = reward_model(policy)
    lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj", "down_proj"])
    for name, parameter in model.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return policy, model.eval()
