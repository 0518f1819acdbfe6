"""VPL: contexts, latents and its loss; folders of the older form load."""

from __future__ import annotations

import math

import planted
import pytest
import torch
from formulas import USERS, compare, leaves, some_batch
from planted import ids
from safetensors.torch import load_file, save_file
from small import config_of, edit, saved

from pyargs import load_model
from pyargs.data import of_split
from pyargs.heads import latent
from pyargs.methods import vpl
from pyargs.training import trainer


def test_vpl_contexts_are_other_pairs_of_the_same_user():
    data = planted.pairs("types")
    config = vpl.Config(latent=8)
    model = vpl.build(planted.Backbone(), None, ids(data.train), config)
    vpl.start(model, data.train, config)
    rows = model.users.rows(data.train.users)
    index = torch.arange(0, len(rows), 7)
    batch = data.train.batch(rows, index, last=True)
    states, mask = vpl.draw_context(model.context, batch, config)
    assert 2 <= mask.sum(1).min() and mask.sum(1).max() <= 8 and len(mask.sum(1).unique()) == 7
    everything = data.train.last()
    for n, pair in enumerate(index.tolist()):
        for state in states[n][mask[n]]:
            (source,) = (everything == state).flatten(1).all(1).nonzero().flatten().tolist()
            assert source != pair and rows[source] == rows[pair]
    one = data.train.select([0])
    vpl.start(model, one, config)
    _, mask = vpl.draw_context(model.context, one.batch(model.users.rows(one.users), last=True), config)
    assert not mask.any()  # a single pair has no other: nothing is shown, and the loss is a number all the same
    assert vpl.loss(model, one.batch(model.users.rows(one.users), last=True), config).isfinite()


def test_annealing():
    assert vpl.annealing(0, 100) == pytest.approx(0.1) and vpl.annealing(50, 100) == pytest.approx(0.55)
    assert vpl.annealing(100, 100) == pytest.approx(0.1) and vpl.annealing(99, 100) > 0.99


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_vpl_infers_users_from_chunks_of_nearly_the_same_size(count, monkeypatch):
    model = vpl.build(planted.Backbone(), None, ["a"], vpl.Config(latent=6))
    sizes = []
    forward = latent.Encoder.forward
    monkeypatch.setattr(latent.Encoder, "forward", lambda s, p, m: sizes.append(p.shape[1]) or forward(s, p, m))
    context = vpl.Context(torch.randn(count, 2, planted.DIM), torch.arange(count).unsqueeze(0))
    found = vpl.infer(model, context, vpl.Config(latent=6))
    assert sum(sizes) == count and len(sizes) == math.ceil(count / 8) and max(sizes) - min(sizes) <= 1
    whole = vpl.infer(model, context, vpl.Config(latent=6, adapt_pairs="all"))
    assert sizes[-1] == count and (torch.equal(found, whole) == (count <= 8))


def test_formula_of_vpl(monkeypatch):
    torch.manual_seed(0)
    config = vpl.Config(latent=6, kl=0.3, kl_period=100)
    model = vpl.build(planted.Backbone(), None, USERS, config)
    model.head.score.weight.data *= 100
    batch = some_batch()
    batch.step = 40
    context, mask = torch.randn(6, 3, 2, planted.DIM), torch.tensor([[1, 1, 0]] * 5 + [[1, 1, 1]]).bool()
    noise = torch.randn(6, 6)
    model.context = None
    monkeypatch.setattr(vpl, "draw_context", lambda *_: (context, mask))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x))
    ours, p = leaves(model)
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)  # noqa: E731
    leaky = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    likelihood, kl = 0.0, 0.0
    for n in range(6):
        codes = context[n][mask[n]].double().flatten(1)
        codes = linear(leaky(linear(leaky(linear(codes, "encoder.pair.0")), "encoder.pair.2")), "encoder.pair.4")
        score = linear(codes, "encoder.query") @ linear(codes, "encoder.key").T / math.sqrt(6)
        code = (score.softmax(-1) @ linear(codes, "encoder.value")).mean(0)
        mean, logvar = linear(code, "encoder.mean").clamp(-1, 1), linear(code, "encoder.logvar").clamp(-1, 1)
        z = mean + (logvar / 2).exp() * noise[n].double()
        z = math.sqrt(6) * z / z.norm()
        r = []
        for side in (0, 1):
            x = torch.cat([linear(batch.hidden[n, side, 0].double(), "score"), z])
            r.append(linear(leaky(linear(leaky(linear(x, "first")), "second")), "last")[0])
        likelihood = likelihood + torch.log1p(torch.exp(-(r[0] - r[1])))
        kl = kl - 0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
    anneal = 0.1 + 0.9 * (1 - math.cos(math.pi * 0.4)) / 2
    p.pop("users.vectors.latent")  # inferred, never trained
    compare(vpl.loss(model, batch, config), likelihood / 6 + 0.3 * anneal * kl / 6, ours, p)
    assert ours["users.vectors.latent"].grad is None


# -- with a language model ---------------------------------------------------------------------------------------------


def test_vpl_adapts_on_states_of_the_untrained_backbone(lm_folder, rows):
    model = trainer.train("vpl", rows, config_of("vpl", lm_folder))
    base = trainer.train("lore", rows, config_of("lore", lm_folder, freeze_backbone=True))
    support = of_split(rows, "support")
    torch.testing.assert_close(vpl.support(model, support).hidden, base.read(support).hidden, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(model.read(support).hidden, base.read(support).hidden, atol=1e-3)


def test_vpls_attention_has_biases_and_older_folders_load_without(lm_folder, tmp_path):
    model = saved(vpl, vpl.Config(latent=6, backbone=lm_folder), tmp_path / "m", lm_folder)
    encoder = model.head.encoder
    pairs, mask = torch.randn(2, 3, 2, model.head.config()["dim"]), torch.ones(2, 3, dtype=torch.bool)
    for one in (encoder.query, encoder.value):  # a key's bias adds the same to all scores of a query
        before = encoder(pairs, mask)[0]
        one.bias.data += torch.randn(6)
        assert not torch.allclose(encoder(pairs, mask)[0], before)
    for one in (encoder.query, encoder.key, encoder.value):
        one.bias.data.zero_()
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "shared.safetensors")
    old = {key: value for key, value in tensors.items() if not any(f".{n}.bias" in key for n in ("query", "key", "value"))}
    assert len(old) == len(tensors) - 3
    save_file(old, tmp_path / "m" / "shared.safetensors")
    edit(tmp_path / "m", lambda config: config["head"].pop("attention_bias"))
    torch.testing.assert_close(load_model(tmp_path / "m").head.encoder(pairs, mask), encoder(pairs, mask))
