"""A folder that is pushed: it loads and scores as before, and no byte tells of the owner's machine or of users left out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from folders import make, same
from hypothesis import given, settings
from hypothesis import strategies as st
from small import config_of, edit, saved, scores

import pyargs
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.files import read_json, weights_hash, write_json
from pyargs.heads import linear
from pyargs.lm.loading import load_lm
from pyargs.models import trained_mean
from pyargs.models.reward_model import RewardModel
from pyargs.publish.staging import FEWEST, FILES, hashed_id, stage
from pyargs.training import adapt, hooks
from pyargs.types import Users

HOUSE = Path(__file__).parents[1] / "models" / "first_house"
BACKBONE, EXPECTED = str(HOUSE / "backbone"), read_json(HOUSE / "expected.json")
SAID = dict(data="planted users", data_licence="CC0-1.0")
SALT = b"0123456789abcdef"


def everything(folder: Path) -> bytes:
    """All that is pushed, names of files included."""
    assert {one.name for one in folder.iterdir()} <= set(FILES)
    return b"\n".join(one.name.encode() + one.read_bytes() for one in sorted(folder.iterdir()))


def texts(value):
    """All texts within a JSON value."""
    if isinstance(value, str):
        yield value
    for one in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(one)


@pytest.mark.parametrize("method", sorted(EXPECTED))
def test_every_method_s_folder_loads_and_its_kept_users_score_as_before(method, tmp_path):
    folder, rows = HOUSE / method, Dataset.from_list(EXPECTED[method]["rows"])
    model = pyargs.load_model(folder, backbone=BACKBONE)
    before, known = scores(model, rows), list(model.known_users)
    shown = texts(read_json(folder / "demonstrations.json")) if method == "icl" else ()
    ids, words = [user.encode() for user in known], [text.encode() for text in shown if text not in known and len(text) > 10]
    assert bool(words) == (method == "icl")
    for users in ("none", "hashed", "named"):
        out = tmp_path / users
        if (users != "none" and not known) or (users == "hashed" and method == "icl"):
            with pytest.raises(PyargsError, match="knows no users|no hash of an id hides"):
                stage(folder, out, users=users, **SAID)
            assert not out.exists()
            continue
        found = stage(folder, out, users=users, **SAID)
        written = everything(out)
        again = pyargs.load_model(out, backbone=BACKBONE)
        assert found["users"] == len(again.known_users) == (0 if users == "none" else len(known))
        assert again.users.trained == (0 if users == "none" else model.users.trained)
        assert weights_hash(out) == weights_hash(folder)  # what was tuned still belongs to it
        if users != "named":
            assert not [one for one in (*ids, *words) if one in written]
        if users == "none" and known:
            assert {n: v.shape[1:] for n, v in again.users.vectors.items()} == {
                n: v.shape[1:] for n, v in model.users.vectors.items()
            }
            continue
        salt = bytes.fromhex(found["salt"] or "")
        asked = rows.map(lambda row, salt=salt: {**row, "user_id": hashed_id(row["user_id"], salt)}) if salt else rows
        assert torch.equal(scores(again, asked), before)


@pytest.mark.parametrize("kind", ["reward", "token", "soft", "shown"])
def test_no_place_of_the_owner_s_machine_is_pushed(kind, backbone, tmp_path):
    model = make(kind, backbone)
    model.about |= {"fields": {"seed": 0, "backbone": backbone}, "note": f"made in {backbone}"}
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    write_json(folder / "tuned.json", {f"{backbone} float32": {"model": weights_hash(folder), "reward_weight": 1.0}})
    with pytest.raises(PyargsError, match="others do not have the backbone.*--base-model"):
        stage(folder, out, **SAID)
    found = stage(folder, out, base_model="me/base", **SAID)
    written = everything(out)
    assert backbone.encode() not in written and str(tmp_path).encode() not in written and b"me/base" in written
    assert {"config.json: note", "tuned.json"} <= set(found["left_out"])
    again = pyargs.load_model(out, backbone=backbone)
    assert again.about["backbone"] == backbone and not len(again.known_users)
    named = stage(folder, out, base_model="me/base", users="named", **SAID) if kind != "token" else found  # replaces it
    assert named["users"] == len(model.known_users)
    assert same(pyargs.load_model(out, backbone=backbone), model)


@pytest.mark.parametrize("place", ["/mnt/encoder", "~/encoder", "./encoder", "C:\\encoder", "here/encoder", "a {cwd}/file"])
def test_a_setting_that_names_a_place_is_refused_by_name(place, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/encoder").mkdir(parents=True)
    folder = tmp_path / "model"
    make("shown", backbone).save_pretrained(folder)
    for field in ("fields", "demonstrations"):
        before = (folder / "config.json").read_text()
        edit(folder, lambda config, field=field: config[field].update(retrieve=place.replace("{cwd}", str(tmp_path))))
        with pytest.raises(PyargsError, match=rf"{field}\.retrieve is .* a place on this machine"):
            stage(folder, tmp_path / "out", base_model="me/base", **SAID)
        (folder / "config.json").write_text(before)
    with pytest.raises(PyargsError, match="data is .* says nothing to others"):
        stage(folder, tmp_path / "out", base_model="me/base", data=place.replace("{cwd}", str(tmp_path)), data_licence="MIT")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_names_a_user_is_refused(backbone, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    make("reward", backbone).save_pretrained(folder)
    for fields in ({"seen": ["ann"]}, {"like": {"bob": 1}}):
        edit(folder, lambda config, fields=fields: config.update(method="./mine.py", fields=fields))
        with pytest.raises(PyargsError, match="names a user"):
            stage(folder, out, base_model="me/base", **SAID)
        stage(folder, out, base_model="me/base", users="named", **SAID)
    assert read_json(out / "config.json")["method"] == "mine.py"


def test_a_word_that_a_method_s_option_may_have_is_no_user_s_name(lm_folder, tmp_path):
    recipe, config = hooks.method("lore"), config_of("lore", lm_folder)
    model = saved(recipe, config, tmp_path / "m", lm_folder)
    model.users.append(["zeros"], mixture=torch.zeros(1, config.rank))  # `adapt_init` has it
    model.save_pretrained(tmp_path / "m")
    stage(tmp_path / "m", tmp_path / "out", base_model="me/base", **SAID)


IDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=6, max_size=12).map("§{}".format), max_size=6, unique=True
)


@settings(max_examples=25, deadline=None)
@given(ids=IDS, rank=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_hashed_users_keep_their_rows_whatever_they_are_called(ids, rank, seed, data, decoder):
    torch.manual_seed(seed)
    users = Users(ids, mixture=torch.randn(len(ids), rank))
    users.trained = data.draw(st.integers(0, len(ids)))
    about = {"method": "lore", "fields": {}, "backbone": "tiny-random", "dtype": "float32", "fingerprint": decoder[2]}
    model = RewardModel(*decoder[:2], linear.Head(32, rank, users, softmax=True), about=about).eval()
    hidden = torch.randn(5, 32)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out, table = (Path(scratch, name) for name in ("model", "out", "table"))
        model.save_pretrained(folder)
        apart = data.draw(st.booleans())
        if not ids:
            with pytest.raises(PyargsError, match="knows no users"):
                stage(folder, out, users="hashed", **SAID)
            return
        found = stage(folder, out, users="hashed", salt=SALT, users_out=table if apart else None, **SAID)
        again = RewardModel.from_pretrained(out, users=table if apart else None, backbone=decoder[0], tokenizer=decoder[1])
        names = [hashed_id(user, SALT) for user in ids]
        assert found["salt"] == SALT.hex() and sorted(again.known_users) == sorted(names)
        assert again.users.trained == users.trained
        assert {*list(again.known_users)[: users.trained]} == {*names[: users.trained]}
        assert list(again.known_users)[: users.trained] == sorted(names[: users.trained])  # the order of ids tells nothing
        for user, name in zip(ids, names, strict=True):
            rows = [one.users.rows([who]).expand(5) for one, who in ((model, user), (again, name))]
            assert torch.equal(model.head(hidden, rows[0]), again.head(hidden, rows[1]))
        for place in (out, table) if apart else (out,):
            assert not [user for user in ids if user.encode() in everything(place)]
        if apart:
            assert not len(RewardModel.from_pretrained(out, backbone=decoder[0], tokenizer=decoder[1]).users)


@pytest.fixture(scope="module")
def decoder(backbone):
    from pyargs.lm.loading import fingerprint

    lm, tokenizer = load_lm(backbone)
    return lm.get_decoder(), tokenizer, fingerprint(lm.get_decoder())


@pytest.mark.parametrize("kind", ["reward", "soft", "shown"])
def test_users_pushed_apart_fit_their_model_alone(kind, backbone, tmp_path):
    model = make(kind, backbone)
    model.save_pretrained(tmp_path / "model")
    more = dict(base_model="me/base", users="named", **SAID)
    stage(tmp_path / "model", tmp_path / "out", users_out=tmp_path / "users", **more)
    out = everything(tmp_path / "out")
    assert not [user for user in model.known_users if f'"{user}"'.encode() in out]
    again = pyargs.load_model(tmp_path / "out", users=tmp_path / "users", backbone=backbone)
    assert same(again, model) and list(again.known_users) == list(model.known_users)
    if kind == "shown":
        assert again.demonstrations.of_user == model.demonstrations.of_user
    again.save_pretrained(tmp_path / "whole")
    assert same(pyargs.load_model(tmp_path / "whole"), model)

    def other(config):
        config["demonstrations" if kind == "shown" else "fingerprint"] = (
            config["demonstrations"] | {"seed": 1} if kind == "shown" else "0" * 32
        )

    edit(tmp_path / "model", other)
    stage(tmp_path / "model", tmp_path / "other", users_out=tmp_path / "other users", **more)
    with pytest.raises(PyargsError, match="other users belongs to another model"):
        pyargs.load_model(tmp_path / "out", users=tmp_path / "other users", backbone=backbone)
    with pytest.raises(PyargsError, match="no users' table"):
        pyargs.load_model(tmp_path / "out", users=tmp_path / "model", backbone=backbone)


def test_a_model_for_everyone_takes_no_users(backbone, tmp_path):
    make("token", backbone).save_pretrained(tmp_path / "model")
    with pytest.raises(PyargsError, match="the same for everyone"):
        pyargs.load_model(tmp_path / "model", users=tmp_path)
    for more, why in (
        (dict(users="hashed"), "knows no users"),
        (dict(users_out=tmp_path / "u"), "say how"),
        (dict(users="all"), "one of none"),
        (dict(salt=SALT), "for hashed users"),
    ):
        with pytest.raises(PyargsError, match=why):
            stage(tmp_path / "model", tmp_path / "out", base_model="me/base", **SAID, **more)
    make("reward", backbone).save_pretrained(tmp_path / "reward")
    with pytest.raises(PyargsError, match="at least 16 random bytes"):
        stage(tmp_path / "reward", tmp_path / "out", base_model="me/base", users="hashed", salt=b"pepper", **SAID)
    with pytest.raises(PyargsError, match="save the model first"):
        stage(tmp_path / "nowhere", tmp_path / "out", **SAID)


@pytest.mark.parametrize("method", ["pref", "mpu"])
def test_new_users_begin_at_the_mean_of_users_who_were_left_out(method, lm_folder, tmp_path):
    """If these are many enough; then they become what they become beside them."""
    recipe, (lm, tokenizer) = hooks.method(method), load_lm(lm_folder)
    config = config_of(method, lm_folder, adapt_init="mean", adapt_steps=3, freeze_backbone=True)
    rows = synthetic.load(users=2, pairs=4, new_users=1, support=3, query=2)
    for count in (FEWEST, FEWEST - 1):
        torch.manual_seed(count)
        model = recipe.build(lm, tokenizer, [f"somebody {n}" for n in range(count)], config)
        for value in model.users.vectors.values():
            value.data.normal_()
        model.about = {"method": method, "fields": vars(config), "backbone": lm_folder, "dtype": "float32"}
        model.save_pretrained(tmp_path / "model")
        found = stage(tmp_path / "model", tmp_path / "out", base_model="me/base", **SAID)
        again = pyargs.load_model(tmp_path / "out", backbone=lm_folder)
        assert b"somebody" not in everything(tmp_path / "out") and not len(again.users)
        if count < FEWEST:
            assert any("too few" in one for one in found["left_out"])
            assert "users can not be added" in (tmp_path / "out/README.md").read_text()
            with pytest.raises(PyargsError, match="no user of the training is left"):
                trained_mean(again)
            continue
        adapt.adapt(again, of_split(rows, "support"))
        again.save_pretrained(tmp_path / "again")
        adapt.adapt(model, of_split(rows, "support"))
        query = of_split(rows, "query")
        assert torch.equal(scores(pyargs.load_model(tmp_path / "again", backbone=lm_folder), query), scores(model, query))
        start = read_json(tmp_path / "out/config.json")
        assert start["trained"] == 0
        write_json(tmp_path / "out/config.json", start | {"users": {name: [1] for name in start["users"]}})
        with pytest.raises(PyargsError, match="does not fit"):
            pyargs.load_model(tmp_path / "out", backbone=lm_folder)
        write_json(tmp_path / "out/config.json", start)


def test_what_was_tuned_for_public_policies_stays(lm_folder, tmp_path):
    saved(hooks.method("lore"), config_of("lore", lm_folder), tmp_path / "m", lm_folder)
    mine = {"model": weights_hash(tmp_path / "m"), "reward_weight": 2.0}
    tuned = {"smollm2-135m float32": mine, "org/name bfloat16": mine, "old/one float32": {**mine, "model": "gone"}}
    write_json(tmp_path / "m/tuned.json", tuned | {f"{lm_folder} float32": mine})
    stage(tmp_path / "m", tmp_path / "out", base_model="me/base", **SAID)
    assert set(read_json(tmp_path / "out/tuned.json")) == {"smollm2-135m float32", "org/name bfloat16"}


def test_what_is_not_ours_is_neither_pushed_nor_replaced(lm_folder, tmp_path):
    saved(hooks.method("lore"), config_of("lore", lm_folder), tmp_path / "m", lm_folder)
    (tmp_path / "m/notes.txt").write_text("ann likes cats")
    found = stage(tmp_path / "m", tmp_path / "out", base_model="me/base", **SAID)
    assert "notes.txt" in found["left_out"] and b"cats" not in everything(tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(PyargsError, match="not ours to delete"):
        stage(tmp_path / "m", tmp_path / "out", base_model="me/base", **SAID)
    assert json.loads((tmp_path / "out/users.json").read_text()) == []
