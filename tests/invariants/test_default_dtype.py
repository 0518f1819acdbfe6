"""torch's default dtype and device are the caller's: under any, what pyargs computes is the same, bit by bit."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import planted
import pytest
import torch
from conftest import tiny_lm
from every_head import HEADS, NAMES
from every_head import decoded as on_the_stack
from every_head import models as company

from pyargs import scoring
from pyargs.decode.engine import Engine
from pyargs.lm import lora
from pyargs.lm.stack import pack
from pyargs.ops.library import has_extension
from pyargs.training import hooks, trainer

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
ROWS = [[3, 9, 4], [5, 8, 8, 2, 30, 11], [7]]
GROUPS = [([3, 4, 5], [[7, 8, 9], [10, 11]]), ([3, 4, 20], [[12, 13, 2, 2]]), ([20, 21], [[12, 13]])]
PATHS = ["native", "transformers"] if has_extension else ["transformers"]


@pytest.fixture(params=DTYPES, ids=str)
def default(request):
    """Calls a function under another default dtype."""

    def call(function):
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return call


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setenv("PYARGS_BACKEND", "eager")
    return request.param


def same(ours, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, dict):
        same(list(ours.values()), list(theirs.values()))
    else:
        assert ours == theirs


def guided(head: str = "mlp", **more):
    wish = dict(
        reward_weight=[2.0, 0.1, 1.3], num_candidates=7, max_new_tokens=5, stop=[3, 5], temperature=0.8, seed=[1, 2, 3]
    )  # fmt: skip
    return Engine(*company(head)).generate(ROWS, NAMES, **(wish | more))


@pytest.mark.parametrize("head", HEADS)
def test_guided_answers(default, path, head):
    company(head)  # made under float32
    for more in ({}, {"seed": 3}, {"temperature": 0.0}, {"top_p": 0.7, "min_p": 0.1}):
        assert default(lambda more=more: guided(head, **more)) == guided(head, **more)


def test_states_log_probs_and_scores(default, path):
    policy, model = company("distance")

    def everything():
        states = scoring.response_states(model.backbone, GROUPS)
        logprobs = scoring.response_logprobs(policy, GROUPS)
        return states, logprobs, model.score(GROUPS, NAMES)

    same(default(everything), everything())


@functools.cache
def with_adapter():
    policy = tiny_lm(dtype=torch.float32, layers=1)
    adapter = copy.deepcopy(policy.get_decoder())
    lora.add(adapter, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "up_proj"])
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return policy, adapter


def everything_of_a_stack():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        stack = pack.pack(*with_adapter(), dtype=dtype)
        cache = stack.cache(2, 30)
        found.append(stack([[3, 4], [5, 6]], cache, [[0, 1], [1, 1]], delta=[True, False]))
        found.append(stack([[3, 4], [5, 6]], cache, branches=True, delta=True, rows=[1, 0]))
        stack.commit(cache, [1, -1], [0, 1])
        found += [stack.logits(found[-1][0], top=3), torch.tensor(cache.length, device="cpu")]
    return found


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_a_stack(default):
    with_adapter()  # made under float32
    same(default(everything_of_a_stack), everything_of_a_stack())


def test_best_of_n(default):
    policy, model = company("mlp")
    answers = lambda: Engine(policy, model, best_of=3).generate(ROWS, NAMES, max_new_tokens=4, seed=0)  # noqa: E731
    assert default(answers) == answers()


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_greedy_answers(default):
    policy, _ = company("linear")
    answer = lambda: Engine(policy, backend="cpu").generate(ROWS, max_new_tokens=6, stop=[3], seed=0)  # noqa: E731
    assert default(answer) == answer()


def test_heads_are_float32(default):
    for make in HEADS.values():
        state = default(make).state_dict()
        assert {value.dtype for name, value in state.items() if "users." not in name} == {torch.float32}


@pytest.mark.parametrize("method", ["lore", "mpu", "pal", "pref", "global_rm", "vpl"])
def test_training_and_adapting(default, method):
    recipe = hooks.method(method)
    data = planted.pairs("mixtures")

    def everything():
        torch.manual_seed(0)
        fields = {"variant": "A"} if method == "pal" else {}
        config = recipe.Config(epochs=0.05, freeze_backbone=True, **fields)
        model = recipe.build(planted.Backbone(), None, list(dict.fromkeys(data.train.users)), config)
        if hasattr(recipe, "start"):
            recipe.start(model, data.train, config)
        trainer.train_head(recipe, model, data.train, config)
        found = dict(model.head.state_dict())
        if recipe.adapt:
            user = data.support.users[0]
            own = torch.tensor([one == user for one in data.support.users]).nonzero().flatten()
            few = replace(config, adapt_steps=3) if hasattr(config, "adapt_steps") else config
            found |= recipe.adapt(model, data.support.select(own), [user], few)
        return found

    ours, theirs = default(everything), everything()
    assert {value.dtype for value in ours.values()} == {torch.float32}
    for name, value in theirs.items():  # what is drawn is drawn in float32
        same(ours[name], value)


@pytest.mark.skipif(not has_extension, reason="no extension")
def test_under_another_default_device():
    """meta stands for any: it holds no numbers, so that whatever lands there by accident is an error."""
    right = guided("mlp"), on_the_stack("linear", ROWS, NAMES, 5), scoring.response_states(company("linear")[0].model, GROUPS)
    torch.set_default_device("meta")
    try:
        assert on_the_stack("linear", ROWS, NAMES, 5) == right[1] and guided("mlp") == right[0]
        same(scoring.response_states(company("linear")[0].model, GROUPS), right[2])
    finally:
        torch.set_default_device(None)
