"""LoRA in decoders of many families: what it is put into, and when two decoders are the same but for it."""

from __future__ import annotations

import peft
import pytest
import torch
from changed import FEW, decoded, pair, parts
from decoding import USERS, by_reference, prompts, same, shared_pair
from torch import nn

from pyargs.errors import PyargsError
from pyargs.lm import lora

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


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_dropout_in_training_mode_is_of_its_own_side(family):
    policy, model = pair(family)
    for decoder in (policy.get_decoder(), model.backbone):
        parts(decoder)[0].dropout = nn.Dropout(0.5).eval()
    assert lora.same_weights(policy.get_decoder(), model.backbone)
    policy.train()
    assert not lora.same_weights(policy.get_decoder(), model.backbone)


def test_lora_that_peft_put_into_a_backbone_is_lora():
    """Without the mark that `lora.add` leaves, one pass would run the policy with it."""
    policy, model = pair()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model.backbone)
    del model.backbone.peft_config
    assert lora.active(model.backbone)
    same(decoded(policy, model), by_reference(policy, model, prompts([3, 5]), USERS[:2], **FEW))


def test_lora_with_a_hook_is_not_merged():
    _, model = shared_pair("shared lora", "linear", 0)
    model = model.float()
    hooked = model.backbone.layers[0].self_attn.q_proj
    hooked.lora_A["default"].register_forward_hook(lambda module, args, out: out * 3.0)
    ids = torch.tensor([[3, 4, 5]])
    before = model.backbone(ids).last_hidden_state
    model.merge()
    assert [layer.merged for layer in lora.layers_of(model.backbone)].count(False) == 1 and not hooked.merged
    torch.testing.assert_close(model.backbone(ids).last_hidden_state, before, atol=1e-5, rtol=1e-5)


class Pair(nn.Module):
    """Two layers that read the same tensor, which may be written to meanwhile."""

    def __init__(self, writes: bool):
        super().__init__()
        self.one, self.two, self.writes = nn.Linear(5, 7), nn.Linear(5, 7), writes

    def forward(self, x):
        first = self.one(x)
        return first + self.two(x.add_(1.0) if self.writes else x)


@torch.no_grad()
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_every_second_row_reads_its_input_as_it_is_at_each_call(dtype, writes):
    pair = Pair(writes).to(dtype)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False), pair)
    for _ in range(2):
        x = torch.randn(4, 3, 5, dtype=dtype)
        with_lora = pair(x.clone())
        with lora.disabled(pair):
            without = pair(x.clone())
        with lora.on_second(pair):
            torch.testing.assert_close(pair(x), torch.stack([without, with_lora], 1).flatten(0, 1)[[0, 3, 4, 7]])
