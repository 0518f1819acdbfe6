"""Backbones and sentence encoders from strangers: nothing of theirs is run or unpickled, and the refusal says why."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.lm.embed import embed
from pyargs.lm.inert import check_inert
from pyargs.lm.loading import load_lm


@pytest.fixture
def lm(tmp_path) -> Path:
    """Folder of a backbone."""
    return Path(synthetic.tiny_lm(tmp_path / "lm", layers=1, width=32))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_backbone_names_is_refused(lm, trap, file):
    (lm / "evil.py").write_text(trap[0])
    change(lm / file, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(PyargsError, match="auto_map"):
        load_lm(str(lm))
    change(lm / file, auto_map=None, model_type="their-own", tokenizer_class="Theirs")
    with pytest.raises(PyargsError):
        load_lm(str(lm))
    assert not trap[1].exists()


def test_kernels_of_the_hub_are_refused(lm):
    change(lm / "config.json", attn_implementation="someone/their-kernel")
    with pytest.raises(PyargsError, match="attn_implementation"):
        load_lm(str(lm))


@pytest.mark.parametrize("where", ["text_config", "model_kwargs", ""])
@pytest.mark.parametrize("file", ["config.json", "sentence_bert_config.json"])
def test_kernels_are_refused_wherever_they_stand(lm, file, where):
    if not (lm / file).exists():
        (lm / file).write_text("{}")
    fields = {"attn_implementation": "someone/their-kernel", "allow_all_kernels": True}
    change(lm / file, **({where: fields} if where else fields))
    for load in (lambda: load_lm(str(lm)), lambda: embed(str(lm), ["text"])):
        with pytest.raises(PyargsError, match="attn_implementation"):
            load()


@pytest.mark.parametrize("name", ["evil.bin", "../outside.safetensors", "/outside.safetensors", 3])
def test_an_index_names_safetensors_of_its_folder(lm, trap, name):
    (lm / "model.safetensors").rename(lm.parent / "outside.safetensors")
    torch.save({"lm_head.weight": torch.zeros(1)}, lm / "evil.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (lm / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PyargsError, match=r"index\.json"):
        load_lm(str(lm))


def test_a_tokenizer_that_is_none_is_refused(lm):
    change(lm / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    # Or transformers itself refuses: 5.17 finds no two configs for RAG's two.
    with pytest.raises(PyargsError, match="no tokenizer of a language model|type rag cannot be instantiated"):
        load_lm(str(lm))


def test_pickled_weights_of_a_backbone_are_refused(lm, trap):

    class Trap:
        def __reduce__(self):
            return (exec, (trap[0],))

    (lm / "training_args.bin").write_bytes(pickle.dumps(Trap()))
    load_lm(str(lm))  # nothing reads it, and every folder of the Trainer has one
    (lm / "model.safetensors").rename(lm / "pytorch_model.bin")
    (lm / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PyargsError, match="pickled weights"):
        load_lm(str(lm))
    assert not trap[1].exists()


@pytest.mark.parametrize(
    "module",
    [
        {"type": "evil.Evil", "path": ""},
        {"type": "os.system", "path": ""},
        {"type": "sentence_transformers.util.http_get", "path": ""},
        {"type": "sentence_transformers.models.Transformer", "path": "../../elsewhere"},
        {"type": None},
    ],
)
def test_modules_of_a_sentence_encoder_are_known_ones(lm, trap, module):
    (lm / "evil.py").write_text(trap[0])
    (lm / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", **module}]))
    with pytest.raises(PyargsError, match=r"modules\.json"):
        embed(str(lm), ["text"])
    assert not trap[1].exists()


def test_the_parts_of_a_sentence_encoder_are_checked_behind_links_too(lm, tmp_path):
    (lm / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]))
    (tmp_path / "elsewhere").mkdir()
    (lm / "2_Dense").symlink_to(tmp_path / "elsewhere")
    for name, text, named in (
        ("config.json", '{"activation_function": "os.system"}', "activation_function"),
        ("pytorch_model.bin", "", "pickled"),
        ("adapter_config.json", '{"base_model_name_or_path": "someone/else"}', "is an adapter"),
    ):
        (tmp_path / "elsewhere" / name).write_text(text)
        with pytest.raises(PyargsError, match=named):
            embed(str(lm), ["text"])
        (tmp_path / "elsewhere" / name).unlink()


def test_a_dense_layer_names_no_function(lm):
    (lm / "2_Dense").mkdir()
    (lm / "2_Dense/config.json").write_text(json.dumps({"activation_function": "os.system"}))
    with pytest.raises(PyargsError, match="activation_function"):
        check_inert(lm)
    change(lm / "2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh")
    check_inert(lm)
