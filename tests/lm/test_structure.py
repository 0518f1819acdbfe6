"""Whether a fast path may stand in for a model: hooks, other arithmetic, wrappers, PYARGS_BACKEND."""

from __future__ import annotations

import functools
import warnings

import peft
import pytest
import torch
from changed import FEW, decoded, fast, pair
from conftest import tiny_lm
from decoding import USERS, chosen, engine_of, prompts, same, steps_of, tokens, without_cache
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama

from pyargs.decode.backends import eager
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.lm.stack import pack
from pyargs.lm.stack import run as stacks
from pyargs.lm.structure import Watch, as_written, may_replace, structure
from pyargs.models.reward_model import RewardModel
from pyargs.scoring import response_logprobs, response_states


def test_a_hook_that_is_removed_leaves_the_fast_path():
    policy, model = pair()
    before = decoded(policy, model)
    handle = policy.model.layers[1].register_forward_hook(lambda module, args, out: out * 2.0)
    assert not fast(policy, model) and not may_replace(policy)
    with pytest.raises(PyargsError, match="module 'model.layers.1' has a hook"):
        pack.pack(policy)
    handle.remove()
    same(decoded(policy, model), before)
    assert fast(policy, model)


def test_hooks_of_transformers_itself_change_nothing():
    policy, model = pair()
    assert len(policy(torch.tensor([[3, 4]]), output_hidden_states=True, output_attentions=True).hidden_states) == 3
    policy.enable_input_require_grads()
    assert policy.model.embed_tokens._forward_hooks and policy.model.layers[0]._forward_hooks
    assert fast(policy, model)


def test_other_arithmetic_all_around():
    policy, _ = pair()
    assert may_replace(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not may_replace(policy)
    with FlopCounterMode(display=False):
        assert not may_replace(policy)
    with torch.device("cpu"):
        assert may_replace(policy)
    for name in ("scaled_dot_product_attention", "silu"):
        with pytest.MonkeyPatch.context() as here:
            here.setattr(nn.functional, name, lambda *a, **b: None)
            assert not may_replace(policy)
    assert may_replace(policy)


def test_eager_is_plain_everywhere(monkeypatch):
    policy, model = pair()
    want = decoded(policy, model)
    monkeypatch.setattr(stacks.Stack, "__call__", None)
    monkeypatch.setattr(eager, "Shared", None)
    monkeypatch.setenv("PYARGS_BACKEND", "eager")
    same(decoded(policy, model), want)
    assert engine_of(policy, model, backend="cpu").backend == "eager"
    response_logprobs(policy, [([5], [[6]])])
    response_states(policy.get_decoder(), [([5], [[6]])])
    chosen(policy, None, [[5]], max_new_tokens=2)
    monkeypatch.setenv("PYARGS_BACKEND", "cuda")
    for call in (lambda: decoded(policy, model), lambda: response_logprobs(policy, [([5], [[6]])])):
        with pytest.raises(PyargsError, match="PYARGS_BACKEND is auto, cpu, cuda-graph, eager, not 'cuda'"):
            call()


def test_a_compiled_policy_decodes_without_a_warning():
    policy, model = pair()
    want = decoded(policy, model)
    compiled = torch.compile(policy, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = steps_of(Engine(compiled, model), prompts([3, 5]), USERS[:2], **FEW)
    same(got, want)
    model.backbone = torch.compile(model.backbone, backend="eager")
    same(decoded(compiled, model), want)
    compiled.register_forward_hook(lambda *a: None)
    with pytest.raises(PyargsError, match="hook on a OptimizedModule"):
        decoded(compiled, model)


def peft_model(lm, config=None):
    wrapped = peft.get_peft_model(lm, config or peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    return wrapped


def test_a_policy_of_peft():
    policy, model = pair()
    before = decoded(policy, model)
    wrapped = peft_model(policy)
    got = decoded(wrapped, model)
    for one, prompt, user in zip(got, prompts([3, 5]), USERS, strict=False):
        assert one.tokens == without_cache(wrapped, model, prompt, user, 2.0, 3, 4, eos=())[0]
    assert tokens(got) != tokens(before)
    guiding = RewardModel(peft_model(model.backbone), None, model.head)  # which puts LoRA into the backbone itself
    same(decoded(policy, guiding), decoded(policy, model))
    groups = [([5, 6], [[7, 8]])]
    torch.testing.assert_close(response_logprobs(wrapped, groups), response_logprobs(policy, groups))
    wrapped.base_model.register_forward_hook(lambda *a: None)
    with pytest.raises(PyargsError, match="hook on a PeftModel"):
        decoded(wrapped, model)


def test_virtual_tokens_of_peft_are_refused():
    policy, model = pair()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(PyargsError, match="PROMPT_TUNING acts outside the model's layers"):
        decoded(peft_model(policy, config), model)


class Callable:
    def __call__(self, q, k, *args, **kwargs):
        return q, k


def test_what_hides_functions_and_parts_is_seen(monkeypatch):
    policy = tiny_lm()
    mlp = policy.model.layers[0].mlp
    for place, name, value in (
        (modeling_llama, "apply_rotary_pos_emb", Callable()),
        (type(mlp), "down_proj", property(lambda self: torch.tanh)),
        (nn.Module, "__getattr__", lambda self, name: None),
        (mlp, "_compiled_call_impl", lambda x: x),
    ):
        assert as_written(policy)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value, raising=False)
            assert not as_written(policy), name
    del mlp.act_fn
    mlp.act_fn = Callable()
    assert not as_written(policy)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_function_is_whose_what_it_was_made_of_is(monkeypatch):
    """transformers 5.17 has some in GPTBigCode's file, 5.24 has none."""
    policy = tiny_lm()
    ours = [torch.jit.script(modeling_llama.rotate_half), functools.cache(torch.jit.script(modeling_llama.rotate_half))]
    others = [
        torch.jit.script(twice),
        functools.cache(torch.jit.script(twice)),
        torch.jit.trace(modeling_llama.rotate_half, torch.ones(2, 2)),  # right for this shape
    ]
    for function in ours + others:
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "rotate_half", function)
            assert as_written(policy) == any(function is one for one in ours)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", [functools.cache, torch.jit.script])
def test_functions_are_told_apart_by_what_they_were_made_of(made):
    policy = tiny_lm()
    mlp = policy.model.layers[0].mlp
    del mlp.act_fn
    found = []
    for function in (nn.functional.relu, nn.functional.selu, nn.functional.relu):
        mlp.act_fn = made(function)
        found.append(structure(policy))
    assert found[0] == found[2] != found[1]
    mlp.act_fn = made(twice)
    assert not as_written(policy)


@pytest.mark.parametrize("extension", [True, False])
def test_a_watch_sees_what_changed_and_nothing_else(extension, monkeypatch):
    if not extension:
        monkeypatch.setattr("pyargs.lm.structure.has_extension", False)
    model = tiny_lm()
    kept = model.model.layers[0].register_forward_hook(lambda *_: None)
    lacking = model.model.layers[0].mlp.act_fn
    watch = Watch(model)
    model(torch.ones(1, 3, dtype=torch.long))
    assert not watch.changed()

    def undone(do, undo) -> None:
        do()
        assert watch.changed() and watch.changed(), "seen once, and again"
        undo()
        assert not watch.changed()

    up = model.model.layers[1].mlp.up_proj
    weight, other = up.weight, torch.nn.Parameter(up.weight.detach().clone())
    undone(lambda: setattr(up, "weight", other), lambda: setattr(up, "weight", weight))
    undone(lambda: setattr(up, "forward", lambda x: x), lambda: delattr(up, "forward"))
    undone(lambda: up.train(), lambda: up.eval())
    undone(lambda: lacking.add_module("more", up), lambda: delattr(lacking, "more"))
    hooks, hook = model.model.layers[0]._forward_hooks, kept.id
    first = hooks[hook]
    undone(lambda: hooks.__setitem__(hook, lambda *_: None), lambda: hooks.__setitem__(hook, first))
    undone(lambda: up.register_forward_pre_hook(lambda *_: None), lambda: up._forward_pre_hooks.clear())
    with torch.no_grad():
        weight += 1
    assert watch.changed()
