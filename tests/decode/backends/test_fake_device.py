"""The captured step on fake tensors of a GPU (tests/fake_device.py): it does nothing forbidden, and has few operators."""

from __future__ import annotations

import contextlib
from pathlib import Path

import fake_device
import pytest
import torch
from conftest import FULL_ATTENTION
from every_head import HEADS
from fake_device import (
    GPU,
    TOKENWISE,
    WAYS,
    WEIGHTS,
    Forbidden,
    beside_layers,
    beside_tokenwise,
    counted,
    of_layer,
    operators,
    steps_of,
    tokenwise,
)

from pyargs.decode.backends import cuda_graph
from pyargs.decode.backends.capture import NoHostReads
from pyargs.errors import PyargsError

# The most operators, views not counted: what `python tests/fake_device.py` printed on the day it was last lowered, the same
# with transformers 5.16.1 and 5.24.0. A change that needs more has to say here why.
LAYER = {"own": 40, "shared": 20, "shared lora": 27}
BESIDE = {"own": 18, "shared": 14, "shared lora": 16}  # however a token is chosen
TOKEN_REWARD = {"k = 5": (16, 16, 16, 16), "all": (80, 106, 96, 122), "both": (132, 160, 148, 176)}
HEAD = {
    "linear": 0,
    "mlp": 2,
    "mlp of users": 9,
    "user_mlp": 0,
    "distance": 12,
    "distance to the input": 12,
    "latent": 5,
}


@pytest.fixture(autouse=True, scope="module")
def patch():
    with fake_device.fake_gpu() as patch:
        yield patch


@pytest.mark.parametrize("weights", WEIGHTS)
def test_operators_of_a_layer(weights):
    assert 0 < of_layer(weights) <= LAYER[weights]


def test_clipped_rewards_are_captured():
    """They are computed, clipped and chosen among in operators of their own, and nothing waits for the device."""
    assert operators(steps_of("shared", wish=dict(reward_clip=0.5))) > counted("shared")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_operators_beside_the_layers(weights, way):
    assert 0 < beside_layers(weights, way) <= BESIDE[weights]


@pytest.mark.parametrize("head", HEADS)
def test_operators_of_each_head(head):
    assert 0 < beside_layers("shared", head=head) <= BESIDE["shared"] + HEAD[head]


def test_the_document_names_the_bounds():
    text = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    for weights in WEIGHTS:
        row = weights, LAYER[weights], *(BESIDE[weights] for _ in WAYS)
        assert f"| {' | '.join(map(str, row))} |" in text
    for candidates in TOKENWISE:
        assert f"| {' | '.join(map(str, (candidates, *TOKEN_REWARD[candidates])))} |" in text
    assert f"| {' | '.join(str(BESIDE['shared'] + HEAD[head]) for head in HEADS)} |" in text


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_families_do_nothing_that_is_forbidden(family):
    assert operators(steps_of(family=family)) > 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_attention_takes_lengths_in_the_place_of_a_mask(weights):
    count = steps_of(weights)._record(4).replay().count
    assert count["pyargs::branch_attention"] == 2 * (2 if weights == "own" else 1)  # layers, passes
    assert not {"scaled_dot_product_attention", "lt", "bitwise_or", "full"} & count.keys()


def test_means_over_the_answer_and_rewards_of_stop_tokens():
    assert operators(steps_of("shared", eos_reward="state")) == counted("shared")
    assert operators(steps_of("shared", pool="mean", step_reward="prefix_mean")) == counted("shared")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("candidates", TOKENWISE)
def test_operators_of_a_step_that_a_token_reward_guides(candidates, way):
    assert 0 < beside_tokenwise(way, candidates) <= TOKEN_REWARD[candidates][list(WAYS).index(way)]


def test_without_fewer_launches_a_layer_is_beyond_its_bound(monkeypatch):
    monkeypatch.setattr(cuda_graph, "few_launches", lambda *decoders, places: contextlib.nullcontext())
    few, more = (operators(steps_of("shared", layers=layers)) for layers in (2, 3))
    assert more - few > LAYER["shared"] + 8


ON_CPU, NUMBER = torch.zeros(3), torch.zeros(())
FAULTS = {
    "a number": ("read by the host", lambda logits: logits.sum().item()),
    "a condition": ("read by the host", lambda logits: bool((logits > 0).all())),
    "places that are not 0": ("read by the host", lambda logits: logits.nonzero()),
    "a mask as index": ("read by the host", lambda logits: logits[logits > 0]),
    "a mask that is written to": ("read by the host", lambda logits: logits.index_put_((logits > 0,), logits[0])),
    "as many copies as a tensor says": ("read by the host", lambda logits: logits.repeat_interleave(logits[:, 0].long(), 0)),
    "a tensor on the CPU": ("to the CPU", lambda logits: torch.zeros(3)),
    "a copy to the host": ("to the CPU", lambda logits: logits.cpu()),
    "numbers of Python": ("from the CPU", lambda logits: torch.tensor([1.0, 2.0], device=GPU)),
    "a copy to the GPU": ("from the CPU", lambda logits: ON_CPU.to(GPU)),
    "a copy into memory of the GPU": ("from the CPU", lambda logits: logits[0, :3].copy_(ON_CPU)),
    "a number on the CPU": ("from the CPU", lambda logits: logits + NUMBER),
}
"""What is planted into a step, and what the check calls it."""
TAKEN = "a tensor on the CPU", "a number on the CPU"
"""Those that a capture would take: their values stay what they were."""


@pytest.fixture(scope="module")
def steps():
    return steps_of("shared")


def plant(monkeypatch, fault) -> None:
    choose = cuda_graph.Guided.choose
    monkeypatch.setattr(cuda_graph.Guided, "choose", lambda self: (fault(self._kept()[0]), choose(self))[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, steps, monkeypatch):
    called, planted = FAULTS[fault]
    plant(monkeypatch, planted)
    with pytest.raises(Forbidden, match=called):
        operators(steps)


def trial(step, device) -> None:
    """What `capture` does before it captures, but for the first step of all."""
    with NoHostReads(device.type):
        step()


@pytest.mark.parametrize("fault", [one for one in FAULTS if one not in TAKEN])
def test_the_trial_before_a_capture_refuses_a_planted_fault(fault, steps, monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", trial)
    plant(monkeypatch, FAULTS[fault][1])
    with pytest.raises(cuda_graph.Refused, match="makes the host wait"):
        steps._record(4)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_trial_before_a_capture_takes_a_step(weights, monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", trial)
    steps_of(weights, "sampled, filtered", "distance")._record(4)


@pytest.mark.parametrize("candidates", TOKENWISE)
def test_the_trial_before_a_capture_takes_a_step_that_a_token_reward_guides(candidates, monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", trial)
    tokenwise("sampled, filtered", candidates)._record(4)


def test_a_planted_operator_is_counted(steps, monkeypatch):
    plant(monkeypatch, lambda logits: (logits.unsqueeze(0), logits + 1))  # a view is none
    assert operators(steps) == counted("shared") + 1


def test_what_is_not_captured_is_refused_by_name():
    lm = fake_device.fake_lm("qwen2", 1)
    assert "a reward guides" in cuda_graph.refusal(None, lm, lm)
    from pyargs.heads import cosine
    from pyargs.types import Users

    with pytest.raises(PyargsError, match="guides no decoder"):
        cosine.Head(32, 8, 2, Users(["ann"], mixture=torch.zeros(1, 2))).fold(torch.zeros(1, dtype=torch.long))
