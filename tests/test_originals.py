"""What follows the methods' original codes, where our own form is another, and folders saved before."""

from __future__ import annotations

import json

import planted
import pytest
import torch

from pyargs import load_model
from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.lm.hf import load_lm
from pyargs.methods import pal

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
