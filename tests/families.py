"""Random models of the families of transformers, small enough for every test."""

from __future__ import annotations

from functools import lru_cache

import torch

VOCABULARY = 61
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, sliding_window=4, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, state_size=4, time_step_rank=4, mamba_d_state=4,
    n_embd=32, n_head=4, n_layer=2, n_positions=128, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, rotary_dim=4,
    ffn_dim=48, word_embed_proj_dim=32,
)  # fmt: skip
"""By whatever name a family's config has for it."""
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[8.0] * 4)
FAMILIES = {
    name: (name, {})
    for name in (
        "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt",
        "olmo2", "granite", "smollm3", "bloom", "mpt", "mamba", "mixtral", "qwen2_moe", "stablelm", "starcoder2", "cohere",
        "gptj",
    )
} | {
    "mamba2": ("mamba2", dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=8)),
    "jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2)),
    "falcon": ("falcon", {}),
    "falcon alibi": ("falcon", dict(alibi=True)),
    "gpt_neo": ("gpt_neo", dict(num_layers=2, num_heads=4, window_size=4, attention_types=[[["global", "local"], 1]])),
    "phi3 without window": ("phi3", dict(sliding_window=None)),
    "phi3 longrope": ("phi3", dict(sliding_window=None, original_max_position_embeddings=12, rope_parameters=LONGROPE)),
    "granite with scales": (
        "granite",
        dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    ),
    "mistral without window": ("mistral", dict(sliding_window=None)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "cohere2": ("cohere2", dict(num_hidden_layers=4)),
    "olmo3": ("olmo3", {}),
    "gpt_oss": ("gpt_oss", {}),
    "exaone4": ("exaone4", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "nemotron": ("nemotron", {}),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
}  # fmt: skip
DOCUMENTED = {
    "Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Granite": "granite with scales", "SmolLM3": "smollm3",
    "Mistral without a sliding window": "mistral without window", "Mistral with one": "mistral",
    "Phi-3 without a sliding window": "phi3 without window", "Phi-3 with one": "phi3", "OLMo2": "olmo2", "GPT-2": "gpt2",
    "GPT-NeoX": "gpt_neox", "OPT": "opt", "Gemma 2": "gemma2", "Gemma 3": "gemma3_text",
}  # fmt: skip
"""The families in the table of docs/decoding.md."""
QUICK = ("gemma2", "bloom", "mpt", "mamba", "falcon alibi", "gpt_neo", "qwen2_moe", "cohere")
NO_BRANCHES = {
    "mistral", "gemma2", "gemma3_text", "phi3", "bloom", "mpt", "mamba", "mamba2", "jamba", "mixtral", "starcoder2",
    "falcon alibi", "gpt_neo", "cohere2", "olmo3", "gpt_oss", "exaone4", "lfm2",
}  # fmt: skip
CAPPED = {"gemma2", "cohere", "cohere2"}


@lru_cache(maxsize=4)
def random_lm(name: str, seed: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = FAMILIES[name]
    known = vars(AutoConfig.for_model(family))
    sizes = {size: value for size, value in SIZES.items() if size in known}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes | changes
    )
    config._experts_implementation = "eager"  # the others know no float64, which the oracle takes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # the usual tiny start values make every token nearly equally likely
        if parameter.ndim > 1 and "mamba" not in family:
            parameter.data.normal_(std=0.2)
    return model
