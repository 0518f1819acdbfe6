"""A method by its name, or by its file."""

from __future__ import annotations

import pytest

from pyargs.errors import PyargsError
from pyargs.methods import global_rm
from pyargs.training import hooks, trainer


def test_a_method_can_be_a_file(tmp_path, lm_folder, pairs):
    file = tmp_path / "mine.py"
    file.write_text(open(global_rm.__file__).read())
    model = trainer.train(str(file), pairs, hooks.method(str(file)).Config(backbone=lm_folder, freeze_backbone=True, epochs=1))
    assert model.about["method"] == str(file)


def test_a_hook_by_its_old_name_is_refused(tmp_path):
    file = tmp_path / "older.py"
    file.write_text(open(global_rm.__file__).read() + "\n\ndef groups(model, config):\n    return []\n")
    with pytest.raises(PyargsError, match="called parameter_groups now"):
        hooks.method(str(file))
