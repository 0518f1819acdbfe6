"""P-DPO: its start, its loss, and users who want the opposite of each other."""

from __future__ import annotations

import pytest
import torch
from formulas import USERS, compare
from safetensors.torch import save_file
from small import edit

from pyargs import load_model
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.methods import pdpo
from pyargs.models.user_policy import GENERIC
from pyargs.training import adapt, trainer
from pyargs.types import LogProbs


def test_formula_of_p_dpo():
    torch.manual_seed(0)
    reference, pair = -20 + 5 * torch.randn(9, 2), torch.tensor([3, 0, 8, 1, 2, 2, 5])
    own, generic = ((-20 + 5 * torch.randn(7, 2)).requires_grad_() for _ in range(2))
    leaf = {name: value.detach().double().requires_grad_() for name, value in (("own", own), ("generic", generic))}
    model = type("Model", (), {"reference": reference})()
    margin = {n: 0.5 * ((v - reference[pair].double()) @ torch.tensor([1.0, -1.0]).double()) for n, v in leaf.items()}
    want = (0.3 * torch.log1p(torch.exp(-margin["own"])) + 0.7 * torch.log1p(torch.exp(-margin["generic"]))).mean()
    loss = pdpo.loss(model, LogProbs(own, generic, None, pair), pdpo.Config(alpha=0.3))
    compare(loss, want, {"own": own, "generic": generic}, leaf)


def test_p_dpo_starts_from_embeddings_of_tokens(lm_folder, rows):
    lm, tokenizer = load_lm(lm_folder)
    model = pdpo.build(lm, tokenizer, USERS, pdpo.Config())
    table = lm.get_input_embeddings().weight.detach()
    for start in (*model.users.vectors["offset"], model.soft.centres[0]):
        assert all((table == token).all(1).any() for token in start.detach())
    user = torch.tensor([0, 2, -1])
    want = model.soft.centres + torch.stack([*model.users.vectors["offset"][[0, 2]], torch.zeros(8, table.shape[1])])
    torch.testing.assert_close(model.soft(user), want)
    same = of_split(rows, "train").select([0]).map(lambda row: {"rejected": row["chosen"], "user_id": "a"})
    total, _ = model.pair_logprobs(same)
    assert total[0, 0] == total[0, 1]  # one text twice is a tie


def test_pdpo_finds_planted_users(tmp_path):
    """Users who want the opposite of each other: the adapted soft prompt must beat the generic one by 10 points."""
    folder = str(synthetic.tiny_lm(tmp_path / "lm", tie=True))
    rows = synthetic.load(users=4, pairs=100, new_users=2, support=40, query=50, rank=1, train_test=0.0)
    config = pdpo.Config(backbone=folder, lora_lr=1e-2, soft_lr=5e-2, epochs=6, adapt_lr=5e-2, adapt_steps=60)
    model = trainer.train("pdpo", rows, config)
    adapt.adapt(model, rows)
    query = of_split(rows, "query")
    ranked = lambda values: (values[:, 0] > values[:, 1]).float().mean().item()  # noqa: E731
    own = ranked(model.pair_logprobs(query)[0])
    new = torch.arange(len(model.users))[-2:]
    model.users.vectors["offset"].data[new] = 0  # the generic prompt alone
    generic = ranked(model.pair_logprobs(query)[0])
    assert own >= generic + 0.10


def test_p_dpos_generic_cluster_user_has_weights_that_are_learned(lm_folder, tmp_path):
    rows = synthetic.load(users=2, pairs=8, new_users=1, support=4, query=2)
    config = pdpo.Config(backbone=lm_folder, clusters=3, soft_tokens=2, epochs=1, soft_lr=0.1, batch_size=8)
    torch.manual_seed(0)
    start = pdpo.build(*load_lm(lm_folder), ["user_00", "user_01"], config).soft
    model = trainer.train("pdpo", rows, config)
    soft = model.soft
    assert (soft.generic - start.generic).abs().min() > 1e-3
    want = (soft.generic.double().softmax(0)[:, None, None] * soft.centres.double()).sum(0)
    torch.testing.assert_close(soft(torch.tensor([GENERIC]))[0].double(), want, atol=1e-6, rtol=1e-6)
    adapt.adapt(model, rows, steps=0)  # a new user begins as the generic one
    torch.testing.assert_close(soft(model.users.rows(["new_00"]))[0].double(), want, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path / "m")
    torch.testing.assert_close(
        load_model(tmp_path / "m").soft(torch.tensor([GENERIC]))[0].double(), want, atol=1e-6, rtol=1e-6
    )

    save_file({"centres": soft.centres.detach()}, tmp_path / "m" / "shared.safetensors")
    with pytest.raises(PyargsError, match="missing.*generic"):  # a damaged folder is no older one
        load_model(tmp_path / "m")
    edit(tmp_path / "m", lambda config: config.pop("generic"))  # as it was saved before: the mean
    old = load_model(tmp_path / "m")
    torch.testing.assert_close(old.soft(torch.tensor([GENERIC]))[0], soft.centres.detach().mean(0))
    assert "generic" not in old.about
    old.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load_model(tmp_path / "again").soft(torch.tensor([GENERIC]))[0], soft.centres.detach().mean(0))
