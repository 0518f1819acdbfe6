"""Sets that are built from the hub, and options that cannot be."""

from __future__ import annotations

import pytest
from rows import DIALOGUES, lamp, prism, tldr_source

from pyargs import prepare
from pyargs.errors import PyargsError
from pyargs.prepare import pref_lamp, preferences, tldr
from pyargs.prepare import prism as prism_set


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(PyargsError, match="huggingface.co/datasets/openai/summarize_from_feedback"):
        tldr.build("hub", tldr.Config())


def test_sets_of_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub, and that the folder which comes back is read like a local one."""
    import huggingface_hub

    served = {
        "openai/summarize_from_feedback": (tldr_source(tmp_path / "tldr"), "refs/convert/parquet", tldr.Config(support=4)),
        "HannahRoseKirk/prism-alignment": (prism(tmp_path / "prism", DIALOGUES), None, prism_set.Config()),
    }

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset" and revision == served[repo][1]
        return str(served[repo][0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for module, (source, _, config) in zip((tldr, prism_set), served.values(), strict=True):
        assert module.build("hub", config) == module.build(str(source), config)


def test_options_that_cannot_be(tmp_path):
    source = lamp(tmp_path / "lamp")
    for config, message in [
        (pref_lamp.Config(embedder="none"), "neighbours need an embedder"),
        (pref_lamp.Config(near=0.0), "near is a cosine above 0"),
        (pref_lamp.Config(near=float("nan")), "near is a cosine above 0"),
    ]:
        if config.near != 0.95:
            config.embedder = "minilm"
        with pytest.raises(PyargsError, match=message):
            pref_lamp.build(str(source), config) if config.near != 0.95 else prepare.build(
                "pref_lamp", source, tmp_path / "o", config
            )
    late = pref_lamp.Config(negatives="policy", embedder="nobody/nothing", policy="nobody/else")
    with pytest.raises(PyargsError, match="cannot load the embedding model"):  # before a title is written
        prepare.build("pref_lamp", source, tmp_path / "out", late)
    with pytest.raises(PyargsError, match="no official place"):
        prepare.build("preferences", "hub", tmp_path / "out", preferences.Config(embedder="none"))
