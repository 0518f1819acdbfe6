"""Released artefacts: folders that load, without a text of the data, and without ids where these may not be told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cells import EXPERIMENTS, cell, write
from huggingface_hub import DatasetCard

import pyargs
from experiments import artefacts, reproduce, results
from experiments.__main__ import main
from experiments.profiles import PROFILES
from pyargs import data, files
from pyargs.data import of_split
from pyargs.publish.staging import hashed_id


def pushed(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny cell that was run, and what is made of it: PAL-B only ranks, so that its stages are few."""
    root = tmp_path_factory.mktemp("artefacts")
    places = reproduce.Places(root / "shared", root / "work", root / "results")
    one = reproduce.Cell("smoke", "synthetic", "tiny-random", "PAL", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES["smoke"]["sets"]["synthetic"], "ids", "hashed")
        reproduce.run(one, places)
        twin = {**files.read_json(reproduce.result_file(one, places)), "seed": 1}  # its model is elsewhere
        write(places.results, twin)
        found = artefacts.build(places, root / "out")
    return root, places, one, found


def test_a_cell_that_was_run_is_a_folder_that_loads(made):
    root, places, one, found = made
    place = root / "out/smoke/synthetic/tiny-random/pal-0"
    assert found["model"] == found["users"] == 1 and 0 < found["largest"] < 1 << 20
    (missing,) = found["no model here"]
    assert missing.startswith("synthetic / tiny-random / PAL / seed 1: python -m experiments reproduce smoke")
    assert "pal-1" not in {folder.parent.name for folder in root.glob("out/**/model")}
    model, own = pyargs.load_model(place / "model", users=place / "users"), reproduce.model_folder(one, places) / "model"
    rows = of_split(data.load("synthetic"), "query")
    rows = rows.select(range(6))
    salt = artefacts.salt_beside(root / "out")
    asked = rows.map(lambda row: {**row, "user_id": hashed_id(row["user_id"], salt)})
    assert torch.equal(model.pair_scores(asked)[1], pyargs.load_model(own).pair_scores(rows)[1])
    accuracy = files.read_json(reproduce.result_file(one, places))["values"]["rm_accuracy"]["accuracy"]
    assert f"| RM accuracy | {accuracy:.2f} |" in (place / "model/README.md").read_text()


def test_no_byte_of_it_is_of_the_data(made):
    root, _, _, _ = made
    rows, out = data.load("synthetic"), pushed(root / "out/smoke/synthetic/tiny-random/pal-0")
    texts = {row[name] for row in rows for name in ("prompt", "chosen", "rejected")}
    assert len(texts) > 100 and len(out) > 1000
    assert not [text for text in (*texts, *set(rows["user_id"])) if str(text).encode() in out]
    assert str(root).encode() not in out
    assert (root / "out.salt").stat().st_mode & 0o077 == 0
    assert artefacts.salt_beside(root / "out").hex().encode() not in pushed(root / "out")


def test_a_model_whose_numbers_are_not_the_cell_s_is_left_out(made):
    root, places, one, _ = made
    changed = files.read_json(reproduce.result_file(one, places))
    changed["values"]["rm_accuracy"]["tie_rate"] = 12.0
    write(root / "changed", changed)
    found = artefacts.build(places._replace(results=root / "changed"), root / "other")
    assert found["model"] == 0 and "another run's" in found["no model here"][0]


@pytest.mark.parametrize(("name", "hashed"), [("pref_lamp", True), ("two_types", False)])
def test_answers_are_released_and_ids_only_where_they_may_be(name, hashed, tmp_path):
    own = cell("LoRE", set=name)
    own["answers"][0] |= {"text": None, "digest": "d", "words": 9, "copied": 8}
    folder = artefacts.generations(own, tmp_path / "generations", b"0" * 32)
    rows = list(files.read_jsonl(folder / "generations.jsonl"))
    assert [row["text"] for row in rows] == [one["text"] for one in own["answers"]]
    ids = {one[key] for one in own["answers"] for key in ("user_id", "pair_id")}
    assert bool([one for one in ids if f'"{one}"'.encode() in pushed(folder)]) != hashed
    assert len({row["user_id"] for row in rows}) == len({one["user_id"] for one in own["answers"]})
    text = DatasetCard.load(folder / "README.md").text
    licence = PROFILES["cpu"]["sets"][name]["licence"]
    assert licence in text and f"1 of {len(rows)} answers" in text
    assert f"| ROUGE-1 | {own['values']['generations']['rouge1']:.2f} | (95% over 8 users" in text


def test_every_set_says_its_licence_and_what_may_be_told_of_its_users():
    for profile in PROFILES.values():
        for settings in profile["sets"].values():
            assert settings["licence"].strip() and settings["ids"] in ("none", "hashed", "named")
    assert PROFILES["paper"]["sets"]["prism"]["ids"] == "none"  # its data card: no attempt at identifying participants


def test_the_committed_cells_become_folders(tmp_path, capsys):
    """Of one set; the models are wherever the cells were run."""
    committed = EXPERIMENTS / "results/cpu/pref_lamp/smollm2-135m"
    for file in ("lore-0.json", "zero-shot-0.json", "word-overlap-0.json"):
        files.write_json(tmp_path / "results/cpu/pref_lamp/smollm2-135m" / file, files.read_json(committed / file))
    words = ["--results", tmp_path / "results", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    assert main(["artefacts", *map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["generations"] == 2 and found["model"] == 0 and found["largest"] < 1 << 18
    assert [one.split(": ")[0] for one in found["no model here"]] == [
        f"pref_lamp / smollm2-135m / {row} / seed 0" for row in ("LoRE", "Zero-Shot")
    ]
    users = {one["user_id"] for one in results.read(tmp_path / "results")[0]["answers"]}
    assert users and not [user for user in users if f'"{user}'.encode() in pushed(tmp_path / "out")]
