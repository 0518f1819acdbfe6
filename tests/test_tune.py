"""The choice of the weight: the grid goes on while its largest weight is the best, and options reach the decoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import reward_model, tiny_lm
from datasets import Dataset

from pyargs import tune as module
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.models.token_reward import TokenReward
from pyargs.tune import BEYOND, STEP, Tuning, engine_for, tune


@pytest.fixture
def made_up(monkeypatch):
    """Tunes on made-up measurements: accuracy and perplexity by the weight in units of 1 / reward_std, which is 2."""

    def run(accuracy, perplexity, **fields) -> tuple[dict, list[dict]]:
        asked = []

        def generate(prompts, users, *, reward_weight, **more):
            asked.append({"weight": reward_weight, **more})
            return [SimpleNamespace(prompt=[1, 2], tokens=[reward_weight], text="x", spreads=[2.0] * 3)]

        own = lambda tokens: perplexity(round(2 * tokens[0][0], 6))  # noqa: E731
        monkeypatch.setattr(module, "pair_scores", lambda *_: SimpleNamespace(mean_step_reward=lambda: 0.0))
        monkeypatch.setattr(
            module, "policy_accuracy", lambda _, weight, centre: {"paper": {"accuracy": accuracy(round(2 * weight, 6))}}
        )
        monkeypatch.setattr(module, "perplexity", lambda policy, prompts, tokens: own(tokens))
        monkeypatch.setattr(module, "perplexities", lambda policy, prompts, several: [own(tokens) for tokens in several])
        monkeypatch.setattr(module, "rouge", lambda texts, references: {"rouge1": 50.0})
        rows = Dataset.from_list([{"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}])
        pair = SimpleNamespace(policy=None, model=SimpleNamespace(about={}, pair_scores=None))
        return tune(SimpleNamespace(pair=pair, generate=generate, backend="cpu"), rows, Tuning(**fields)), asked

    return run


@pytest.mark.parametrize("objective", ["policy_accuracy", "harmonic"])
def test_the_grid_goes_on_until_the_best_weight_is_inside(objective, made_up):
    peak = lambda weight: 90 - abs(weight - 9.5) if weight else 1.0  # noqa: E731
    found, _ = made_up(peak, lambda _: 1.2, objective=objective, grid=[0.0, 0.5, 1.0])
    assert [point["relative"] for point in found["grid"]] == [0, 0.5, 1, 3, 9, 27]
    assert found["relative"] == 9 and found["reward_weight"] == 4.5
    inside, asked = made_up(lambda weight: -abs(weight - 0.5), lambda _: 1.2, objective=objective, grid=[0.0, 0.5, 1.0])
    assert len(inside["grid"]) == 3 and len(asked) == (1 if objective == "policy_accuracy" else 3), "nothing more is written"


@pytest.mark.parametrize("objective", ["policy_accuracy", "harmonic", "fluency"])
def test_weights_beyond_the_grid_end_where_the_text_breaks(objective, made_up):
    found, _ = made_up(lambda weight: weight, lambda weight: 1.0 if weight < 5 else 1.6, objective=objective, grid=[0.0, 1.0])
    assert [point["relative"] for point in found["grid"]] == [0, 1, 3, 9]
    assert found["relative"] == 3 and found["reward_weight"] == 1.5, "the better weight writes broken text"
    assert found["grid"][-1]["perplexity"] == 1.6
    broken, asked = made_up(lambda weight: weight, lambda weight: 1 + weight, objective="policy_accuracy", grid=[0.0, 1.0])
    assert [point["relative"] for point in broken["grid"]] == [0, 1] and [one["weight"] for one in asked] == [0, 0.5]


@pytest.mark.parametrize("breaks", [2, 5, 14, 40, 122, 365, 2000])
@pytest.mark.parametrize("objective", ["policy_accuracy", "harmonic"])
def test_no_weight_beyond_the_grid_is_chosen_whose_text_breaks(objective, breaks, made_up):
    """One that was asked for may be: the bound is about those that are tried besides."""
    text = lambda weight: 1.5 if weight < breaks else 1.500001  # noqa: E731
    found, _ = made_up(lambda weight: (weight + 1) ** 3, lambda w: text(w) if w else 1.0, objective=objective, grid=[0.0, 1.0])
    tried = [point["relative"] for point in found["grid"]]
    assert found["relative"] == max(weight for weight in tried if weight < breaks)
    assert len([weight for weight in tried if weight >= breaks]) <= 1, "the search ends there"
    asked, _ = made_up(lambda weight: weight, lambda w: 1.6 if w else 1.0, objective=objective, grid=[0.0, 50.0, 60.0])
    assert asked["relative"] == 60 and len(asked["grid"]) == 3


def test_fluency_chooses_no_weight_that_breaks_its_bound(made_up):
    for perplexity, fields in (
        (lambda w: 1 + w, {"grid": [1.0, 3.0]}),
        (lambda w: 1.0, {"grid": [0.0], "max_perplexity": 0.9}),
    ):
        with pytest.raises(PyargsError, match="no weight of the grid keeps perplexity within"):
            made_up(lambda weight: 50.0, perplexity, objective="fluency", **fields)


def test_weights_beyond_the_grid_are_not_tried_for_ever(made_up):
    found, _ = made_up(lambda weight: weight, lambda _: 1.0, grid=[0.0, 1.0])
    assert [point["relative"] for point in found["grid"]] == [0, *(STEP**n for n in range(BEYOND + 1))]
    alone, _ = made_up(lambda _: 50.0, lambda _: 1.0, grid=[0.0])
    assert len(alone["grid"]) == 1, "zero times anything is zero"


def test_what_is_tuned_is_what_the_settings_say():
    lm = tiny_lm(dtype=torch.float32)
    for eos_reward in (None, "state"):
        config = Tuning(eos_reward=eos_reward, batch_size=3, backend="eager")
        engine = engine_for(lm, reward_model(lm), config)
        assert (engine.eos_reward, engine.max_rows, engine.backend) == (eos_reward or "before", 3, "eager")


def test_options_that_no_decoder_of_the_model_has_are_refused():
    lm = tiny_lm(dtype=torch.float32)
    for model, more in ((TokenReward(tiny_lm(seed=3, dtype=torch.float32), None), {}), (reward_model(lm), {"best_of": 2})):
        with pytest.raises(PyargsError, match="eos_reward is about the head of a RewardModel"):
            Engine(lm, model, eos_reward="state", **more)
