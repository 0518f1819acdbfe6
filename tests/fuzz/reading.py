"""Entry points that read a file or two: each `prepare` writes valid ones, and gives an attempt with a spoilt copy.

An attempt raises PyargsError (refused), returns (accepted), or raises anything else: a violation. It says first what it tries.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from random import Random

import torch
from fuzz.guard import Violation
from fuzz.mutations import json_bytes, json_value, mend, some_bytes, spoil, tensors_bytes
from safetensors.torch import save_file

from pyargs import files, tuned
from pyargs.config import check_kinds
from pyargs.data import preferences, schema
from pyargs.files import read_tensors
from pyargs.publish.card import measured
from pyargs.serve.keys import Keys
from pyargs.training import hooks
from pyargs.types import Users

MODEL = files.weights_hash("/nowhere")
FOUND = {
    "reward_weight": 0.5,
    "centre": -1.25,
    "model": MODEL,
    "num_candidates": 10,
    "eos_reward": None,
    "tried": [[0.5, 1.0]],
}


def must(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def bits(tensors: dict[str, torch.Tensor]) -> dict:
    """Tensors that can be compared, NaN and all."""
    whole = lambda value: value.detach().contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return {name: (str(v.dtype), tuple(v.shape), whole(v).numpy().tobytes()) for name, v in tensors.items()}


def tuned_file(own: Path, outside: Path):
    """The file of `pyargs tune`."""
    file = own / "tune.json"

    def attempt(random: Random, said: list) -> None:
        said.append(new := json_bytes(random, FOUND, (str(outside),)))
        file.write_bytes(new)
        found = tuned.read(file, own)
        must(all(math.isfinite(found[name]) for name in ("reward_weight", "centre")), "a weight that is no number")

    return attempt, ("tune.json",)


def tuned_beside(own: Path, outside: Path):
    """What was found for each policy, in a model's folder."""
    file = own / files.TUNED

    def attempt(random: Random, said: list) -> None:
        said.append(new := json_bytes(random, {"p float32": FOUND, "q bfloat16": FOUND}, (str(outside),)))
        file.write_bytes(new)
        found = tuned.noted(own, "p", "float32")
        if found is not None:
            must(all(math.isfinite(found[name]) for name in ("reward_weight", "centre")), "a weight that is no number")
        tuned.note(own, "p", "float32", FOUND)
        must(tuned.noted(own, "p", "float32") == FOUND, "another was noted")
        tuned.keep(own, own / "other")

    (own / "other").mkdir()
    return attempt, (files.TUNED,)


def stage(own: Path, outside: Path):
    """OUT.stage.json, the record of a stage."""
    out, key = own / "out", files.stage_key({"stage": "train", "rank": 3}, {"data": "12ab"})
    out.write_text("x")
    valid = {**key, "finished": True, "seconds": 3.5}

    def attempt(random: Random, said: list) -> None:
        said.append(new := json_bytes(random, valid, (str(outside),)))
        (own / "out.stage.json").write_bytes(new)
        done = files.finished(out, key)
        must(done is None or {name: done.get(name) for name in key} == key, "the record of another stage counts as this one's")

    return attempt, ("out",)


def keys(own: Path, outside: Path):
    """The keys of a service."""
    file, token = own / "keys.json", "pyargs-" + "a" * 43
    digest = files.hashlib.sha256(token.encode()).hexdigest()
    valid = {"ops": {"sha256": "0" * 64, "admin": True}, "shop": {"sha256": digest, "users": ["ann", "shop-*"]}}

    def attempt(random: Random, said: list) -> None:
        said.append(new := json_bytes(random, valid, (str(outside), "*", "**", "f" * 64)))
        file.write_bytes(new)
        found = Keys(file).find(token)
        for user in ("ann", "shop-1", "bob", ""):
            may = found is not None and found.may(user)
            must(not may or any(allows(entry, user) for entry in json.loads(new).values()), f"{user} is anybody's")

    return attempt, ("keys.json",)


def allows(entry: dict, user: str) -> bool:
    """The slow form of `Key.may`."""
    of = entry.get("users", [])
    return bool(entry.get("admin")) or any(user == one or (one.endswith("*") and user.startswith(one[:-1])) for one in of)


def results(own: Path, outside: Path):
    """A file of `pyargs evaluate`, whose numbers go to a card."""
    (own / "model").mkdir()
    (own / "model" / "x.json").write_text("1")
    values = {"reward_weight": 0.5, "rm_accuracy": 70.0, "rm_accuracy_interval": [60.0, 80.0], "pairs": 40, "users": 4}
    inputs = {"model": files.sha256(own / "model"), "data": "ab"}
    valid = {"stage": "evaluate", "values": values, "config": {"policy": "tiny-random", "split": "query"}, "inputs": inputs}

    def attempt(random: Random, said: list) -> None:
        said.append(new := json_bytes(random, valid, (str(outside),)))
        (own / "result.json").write_bytes(new)
        json.dumps(measured([own / "result.json"], own / "model"), allow_nan=False)

    return attempt, ("result.json",)


def users(own: Path, outside: Path):
    """users.safetensors and users.json."""
    ids = ["ann", "bob", "é 3"]
    Users(ids, mixture=torch.randn(3, 4), bias=torch.randn(3, 2)).save(own)
    whole = {file.name: file.read_bytes() for file in own.iterdir()}

    def attempt(random: Random, said: list) -> None:
        mend(own, whole)
        said.append(spoil(random, own, whole, (str(outside), 10**400)))
        found = Users.load(own)
        must(len(found.ids.ids) == len(set(found.ids.ids)) == len(found), "ids that are no ids")
        again = own.parent / "again"
        found.save(again)
        other = Users.load(again)
        same = other.ids.ids == found.ids.ids and bits(dict(other.vectors)) == bits(dict(found.vectors))
        must(same, "saved again it is another table")

    return attempt, ("users.json", "users.safetensors")


def tensors(own: Path, outside: Path):
    """A safetensors file."""
    file, again = own / "x.safetensors", own / "again.safetensors"
    save_file({"a": torch.randn(3, 4), "b": torch.randn(2).half(), "c": torch.arange(3)}, file)
    valid = file.read_bytes()

    def attempt(random: Random, said: list) -> None:
        said.append(new := tensors_bytes(random, valid))
        file.write_bytes(new)
        found = read_tensors(file)
        save_file({name: value.contiguous() for name, value in found.items()}, again)
        must(bits(read_tensors(again)) == bits(found), "saved again it is another")

    return attempt, ("x.safetensors",)


ROWS = [
    {"user_id": "ann", "prompt": "tell me", "chosen": "a cat", "rejected": "a dog", "split": "train", "pair_id": "p1"},
    {"user": 7, "prompt": "tell me", "chosen": "a dog", "rejected": "a cat", "role": "support", "user_type": "t"},
    {"user_id": "ann", "prompt": "and?", "chosen": "yes", "rejected": "no", "split": "train_test", "attribute": None},
]
SAID = [{"role": "user", "content": "tell me"}]
TURNS = [{**ROWS[0], "prompt": SAID, "chosen": [{"role": "assistant", "content": "a cat"}]}, {**ROWS[1], "prompt": SAID}]
IMPLICIT = [{**TURNS[0], "prompt": None, "chosen": [*SAID, *TURNS[0]["chosen"]], "rejected": [*SAID, SAID[0]]}]


def pairs(own: Path, outside: Path):
    """Preference pairs as JSON Lines, JSON, either gzipped."""

    def attempt(random: Random, said: list) -> None:
        rows = json_value(random, random.choice((ROWS, ROWS, TURNS, IMPLICIT)), (str(outside), "support", "query", "all"))
        ending = random.choice((".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv"))
        lines = rows if isinstance(rows, list) else [rows]
        new = json.dumps(rows) if ".jsonl" not in ending else "".join(json.dumps(row) + "\n" for row in lines)
        new = new.encode()
        new = some_bytes(random, new) if random.random() < 0.2 else new
        new = gzip.compress(new, 1) if ending.endswith("gz") else new
        new = some_bytes(random, new) if random.random() < 0.05 else new
        said.append((ending, new))
        read_pairs(random, own, ending, new)

    return attempt, ("pairs",)


def parquet(own: Path, outside: Path):
    """Preference pairs as parquet: other columns, other kinds, other bytes."""
    import pyarrow
    import pyarrow.parquet

    def table(rows: list) -> bytes:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    whole = [table([{**ROWS[0], "split": split} for split in ("train", "train_test")]), table(TURNS[:1]), table(ROWS[1:2])]

    def attempt(random: Random, said: list) -> None:
        new = random.choice(whole)
        if random.random() < 0.3:
            try:
                new = table(json_value(random, ROWS[:1] * 2))
            except Exception:  # no table
                pass
        else:
            at = random.choice((0, len(new) // 2, len(new) - random.randrange(1, 400)))  # its head is at the end
            new = new[:at] + some_bytes(random, new[at:])
        said.append(new)
        read_pairs(random, own, ".parquet", new)

    return attempt, ("pairs",)


def read_pairs(random: Random, own: Path, ending: str, new: bytes) -> None:
    file = own / f"pairs{ending}"
    file.write_bytes(new)
    rows = schema.checked(preferences.read(file), where=file.name)
    files.write_jsonl(own / "again.jsonl", rows)
    must(schema.checked(preferences.read(own / "again.jsonl")) == rows, "written again they are other rows")
    carved = schema.carve(rows)
    must([row["pair_id"] for row in carved] == [row["pair_id"] for row in rows], "rows were lost")
    if random.random() < 0.02:
        must(len(preferences.load(file)) == len(rows), "another Dataset")


def gguf(own: Path, outside: Path):
    """The head of a GGUF file, before a model is made of it."""
    from pyargs.lm.bits import check_gguf

    file, valid = tiny_gguf(own)
    own_names = ("model.gguf",)

    def attempt(random: Random, said: list) -> None:
        said.append(new := some_bytes(random, valid))
        file.write_bytes(new)
        check_gguf(file)

    return attempt, own_names


def tiny_gguf(folder: Path, kinds="Q4_1") -> tuple[Path, bytes]:
    from gguf_files import write_gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    from pyargs.lm.loading import load_lm

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config = AutoConfig.for_model("llama", vocab_size=len(load_lm("tiny-random")[1]), max_position_embeddings=128, **sizes)
    file = write_gguf(folder, AutoModelForCausalLM.from_config(config), kinds)
    return file, file.read_bytes()


def settings_of_a_model(own: Path, outside: Path):
    """config.json, tokenizer_config.json, modules.json and an index, before transformers reads them."""
    from pyargs.lm.inert import check_inert

    parts = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    parts.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    config = {"model_type": "llama", "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"], "text_config": {"x": 1}}
    values = {"config.json": config, "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}, "modules.json": parts}
    values["model.safetensors.index.json"] = index
    whole = {name: json.dumps(value).encode() for name, value in values.items()}
    more = (
        str(outside),
        f"{outside}/a.safetensors",
        "auto_map",
        "kernels/x",
        "torch.nn.modules.x",
        "sentence_transformers.os",
    )

    def attempt(random: Random, said: list) -> None:
        mend(own, whole)
        said.append(spoil(random, own, whole, more))
        check_inert(own)
        text = "".join(file.read_text() for file in own.iterdir() if file.is_file())
        must('"auto_map"' not in text.replace('"auto_map"]', "").replace('["auto_map"', "") or "x" in text, "code is named")

    return attempt, tuple(whole)


def configs(own: Path, outside: Path):
    """The settings of each method, as Python gives them."""
    kinds = [hooks.method(name).Config for name in hooks.names()]

    def attempt(random: Random, said: list) -> None:
        kind = random.choice(kinds)
        valid = dataclasses.asdict(kind())
        fields = json_value(random, valid)
        fields = {name: fields[name] for name in valid if name in fields} if isinstance(fields, dict) else {}
        said.append((kind.__module__, {name: value for name, value in fields.items() if value != valid[name]}))
        made = kind(**fields)
        now = dataclasses.asdict(made)
        must(dataclasses.asdict(kind(**now)) == now, "made again it is another")
        for name, value in now.items():
            must(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}")
            must(value is None or valid[name] is None or isinstance(value, type(valid[name]))
                 or isinstance(valid[name], float), f"{name} is a {type(value).__name__}")  # fmt: skip

    return attempt, tuple({field.name for kind in kinds for field in dataclasses.fields(kind)})


def described_kinds(own: Path, outside: Path):
    """`check_kinds` on values of any kind."""
    kinds = {"a": int, "b": float, "c": dict[str, list[int]], "d": str | None, "e": list[dict[str, str]], "f": bool}
    valid = {"a": 1, "b": 2.5, "c": {"x": [1]}, "d": None, "e": [{"k": "v"}], "f": True}

    def attempt(random: Random, said: list) -> None:
        said.append(value := json_value(random, valid))
        check_kinds(value, kinds, "here")
        must(math.isfinite(value["b"]) and type(value["a"]) is int and type(value["f"]) is bool, "another kind")

    return attempt, ("here",)
