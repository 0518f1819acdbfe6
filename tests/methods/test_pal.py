"""What follows the methods' original codes, where our own form is another, and folders saved before."""

from __future__ import annotations

import json
import re

import numpy as np
import planted
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyargs import load_model
from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt
from pyargs.methods import icl, pal, pdpo, pref, vpl
from pyargs.models.user_policy import GENERIC
from pyargs.training import adapt, trainer

USERS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("models") / "lm"))


def saved(recipe, config, folder, lm_folder):
    """An untrained model of a method in a folder."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(lm_folder)
    model = recipe.build(lm, tokenizer, USERS, config)
    model.about = {
        "method": recipe.__name__.rpartition(".")[2],
        "fields": vars(config),
        "backbone": lm_folder,
        "dtype": "float32",
    }
    model.save_pretrained(folder)
    return model


def edit(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- PAL ---------------------------------------------------------------------------------------------------------------


def pal_a_by_hand(head, hidden, user, residual: str):
    """-|f(h) - q_u| in float64."""
    p = {name: value.detach().double() for name, value in head.state_dict().items()}
    layer = lambda x, name: x @ p[f"project.{name}.weight"].T + p[f"project.{name}.bias"]  # noqa: E731

    def f(x):
        one = layer(x, "first").relu()
        two = layer(one, "second").relu()
        return x + layer(two, "third") if residual == "input" else layer(two + one, "third")

    ideal = f(p["users.vectors.mixture"].softmax(-1) @ p["prototypes"])
    return -(f(hidden.double()) - ideal[user]).norm(dim=-1)


def test_pal_a_is_the_originals_and_folders_of_the_older_form_keep_it(lm_folder, tmp_path):
    config = pal.Config(variant="A", rank=3, backbone=lm_folder)
    model = saved(pal, config, tmp_path / "new", lm_folder)
    hidden, user = torch.randn(5, model.head.config()["dim"]), torch.tensor([0, 3, 2, 2, 1])
    for residual in ("input", "hidden"):
        if residual == "hidden":  # as it was saved before
            edit(tmp_path / "new", lambda config: config["head"].pop("residual"))
        again = load_model(tmp_path / "new")
        want = pal_a_by_hand(again.head, hidden, user, residual)
        torch.testing.assert_close(again.head(hidden, user).double(), want, atol=1e-5, rtol=1e-5)
        again.save_pretrained(tmp_path / "again")  # what a folder means stays what it is
        torch.testing.assert_close(load_model(tmp_path / "again").head(hidden, user).double(), want, atol=1e-5, rtol=1e-5)
    edit(tmp_path / "new", lambda config: config["head"].update(residual="twice"))
    with pytest.raises(PyargsError, match="residual"):
        load_model(tmp_path / "new")


def test_pal_a_refuses_a_width_that_its_sum_does_not_have():
    with pytest.raises(PyargsError, match="leave width at 0"):
        pal.build(planted.Backbone(), None, USERS, pal.Config(variant="A", width=planted.DIM + 1))
    pal.build(planted.Backbone(), None, USERS, pal.Config(variant="A", width=planted.DIM))
    pal.build(planted.Backbone(), None, USERS, pal.Config(variant="B", width=planted.DIM + 1))


# -- VPL ---------------------------------------------------------------------------------------------------------------


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


# -- P-DPO -------------------------------------------------------------------------------------------------------------


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


# -- PReF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", ["signed", "unit"])
def test_prefs_start_is_the_factorisation_that_its_option_names(votes):
    """Votes that are all known are factorised as they are; with gaps the filling-in is that of numpy, round by round."""
    data = planted.pairs("low_rank")
    config = pref.Config(rank=3, votes=votes)
    model = pref.build(planted.Backbone(), None, list(dict.fromkeys(data.train.users)), config)
    pref.start(model, data.train, config)
    found = model.users.vectors["mixture"].detach().double()

    rows, (low, unknown, rank) = model.users.rows(data.train.users), {"signed": (-1, 0, 3), "unit": (0, 0.5, 100)}[votes]
    left = torch.minimum(data.train.chosen, data.train.rejected)
    _, place = left.unique(return_inverse=True)
    matrix = np.full((int(place.max()) + 1, len(model.users)), np.nan)
    matrix[place, rows] = np.where(data.train.chosen == left, 1, low)
    filled = np.where(np.isnan(matrix), unknown, matrix)
    for _ in range(10):
        u, s, v = np.linalg.svd(filled, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ v[:rank]
        filled = np.where(np.isnan(matrix), low_rank.clip(low, 1), matrix)
    _, s, v = np.linalg.svd(filled, full_matrices=False)
    want = torch.tensor(v[:3].T * np.sqrt(s[:3]))
    assert np.isnan(matrix).mean() > 0.3
    torch.testing.assert_close(found @ found.T, want @ want.T, atol=1e-5, rtol=1e-4)  # whatever the vectors' signs are


# -- one limit for all rows --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 120), st.integers(20, 90), st.integers(0, 200), st.booleans())
def test_a_row_with_demonstrations_keeps_as_much_of_a_prompt_as_the_others(lm_folder, words, limit, room, dialogue):
    """However long it is: what is asked is what `encode_prompt` leaves of it, and demonstrations come on top."""
    lm, tokenizer = load_lm(lm_folder)
    prompt = " ".join("old new one two red blue".split()[i % 6] for i in range(words))
    if dialogue:
        prompt = [
            {"role": "user", "content": "dog"},
            {"role": "assistant", "content": "cat"},
            {"role": "user", "content": prompt},
        ]
    alone = encode_prompt(tokenizer, prompt, limit)
    none = icl.build(lm, tokenizer, [], icl.Config(shots=0, backbone=lm_folder))
    assert none.prompt_ids(prompt, "anna", limit) == alone
    model = icl.build(lm, tokenizer, [], icl.Config(shots=4, backbone=lm_folder, demonstration_tokens=room))
    model.demonstrations.of_user["anna"] = [{"prompt": "tell me", "chosen": "cat", "rejected": "dog"}] * 4
    ids = model.prompt_ids(prompt, "anna", limit)
    assert len(alone) <= len(ids) <= len(alone) + room
    asked = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", tokenizer.decode(alone), re.DOTALL)[-1]
    assert (f"Prompt: {asked.strip()}\nPreferred:" in tokenizer.decode(ids)) == (ids != alone)


def test_demonstrations_saved_before_keep_their_one_limit(lm_folder, tmp_path):
    lm, tokenizer = load_lm(lm_folder)
    model = icl.build(lm, tokenizer, [], icl.Config(shots=3, backbone=lm_folder))
    model.demonstrations.of_user["anna"] = [{"prompt": "tell me", "chosen": "cat", "rejected": "dog"}] * 3
    model.about = {"method": "icl", "fields": {}, "backbone": lm_folder, "dtype": "float32"}
    model.save_pretrained(tmp_path / "m")

    def older(config):
        config["demonstrations"].pop("demonstration_tokens")
        config["demonstrations"]["max_tokens"] = 200
        config["fields"]["response_tokens"] = 256

    edit(tmp_path / "m", older)
    old = load_model(tmp_path / "m")
    assert (
        90 < len(old.prompt_ids("old one", "anna", 20)) <= 200 and 190 < len(old.prompt_ids("old " * 900, "anna", 20)) <= 200
    )
    with pytest.raises(PyargsError, match="'response_tokens'.*train it again"):
        adapt.adapt(old, synthetic.load(users=1, pairs=2, new_users=1, support=2, query=1))
