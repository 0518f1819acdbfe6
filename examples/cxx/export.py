"""Writes a policy and a reward model's users for guided.cpp, as two files of safetensors.

    python examples/cxx/export.py --model smollm2-135m --reward-model FOLDER --out FOLDER [--places 512]

lm.safetensors has the weights of a Llama in float32 under the names of transformers, its sizes, and its rotary table for as
many tokens as a text may have. users.safetensors has the direction of each user, [U, D]: what a linear head's reward is the
product of a state with. Their numbers and names are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import pyargs
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.stack import pack


@torch.no_grad()
def export_lm(lm, tokenizer, file: str | Path, places: int = 512) -> None:
    """lm: a LlamaForCausalLM. tokenizer: says which tokens have a text; None: all do."""
    if lm.config.model_type != "llama" or lm.config.attention_bias or lm.config.mlp_bias:
        raise pyargs.PyargsError(f"guided.cpp reads a Llama without biases, not a {lm.config.model_type}")
    decoder = lm.get_decoder()
    pack.check_supported(decoder, lm.lm_head, torch.float32, pack.structure(lm))
    layer, vocabulary = decoder.layers[0], lm.config.vocab_size
    sizes = lm.config.hidden_size, lm.config.num_attention_heads, lm.config.num_key_value_heads, layer.self_attn.head_dim
    sizes = *sizes, lm.config.intermediate_size, len(decoder.layers), vocabulary
    tables = decoder.rotary_emb(torch.zeros(0), torch.arange(places).unsqueeze(0))
    cosine, sine = (table[0, :, : layer.self_attn.head_dim // 2].clone() for table in tables)
    stop = lm.generation_config.eos_token_id
    tensors = {name: weight.float().clone() for name, weight in lm.state_dict().items()} | {
        "lm_head.weight": lm.lm_head.weight.float().clone(),
        "sizes": torch.tensor(sizes),
        "epsilon": torch.tensor([lm.config.rms_norm_eps], dtype=torch.float32),
        "cosine": cosine,
        "sine": sine,
        "tokens": torch.tensor([vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))]),
        "stop": torch.tensor([stop] if isinstance(stop, int) else stop or [], dtype=torch.long),
    }
    save_file(tensors, file)


@torch.no_grad()
def export_users(model: pyargs.RewardModel, file: str | Path) -> list[str]:
    """model: with a linear head, over the policy's own weights. Returns the users in the order of their rows."""
    if not isinstance(model.head, linear.Head) or model.step_reward != "token" or lora.present(model.backbone):
        raise pyargs.PyargsError("guided.cpp reads a linear head over the policy's weights: train one with freeze_backbone")
    names = list(model.known_users) or ["everyone"]
    save_file({"directions": model.head.fold(torch.arange(len(names))).weight.contiguous()}, file)
    return names


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the policy: embedded name, local folder or hub name")
    parser.add_argument("--reward-model", metavar="FOLDER", required=True, help="with a linear head over the frozen policy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--places", type=int, default=512, help="tokens of a prompt, its answer and the candidates together")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    lm, tokenizer = pyargs.load_lm(options.model, device="cpu")
    # Raises where it was trained over other weights.
    model = pyargs.RewardModel.from_pretrained(options.reward_model, backbone=lm.get_decoder(), tokenizer=tokenizer)
    export_lm(lm, tokenizer, options.out / "lm.safetensors", options.places)
    users = export_users(model, options.out / "users.safetensors")
    print("\n".join(f"{row} {user}" for row, user in enumerate(users)))


if __name__ == "__main__":
    main()
