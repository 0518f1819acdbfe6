"""Random models as GGUF files beside a tokenizer."""

from __future__ import annotations

from pathlib import Path

from pyargs.lm.bits import NAMES
from pyargs.lm.loading import load_lm


def write_gguf(folder: Path, model, kinds, *, family: str | None = None, fields=None, more=None) -> Path:
    """A GGUF file of a Llama or Qwen2 model whose weights are rounded as `kinds` says: a type for all matrices, or by their
    names in the file. fields: further strings of its head; more: further tensors."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config, decoder, path = model.config, model.get_decoder(), folder / "model.gguf"
    family = family or config.model_type
    writer = GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        writer.add_string(name, value)

    def put(name: str, tensor) -> None:
        values = tensor.detach().float().numpy()
        kind = "F32" if values.ndim == 1 else kinds if isinstance(kinds, str) else kinds.get(name, "F32")
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        kind = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", decoder.get_input_embeddings().weight)
    put("output_norm.weight", decoder.norm.weight)
    if not config.tie_word_embeddings:
        put("output.weight", model.get_output_embeddings().weight)
    for number, layer in enumerate(decoder.layers):
        put(f"blk.{number}.attn_norm.weight", layer.input_layernorm.weight)
        put(f"blk.{number}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        for theirs, ours in NAMES.items():
            linear = layer.get_submodule(theirs)
            put(f"blk.{number}.{ours}.weight", linear.weight)
            if linear.bias is not None:
                put(f"blk.{number}.{ours}.bias", linear.bias)
    for name, tensor in (more or {}).items():
        put(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    load_lm("tiny-random")[1].save_pretrained(folder)
    return path
