"""Policy accuracy: by hand, from scores that agree with a pass of their own."""

from __future__ import annotations

import pytest
import torch
from conftest import reward_model

from pyargs.data.synthetic import tiny_lm as saved_lm
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, encode_response
from pyargs.metrics.policy_accuracy import PairScores, pair_scores, policy_accuracy
from pyargs.metrics.rm_accuracy import rm_accuracy


def test_policy_accuracy_by_hand():
    scores = PairScores(
        logprob=torch.tensor([[-10.0, -4.0], [-6.0, -7.0]], dtype=torch.float64),
        step_reward=torch.tensor([[8.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
        length=torch.tensor([[10, 2], [3, 3]]),
        reward=torch.zeros(2, 2),
        users=["a", "b"],
    )
    at = lambda w, **k: {name: found["accuracy"] for name, found in policy_accuracy(scores, w, **k).items()}  # noqa: E731
    assert at(0.0)["base"] == 100  # -1 > -2 and -2 > -2.33
    assert at(0.0)["paper"] == at(0.0)["sum"] == 50  # the longer answer loses on sums
    assert at(1.0)["paper"] == 50  # -2 > -3, -5 = -5: a tie is an error
    assert policy_accuracy(scores, 1.0)["paper"]["tie_rate"] == 50
    assert at(2.0, centre=1.0)["centred"] == 0  # 6 - 20 < -2 - 4; -4 - 6 < -3 - 6
    assert scores.mean_step_reward() == pytest.approx(12 / 18)


def test_scores_are_those_of_single_passes(tmp_path):
    from datasets import Dataset

    lm, tokenizer = load_lm(str(saved_lm(tmp_path / "lm")))
    model = reward_model(lm)
    model.backbone, model.tokenizer = lm.get_decoder(), tokenizer
    model.head.directions.data = torch.randn(3, lm.config.hidden_size)
    rows = Dataset.from_list(
        [
            {"user_id": "ann", "prompt": "one two", "chosen": "a b c", "rejected": "d"},
            {"user_id": "bob", "prompt": "one two", "chosen": "d", "rejected": "a b c"},
            {"user_id": "bob", "prompt": "other", "chosen": "x y", "rejected": "y x"},
        ]
    )
    found = pair_scores(model, lm, rows)
    for n, row in enumerate(rows):
        for side, text in enumerate((row["chosen"], row["rejected"])):
            prompt, response = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, text)
            with torch.no_grad():
                out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
            logs = out.logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1))
            user = model.users.rows([row["user_id"]]).expand(len(response))
            rewards = model.head(out.hidden_states[-1][0, len(prompt) :], user)
            assert found.length[n, side] == len(response)
            assert found.logprob[n, side].item() == pytest.approx(logs.sum().item(), abs=1e-3)
            assert found.reward[n, side].item() == pytest.approx(rewards[-1].item(), abs=1e-3)
            assert found.step_reward[n, side].item() == pytest.approx(rewards.sum().item(), abs=1e-3)


def test_a_constant_moves_the_papers_policy_accuracy_only():
    from pyargs.metrics.policy_accuracy import PairScores, policy_accuracy

    torch.manual_seed(0)
    length = torch.randint(1, 30, (200, 2))
    base = PairScores(torch.randn(200, 2).double() * 5, torch.randn(200, 2).double(), length, torch.randn(200, 2), ["u"] * 200)
    c, w = 3.0, 0.7
    moved = PairScores(base.logprob, base.step_reward + c * length, length, base.reward + c, base.users)
    before = policy_accuracy(base, w, centre=base.mean_step_reward())
    after = policy_accuracy(moved, w, centre=moved.mean_step_reward())
    assert rm_accuracy(base.reward, base.users) == rm_accuracy(moved.reward, moved.users)
    assert before["all"] == after["all"]
    assert before["paper"] != after["paper"]
    assert before["centred"]["accuracy"] == pytest.approx(after["centred"]["accuracy"], abs=0.51)
