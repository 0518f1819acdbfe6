"""Pushing to a hub that is a folder of this machine: what arrives, where, and who may see it."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from folders import make, same
from small import scores
from verbs import call

import pyargs
from pyargs.errors import PyargsError
from pyargs.files import read_json
from pyargs.publish.staging import FILES, hashed_id

HOUSE = Path(__file__).parents[1] / "models" / "first_house"
BACKBONE, EXPECTED = str(HOUSE / "backbone"), read_json(HOUSE / "expected.json")
SAID = dict(data="planted users", data_licence="CC0-1.0")


class Hub:
    """What `HfApi` and `snapshot_download` do, with a folder for each repository."""

    def __init__(self, root: Path):
        self.root, self.private, self.calls, self.token = root, {}, [], None

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.private.setdefault(repo_id, bool(private))  # an old one keeps what it is

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private[repo_id])

    def create_branch(self, repo_id, *, branch, exist_ok=False):
        assert exist_ok
        self.calls.append(("branch", repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr, delete_patterns):
        self.calls.append(("upload", repo_id, revision, create_pr))
        place, new = self.root / repo_id, {one.name for one in Path(folder_path).iterdir()}
        for one in place.iterdir() if place.exists() else ():
            if one.name not in new and any(fnmatch(one.name, pattern) for pattern in delete_patterns):
                one.unlink()
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", pr_url=f"https://hub/{repo_id}/pr/1")

    def download(self, repo_id):
        if not (self.root / repo_id).is_dir():
            raise OSError("404")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


@pytest.mark.parametrize("method", sorted(EXPECTED))
def test_a_pushed_model_comes_back_from_the_hub(method, hub):
    found = pyargs.push_to_hub(HOUSE / method, "me/model", **SAID, token="secret")
    rows, model = Dataset.from_list(EXPECTED[method]["rows"]), pyargs.load_model(HOUSE / method, backbone=BACKBONE)
    again = pyargs.load_model("me/model", backbone=BACKBONE)
    assert found["repo"].startswith("https://hub/me/model") and hub.token == "secret" and not hub.private["me/model"]
    assert type(again) is type(model) and not again.known_users
    assert sorted(found["files"]) == sorted(one.name for one in (hub.root / "me/model").iterdir())
    if not model.known_users:
        assert torch.equal(scores(again, rows), scores(model, rows))


def test_users_are_pushed_apart_and_private(hub, capsys):
    words = ["--data", "planted users", "--data-licence", "CC0-1.0", "--users", "hashed", "--users-repo", "me/users"]
    found = call(capsys, ["push", str(HOUSE / "lore"), "me/lore", *words])
    assert hub.private == {"me/lore": False, "me/users": True} and "users" in found["users_repo"]
    salt, rows = bytes.fromhex(found["salt"]), Dataset.from_list(EXPECTED["lore"]["rows"])
    again = pyargs.load_model("me/lore", users="me/users", backbone=BACKBONE)
    asked = rows.map(lambda row: {**row, "user_id": hashed_id(row["user_id"], salt)})
    assert torch.equal(scores(again, asked), scores(pyargs.load_model(HOUSE / "lore", backbone=BACKBONE), rows))
    assert not pyargs.load_model("me/lore", backbone=BACKBONE).known_users
    call(capsys, ["push", str(HOUSE / "pref"), "me/pref", *words[:-1], "me/others"])
    with pytest.raises(PyargsError, match="me/others belongs to another model"):
        pyargs.load_model("me/lore", users="me/others", backbone=BACKBONE)


def test_nothing_is_uploaded_to_a_public_repository_that_should_be_private(hub, capsys):
    hub.create_repo("me/open", exist_ok=True)
    for words in (dict(repo_id="me/open", private=True), dict(repo_id="me/new", users="named", users_repo="me/open")):
        with pytest.raises(PyargsError, match="'me/open' is there already, and public"):
            pyargs.push_to_hub(HOUSE / "lore", **words, **SAID)
    with pytest.raises(PyargsError, match="another name"):
        pyargs.push_to_hub(HOUSE / "lore", "me/one", users="named", users_repo="me/one", **SAID)
    said = call(
        capsys, ["push", str(HOUSE / "global_rm"), "me/g", "--data", "x", "--data-licence", "y", "--users", "named"], 1
    )
    assert "knows no users" in said and not hub.calls
    call(capsys, ["push", str(HOUSE / "global_rm"), "me/hidden", "--data", "x", "--data-licence", "y", "--private"])
    assert hub.private["me/hidden"]


def test_data_and_licence_are_asked_for(capsys):
    for missing in ("--data", "--data-licence"):
        words = {"--data": "x", "--data-licence": "y"}
        del words[missing]
        with pytest.raises(SystemExit):
            call(capsys, ["push", str(HOUSE / "lore"), "me/lore", *(word for pair in words.items() for word in pair)])
        assert missing in capsys.readouterr().err
    for empty in ("data", "data_licence"):
        with pytest.raises(PyargsError, match=f"{empty} is ' '"):
            pyargs.push_to_hub(HOUSE / "lore", "me/lore", **SAID | {empty: " "})


def test_a_branch_or_a_pull_request(hub):
    pyargs.push_to_hub(HOUSE / "lore", "me/lore", **SAID, revision="v2")
    assert hub.calls == [("branch", "me/lore", "v2"), ("upload", "me/lore", "v2", False)]
    found = pyargs.push_to_hub(HOUSE / "lore", "me/lore", **SAID, create_pr=True)
    assert hub.calls[2:] == [("upload", "me/lore", None, True)] and found["repo"].endswith("/pr/1")
    with pytest.raises(PyargsError, match="leave revision out"):
        pyargs.push_to_hub(HOUSE / "lore", "me/lore", **SAID, create_pr=True, revision="v2")


def test_what_the_new_model_lacks_goes_and_what_others_put_there_stays(hub, backbone, tmp_path):
    model = make("soft", backbone)
    model.save_pretrained(tmp_path / "soft")
    pyargs.push_to_hub(HOUSE / "lore", "me/model", **SAID)
    (hub.root / "me/model/picture.png").write_bytes(b"mine")
    pyargs.push_to_hub(tmp_path / "soft", "me/model", base_model="me/base", users="named", **SAID)
    there = {one.name for one in (hub.root / "me/model").iterdir()}
    assert "adapter_config.json" not in there and there - set(FILES) == {"picture.png"}
    assert same(pyargs.load_model("me/model", backbone=backbone), model)


def test_what_the_hub_refuses_is_said(hub, monkeypatch):
    def refused(*_, **__):
        raise ValueError("401: who are you?")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(PyargsError, match="'me/lore' cannot be made on the hub: .*who are you"):
        pyargs.push_to_hub(HOUSE / "lore", "me/lore", **SAID)
    monkeypatch.undo()
    with pytest.raises(PyargsError, match="neither a local folder nor within reach"):
        pyargs.load_model("me/nothing")
