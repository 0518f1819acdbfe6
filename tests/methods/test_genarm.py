"""GenARM: its loss is its formula, and it finds a rule that all users share."""

from __future__ import annotations

import torch
from formulas import compare

from pyargs.data import of_split, synthetic
from pyargs.methods import genarm
from pyargs.training import trainer
from pyargs.types import LogProbs


def test_formula_of_genarm():
    torch.manual_seed(0)
    values = (-20 + 5 * torch.randn(7, 2)).requires_grad_()
    exact = values.detach().double().requires_grad_()
    loss = genarm.loss(None, LogProbs(values, None, None, None), genarm.Config(gamma=0.2))
    want = torch.log1p(torch.exp(-(0.05 * (exact[:, 0] - exact[:, 1]) - 0.2))).mean()
    compare(loss, want, {"logprobs": values}, {"logprobs": exact})


def test_genarm_finds_a_global_rule(tmp_path):
    folder = str(synthetic.tiny_lm(tmp_path / "lm", tie=True))
    rows = synthetic.load(users=1, pairs=240, new_users=1, support=1, query=60, rank=1, train_test=0.0)
    config = genarm.Config(backbone=folder, lora_lr=2e-2, beta=0.5, epochs=6, target_modules=["q_proj", "v_proj", "o_proj"])
    model = trainer.train("genarm", rows, config)
    chosen, rejected = model.pair_scores(of_split(rows, "query"))[1].unbind(1)
    assert (chosen > rejected).float().mean() >= 0.9
