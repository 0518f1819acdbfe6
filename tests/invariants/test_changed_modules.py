"""The model that is given answers: hooks, replaced parts and changed weights are never passed by."""

from __future__ import annotations

import types

import pytest
import torch
from changed import FEW, decoded, fast, pair, parts
from decoding import USERS, by_reference, chosen, engine_of, prompts, same, tokens, without_cache
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from pyargs.decode.backends import eager
from pyargs.errors import PyargsError
from pyargs.metrics.perplexity import perplexity
from pyargs.scoring import response_logprobs, response_states


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 2.0


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def hook(decoder, patch):
    parts(decoder)[1].register_forward_hook(lambda module, args, out: out * 2.0)


def pre_hook(decoder, patch):
    parts(decoder)[1].register_forward_pre_hook(lambda module, args: (args[0] * 2.0, *args[1:]))


def own_forward(decoder, patch):
    mlp = parts(decoder)[1]
    real = mlp.forward
    mlp.forward = lambda *args: real(*args) * 2.0


def wrapped_method(decoder, patch):
    mlp = parts(decoder)[1]
    mlp.forward = types.MethodType(lambda self, *args: type(self).forward(self, *args) * 2.0, mlp)


def submodule(decoder, patch):
    layer, mlp, _ = parts(decoder)
    layer.mlp = Doubled(mlp)


def subclass(decoder, patch):
    mlp = parts(decoder)[1]
    mlp.__class__ = type(
        type(mlp).__name__, (type(mlp),), {"forward": lambda self, x: type(mlp).__base__.forward(self, x) * 2}
    )
    mlp.__class__.forward = lambda self, *args: super(mlp.__class__, self).forward(*args) * 2.0


def parametrization(decoder, patch):
    parametrize.register_parametrization(parts(decoder)[2], "weight", Negated())


def spectral(decoder, patch):
    parametrizations.spectral_norm(parts(decoder)[2])


def activation(decoder, patch):
    mlp = parts(decoder)[1]
    setattr(mlp, "act" if hasattr(mlp, "act") else "act_fn", nn.Tanh())


def max_norm(decoder, patch):
    decoder.get_input_embeddings().max_norm = 0.3


def scaling(decoder, patch):
    layer = parts(decoder)[0]
    (layer.attn if hasattr(layer, "attn") else layer.self_attn).scaling = 3.0


def inner_hook(decoder, patch):
    parts(decoder)[2].register_forward_hook(lambda module, args, out: -out)


def of_class(decoder, patch):
    kind = type(parts(decoder)[1])
    real = kind.forward
    patch.setattr(kind, "forward", lambda self, *args: real(self, *args) * 2.0)


def everywhere(decoder, patch):
    mlp = parts(decoder)[1]
    nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2.0 if module is mlp else None)


INSIDE = (
    hook, pre_hook, own_forward, wrapped_method, submodule, subclass, parametrization, spectral, activation,
    max_norm, scaling, inner_hook, of_class, everywhere,
)  # fmt: skip


def epsilon(lm, patch):
    """Together with the config, after the first call."""
    lm.config.rms_norm_eps = 0.5
    for module in lm.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def head_hook(lm, patch):
    lm.lm_head.register_forward_hook(lambda module, args, out: -out)


def head_forward(lm, patch):
    real = lm.lm_head.forward
    lm.lm_head.forward = lambda x: -real(x)


def head_class(lm, patch):
    lm.lm_head = Doubled(lm.lm_head)
    lm.lm_head.weight = lm.lm_head.inner.weight


def whole_hook(lm, patch):
    def negate(module, args, out):
        out.logits = -out.logits
        return out

    lm.register_forward_hook(negate)


def whole_forward(lm, patch):
    real = lm.forward

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        out.logits = -out.logits
        return out

    lm.forward = forward


def rotary(lm, patch):
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *more, **others: (q, k))


def rope(lm, patch):
    lm.model.rotary_emb.attention_scaling = 2.0


def attention(lm, patch):
    def forward(module, query, key, value, mask, **more):
        return value.new_zeros(query.shape).transpose(1, 2).contiguous(), None

    patch.setitem(AttentionInterface._global_mapping, "sdpa", forward)


def layers(lm, patch):
    lm.config.num_hidden_layers = 1


def frequencies(lm, patch):
    lm.model.rotary_emb.inv_freq = lm.model.rotary_emb.inv_freq * 0.1


OUTSIDE = (
    epsilon,
    head_hook,
    head_forward,
    head_class,
    whole_hook,
    whole_forward,
    rotary,
    rope,
    attention,
    layers,
    frequencies,
)


def follows_the_definition(policy, model, before):
    """Decoding, answers of the policy alone, states and log-probs are those of the modules called one after the other."""
    rows, weight = prompts([3, 5]), 2.0
    got = chosen(policy, model, rows, USERS[:2], reward_weight=weight, num_candidates=3, max_new_tokens=4, stop=[])
    for one, prompt, user in zip(got, rows, USERS, strict=False):
        want, rewards = without_cache(policy, model, prompt, user, weight, 3, 4, eos=())
        assert one.tokens == want
        torch.testing.assert_close(torch.tensor(one.rewards), torch.tensor(rewards), atol=1e-4, rtol=1e-4)
    group, states, values = (rows[0], rows), [], []
    for response in rows:
        ids = torch.tensor([rows[0] + response])
        states.append(policy.get_decoder()(ids).last_hidden_state[0, 3:].float())
        logits = policy(ids).logits[0, 2:-1].float()
        values.append(logits.log_softmax(-1).gather(-1, ids[0, 3:, None]).squeeze(-1))
    torch.testing.assert_close(response_states(policy.get_decoder(), [group])[0], states, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(response_logprobs(policy, [group])[0], values, atol=2e-4, rtol=2e-4)
    assert perplexity(policy, [rows[0]], [rows[1]]) == pytest.approx(values[1].double().mean().neg().exp().item(), rel=1e-3)
    text = list(rows[0])
    for _ in range(4):
        text.append(policy(torch.tensor([text])).logits[0, -1].argmax().item())
    assert tokens(chosen(policy, None, [rows[0]], max_new_tokens=4, stop=[])) == [text[3:]]
    now = [torch.tensor([one.rewards for one in got]), *states, *values]
    if before is not None:
        assert not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(now, before, strict=True))
    return now


@pytest.fixture
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    nn.modules.module._global_forward_hooks.clear()


@torch.no_grad()
@pytest.mark.parametrize("change", INSIDE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("side", ["policy", "reward"])
def test_what_is_changed_within_a_model_counts(change, side, patch):
    policy, model = pair()
    before = follows_the_definition(policy, model, None)
    change(policy.get_decoder() if side == "policy" else model.backbone, patch)
    follows_the_definition(policy, model, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("change", [hook, wrapped_method, subclass, activation], ids=lambda change: change.__name__)
def test_in_every_family(family, change, patch):
    for side in ("policy", "reward"):
        policy, model = pair(family)
        assert eager.shares(policy, model.backbone, 1, 3)
        change(policy.get_decoder() if side == "policy" else model.backbone, patch)
        assert not eager.shares(policy, model.backbone, 1, 3)
        follows_the_definition(policy, model, None)


@torch.no_grad()
@pytest.mark.parametrize("change", OUTSIDE, ids=lambda change: change.__name__)
def test_what_is_changed_around_a_decoder_counts(change, patch):
    policy, model = pair()
    before = follows_the_definition(policy, model, None)
    change(policy, patch)
    follows_the_definition(policy, model, before)


def last_position(decoder, patch):
    def add(module, args, out):
        out = out.clone()
        out[:, -1] += 3.0
        return out

    parts(decoder)[1].register_forward_hook(add)


@pytest.mark.parametrize("side", ["policy", "reward"])
def test_a_hook_sees_a_candidate_as_the_last_token(side, patch):
    policy, model = pair()
    last_position(policy.get_decoder() if side == "policy" else model.backbone, patch)
    same(decoded(policy, model), by_reference(policy, model, prompts([3, 5]), USERS[:2], **FEW))


def test_dropout_in_training_mode_is_refused():
    policy, model = pair()
    policy.train()
    assert fast(policy, model)  # none of it has dropout
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(PyargsError, match=r"eval\(\)"):
        engine_of(policy)
    policy.eval()
    assert engine_of(policy).backend == "cpu"


def test_a_head_with_a_hook_is_called():
    policy, model = pair()
    before = decoded(policy, model)
    model.head.register_forward_hook(lambda module, args, out: out * -3.0)
    got = decoded(policy, model)
    same(got, by_reference(policy, model, prompts([3, 5]), USERS[:2], **FEW))
    assert got[0].rewards != pytest.approx(before[0].rewards)
