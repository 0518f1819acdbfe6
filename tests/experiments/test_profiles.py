"""What the evaluation runs: rows that may be compared, the rates of the paper and of the methods' own codes."""

from __future__ import annotations

import json

import pytest

from experiments import reproduce, rules
from experiments.__main__ import main
from pyargs.training import hooks


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu", "paper"])
def test_all_rows_of_a_set_keep_as_much_of_a_prompt(profile):
    for name, settings in reproduce.PROFILES[profile]["sets"].items():
        made = [hooks.method(row[0]).Config(**row[1]) for row in settings["rows"].values() if row is not None]
        assert len({config.max_length for config in made}) == 1, name


def test_the_papers_profile_has_its_one_rate_and_what_the_methods_own_codes_have():
    for name, settings in reproduce.PROFILES["paper"]["sets"].items():
        made = {row: hooks.method(own[0]).Config(**own[1]) for row, own in settings["rows"].items() if own is not None}
        assert {config.lora_lr for config in made.values() if hasattr(config, "lora_lr")} == {5e-5}, name
        assert made["PReF"].votes == "unit" and made["PReF"].adapt_init == made["LoRE"].adapt_init == "randn"
        assert made["P-DPO"].soft_lr == 5e-5 and made["P-DPO"].adapt_steps == 200
        rates = {config.adapt_lr for row, config in made.items() if row.startswith("LoRE")}
        assert rates == {0.5 if name == "prism" else 0.1}, "LoRE's code has another for PRISM"


def test_no_stage_of_the_gpu_profile_wants_more_than_the_others_together(places, capsys):
    """So that calls of ten minutes get through: 200 steps for P-DPO's new users alone would be four fifths of all tokens."""
    words = ["--shared", places.shared, "--work", places.work, "--results", places.results]
    assert main(["reproduce", "gpu", "--dry-run", *map(str, words)]) == 0
    plan = json.loads(capsys.readouterr().out)
    of = {line["cell"].split(" / ")[2]: line["tokens"] for line in plan["cells"]}
    assert of["P-DPO"] < plan["tokens"] / 2
    method, fields = reproduce.PROFILES["gpu"]["sets"]["pref_lamp"]["rows"]["P-DPO"]
    assert rules.hardly_adapted({"method": method, "fields": fields}), "and its row says so"


def test_sets_that_are_built_otherwise_lie_elsewhere():
    built = [one for profile in reproduce.PROFILES.values() for one in profile["sets"].values() if "build" in one]
    assert len(built) > 3 and len({one["data"][1] for one in built}) == len({tuple(one["build"]) for one in built})
