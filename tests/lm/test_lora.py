"""Backbones of many families: what LoRA is put into, and what is no language model."""

from __future__ import annotations

import json

import pytest
import torch

from pyargs import cli, load_model
from pyargs.commands.train import held_out
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.lm import lora
from pyargs.lm.loading import load_lm

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("olmo2", {"q_proj", "down_proj"}),
        ("granite", {"q_proj", "down_proj"}),
        ("smollm3", {"q_proj", "down_proj"}),
        ("cohere", {"q_proj", "down_proj"}),
        ("starcoder2", {"q_proj", "c_fc"}),
        ("mamba", {"in_proj", "x_proj", "dt_proj"}),
        ("llama", {"q_proj", "v_proj"}),
        ("mixtral", {"q_proj", "v_proj"}),
    ],
)
def test_lora_goes_into_the_linear_layers_of_a_family_that_peft_has_no_choice_for(family, layers, tmp_path):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    decoder = AutoModel.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    ids = torch.arange(5, 12).unsqueeze(0)
    before = decoder(ids).last_hidden_state
    lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=None)
    there = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in decoder.named_parameters() if ".lora_" in name}
    assert there == layers if family in ("llama", "phi3", "mamba", "mixtral") else there > layers
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    after = decoder(ids).last_hidden_state
    assert not torch.allclose(before, after)
    lora.save(decoder, tmp_path)
    torch.manual_seed(0)
    again = AutoModel.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    lora.load(again, tmp_path)
    assert torch.equal(again(ids).last_hidden_state, after)


def test_layers_that_are_not_there_are_refused_by_name():
    from transformers import AutoConfig, AutoModel

    decoder = AutoModel.from_config(AutoConfig.for_model("llama", **SIZES))
    with pytest.raises(PyargsError, match="no LoRA for llama in nowhere.*Fix: --target-modules, of down_proj, gate_proj"):
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=["nowhere"])
    with pytest.raises(PyargsError, match="no LoRA for llama in nope: .*Fix: --target-modules, of down_proj, gate_proj"):
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=["q_proj", "nope"])
    assert not lora.present(decoder)


def test_layers_are_named_by_the_end_of_their_place_or_all_linear():
    from transformers import AutoConfig, AutoModel

    for chosen, count in ((["all-linear"], 7), (["self_attn.q_proj", "layers.0.mlp.up_proj"], 2)):
        decoder = AutoModel.from_config(AutoConfig.for_model("llama", **SIZES))
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=chosen)
        assert len(lora.weights(decoder)) == 2 * count
    with pytest.raises(PyargsError, match="all-linear"):
        lora.add(decoder, rank=2, alpha=4, rslora=True, target_modules=["all-linear", "q_proj"])


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_folder_with_another_head_is_no_language_model(head, tmp_path):
    import transformers

    folder = synthetic.tiny_lm(tmp_path / "lm", tie=True)
    lm, tokenizer = load_lm(str(folder))
    other = getattr(transformers, f"AutoModelFor{head}").from_config(lm.config)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(PyargsError, match=f"LlamaFor{head}, whose head would be dropped"):
        load_lm(str(tmp_path / "other"))
    lm.get_decoder().save_pretrained(tmp_path / "base")  # a decoder by itself loses nothing: its output layer is tied
    tokenizer.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["architectures"] == ["LlamaModel"]
    load_lm(str(tmp_path / "base"))


def test_training_ends_with_an_accuracy_or_says_why_there_is_none(tmp_path, capsys):
    folder, rows = str(synthetic.tiny_lm(tmp_path / "lm")), synthetic.load(users=2, pairs=20, new_users=1, support=2, query=2)
    of_split(rows, "train", "train_test").to_json(tmp_path / "pairs.jsonl")
    for name, more in (("lore", ["--freeze-backbone"]), ("icl", [])):
        words = ["--backbone", folder, "--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / name), *more]
        assert cli.main(["train", name, *words]) == 0
        found = json.loads(capsys.readouterr().out)["held_out"]
        if name == "icl":
            assert "after `pyargs adapt`" in found
            continue
        held, model = of_split(rows, "train_test"), load_model(tmp_path / name)
        chosen, rejected = model.pair_scores(held)[1].unbind(1)
        right = 100 * (chosen > rejected).float().mean().item()
        assert found == {"split": "train_test", "pairs": len(held), "accuracy": pytest.approx(right, abs=0.06)}
        assert len(held) > 4 and "nothing tells how well" in held_out(model, of_split(rows, "train"))
        assert held_out(model, held, most=3)["pairs"] <= 3
