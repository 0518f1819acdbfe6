"""What tests of the evaluation share: a full set of made-up results, and places of a run of the grid."""

from __future__ import annotations

from pathlib import Path

import cells as made
import pytest

from experiments import reproduce


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return made.full(tmp_path_factory.mktemp("experiments"))


@pytest.fixture
def places(tmp_path):
    return reproduce.Places(shared=tmp_path / "shared", work=tmp_path / "work", results=tmp_path / "results")
