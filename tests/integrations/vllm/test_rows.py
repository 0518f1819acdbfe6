"""Guided requests inside vLLM, by fakes of its two interfaces: rows that come, go and move get the engine's own tokens."""

from __future__ import annotations

import importlib
import random
import sys
import types
import warnings
from enum import Enum, auto
from math import inf
from typing import NamedTuple

import pytest
import serving
import small
import torch
from conftest import reward_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokens import byte_level

from pyargs.data import synthetic
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.models.token_reward import TokenReward
from pyargs.ops.topk_logprobs import MAX_K
from pyargs.training.hooks import method

EOS = 0


class Params(NamedTuple):
    """Of vLLM's SamplingParams what a processor reads."""

    extra_args: dict | None
    all_stop_token_ids: frozenset = frozenset({EOS})


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


class BatchUpdate(NamedTuple):
    batch_size: int
    removed: list
    added: list
    moved: list


class LogitsProcessor:
    """The base of both interfaces."""


class Held(NamedTuple):
    """A tensor of a model runner."""

    gpu: torch.Tensor


class States(NamedTuple):
    device: str
    all_token_ids: Held


class Context(NamedTuple):
    expanded_idx_mapping: torch.Tensor
    pos: torch.Tensor


class ModelConfig(NamedTuple):
    tokenizer: str
    max_model_len: int = 512


class Config(NamedTuple):
    model_config: ModelConfig
    speculative_config: object = None


def config_of(policy, **more) -> Config:
    return Config(ModelConfig(policy.name_or_path, **more))


@pytest.fixture(scope="module")
def guides():
    """The two classes, with vLLM's interfaces as fakes."""
    fakes = {}
    for name in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            fakes.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        fakes[name].LogitsProcessor = LogitsProcessor
        fakes[name].MoveDirectionality = MoveDirectionality
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        for version in ("v1", "v2"):
            patch.delitem(sys.modules, f"pyargs.integrations.vllm.{version}", raising=False)
        yield {version: importlib.import_module(f"pyargs.integrations.vllm.{version}").Guide for version in ("v1", "v2")}
        for version in ("v1", "v2"):
            patch.delitem(sys.modules, f"pyargs.integrations.vllm.{version}", raising=False)


def saved(model, lm_folder: str, folder) -> str:
    model.about |= {"backbone": lm_folder, "dtype": "float32"}
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(lm_folder, tmp_path_factory):
    """(policy, {name: (folder, model)})"""
    place = tmp_path_factory.mktemp("models")
    policy, head = serving.pair(lm_folder)
    token = TokenReward(serving.pair(lm_folder)[0], policy.tokenizer)
    head.about |= {"method": "lore", "fields": {}}
    token.about |= {"method": "genarm", "fields": {}}
    return policy, {
        "head": (saved(head, lm_folder, place / "head"), head),
        "tokens": (saved(token, lm_folder, place / "tokens"), token),
    }


class Asked(NamedTuple):
    prompt: list[int]
    extra: dict | None
    length: int


@torch.no_grad()
def next_logits(policy, texts: list[list[int]]) -> torch.Tensor:
    return torch.stack([policy(input_ids=torch.tensor([text])).logits[0, -1].float() for text in texts])


def run_v1(guide, policy, asked: list[Asked], rows: int, draw: random.Random) -> list[list[int]]:
    """As the V1 runner: a dense batch, gaps filled by the last rows, and now and then two that change places."""
    processor, batch, left = guide(config_of(policy), "cpu", False), [], list(enumerate(asked))
    outputs: list[list[int]] = [[] for _ in asked]
    while left or batch:
        removed = [at for at, number in enumerate(batch) if done(asked[number], outputs[number])]
        added, moved = [], []
        free = list(removed)
        while left and len(batch) - len(removed) + len(added) < rows and draw.random() < 0.6:
            number, one = left.pop(0)
            index = free.pop(0) if free else len(batch)
            batch[index : index + 1] = [number]
            added.append((index, Params(one.extra), one.prompt, outputs[number]))
        for index in sorted(free):
            while batch and len(batch) - 1 in free:
                free.remove(len(batch) - 1)
                batch.pop()
            if index in free and index < len(batch):
                moved.append((len(batch) - 1, index, MoveDirectionality.UNIDIRECTIONAL))
                free.remove(index)
                batch[index] = batch.pop()
        if len(batch) > 1 and draw.random() < 0.4:
            one, other = draw.sample(range(len(batch)), 2)
            batch[one], batch[other] = batch[other], batch[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        processor.update_state(BatchUpdate(len(batch), removed, added, moved) if removed or added or moved else None)
        if batch:
            logits = processor.apply(next_logits(policy, [asked[n].prompt + outputs[n] for n in batch]))
            for number, token in zip(batch, logits.argmax(1).tolist(), strict=True):
                if not done(asked[number], outputs[number]):
                    outputs[number].append(token)
    return outputs


def run_v2(guide, policy, asked: list[Asked], rows: int, draw: random.Random) -> list[list[int]]:
    """As Model Runner V2: slots that are used again, rows in any order, and answers that are taken out and come back."""
    tokens = torch.zeros(rows, 512, dtype=torch.int32)
    processor = guide(config_of(policy), States("cpu", Held(tokens)))
    outputs, left, slots = [[] for _ in asked], list(range(len(asked))), {}
    while left or slots:
        for slot in [slot for slot, number in slots.items() if done(asked[number], outputs[number])]:
            del slots[slot]
        if slots and draw.random() < 0.1:
            left.append(slots.pop(draw.choice(list(slots))))  # preempted
        for slot in set(range(rows)) - set(slots):
            if left and draw.random() < 0.7:
                slots[slot] = number = left.pop(0)
                assert processor.add_request(slot, Params(asked[number].extra)) == (asked[number].extra is not None)
        order = draw.sample(list(slots), len(slots))
        if not order:
            continue
        texts = [asked[slots[slot]].prompt + outputs[slots[slot]] for slot in order]
        for slot, text in zip(order, texts, strict=True):
            tokens[slot, : len(text)] = torch.tensor(text)
        context = Context(torch.tensor(order), torch.tensor([len(text) - 1 for text in texts]))
        logits = processor.apply(next_logits(policy, texts), context)
        for slot, token in zip(order, logits.argmax(1).tolist(), strict=True):
            outputs[slots[slot]].append(token)
    return outputs


def done(one: Asked, output: list[int]) -> bool:
    return len(output) >= one.length or (output and output[-1] == EOS)


def engines(policy, model, asked: list[Asked]) -> list[list[int]]:
    """What the engine answers, with the stop token where there is one."""
    found = []
    for one in asked:
        if one.extra is None:
            engine, user, wish = Engine(policy), "", {}
        else:
            engine, user = Engine(policy, model), one.extra["pyargs_user"]
            wish = {"reward_weight": one.extra.get("pyargs_reward_weight", 1.0)}
            wish["num_candidates"] = one.extra.get("pyargs_num_candidates", 10)
        answer = engine.generate([one.prompt], [user], max_new_tokens=one.length, stop=[EOS], **wish)[0]
        found.append([*answer.tokens, *([EOS] if answer.finish_reason == "stop" else [])])
    return found


REQUEST = st.builds(
    Asked,
    st.lists(st.integers(2, 60), min_size=1, max_size=9),
    st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {"pyargs_user": st.sampled_from(serving.USERS)},
            optional={"pyargs_reward_weight": st.sampled_from([0.0, 0.4, 2.0]), "pyargs_num_candidates": st.integers(1, 12)},
        ),
    ),
    st.integers(1, 7),
)


@pytest.mark.parametrize("kind", ["head", "tokens"])
@pytest.mark.parametrize("version", ["v1", "v2"])
@settings(max_examples=12, deadline=None)
@given(asked=st.lists(REQUEST, min_size=1, max_size=6), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_tokens_are_the_engines_whoever_comes_goes_and_moves(guides, models, kind, version, asked, rows, seed):
    policy, (folder, model) = models[0], models[1][kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYARGS_VLLM_MODEL", folder)
        run = run_v1 if version == "v1" else run_v2
        assert run(guides[version], policy, asked, rows, random.Random(seed)) == engines(policy, model, asked)


def test_more_rows_than_there_were_places_for(guides, models):
    policy, (folder, model) = models[0], models[1]["head"]
    asked = [Asked([5 + i, 9, 11], {"pyargs_user": "bob"}, 2 + i % 3) for i in range(19)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYARGS_VLLM_MODEL", folder)
        assert run_v1(guides["v1"], policy, asked, 19, random.Random(1)) == engines(policy, model, asked)


def test_what_is_forbidden_stays_forbidden(guides, models, monkeypatch):
    """A grammar has masked tokens before: they are no candidates that win."""
    policy, (folder, _) = models[0], models[1]["head"]
    monkeypatch.setenv("PYARGS_VLLM_MODEL", folder)
    processor = guides["v1"](config_of(policy), "cpu", False)
    processor.update_state(
        BatchUpdate(1, [], [(0, Params({"pyargs_user": "ann", "pyargs_reward_weight": 50.0}), [5, 9], [])], [])
    )
    logits = torch.full((1, len(policy.tokenizer)), -torch.inf)
    logits[0, [7, 8]] = torch.tensor([0.0, 1.0])
    found = processor.apply(logits)
    assert found.isfinite().nonzero()[:, 1].tolist() == [7, 8]


def test_who_asks_wrongly_is_refused_when_the_request_comes(guides, models, monkeypatch):
    monkeypatch.setenv("PYARGS_VLLM_MODEL", models[1]["head"][0])
    for guide in guides.values():
        guide.validate_params(Params(None))
        guide.validate_params(Params({"other": 1}))
        guide.validate_params(Params({"pyargs_user": "ann"}))
        for extra, said in (
            ({"pyargs_user": "anne"}, "no user 'anne' .*Did you mean: ann"),
            ({"pyargs_user": 3}, "a str"),
            ({"pyargs_reward_weight": 2.0}, "name the user"),
            ({"pyargs_user": "ann", "pyargs_reward_weight": float("nan")}, "finite number"),
            *(
                ({"pyargs_user": "ann", "pyargs_num_candidates": k}, f"1 to {MAX_K}")
                for k in (0, MAX_K + 1, 2.5, "5", [5], inf)
            ),
            ({"pyargs_user": "ann", "pyargs_strength": 1.0}, "there is no 'pyargs_strength'"),
        ):
            with pytest.raises(ValueError, match=said):
                guide.validate_params(Params(extra))
    monkeypatch.delenv("PYARGS_VLLM_MODEL")
    with pytest.raises(ValueError, match="set PYARGS_VLLM_MODEL"):
        guides["v1"].validate_params(Params({"pyargs_user": "ann"}))
    with pytest.raises(ValueError, match="does not speculate"):
        guides["v2"](Config(ModelConfig("any"), object()), States("cpu", Held(torch.zeros(1, 1))))


@pytest.mark.parametrize("kind", ["head", "tokens"])
def test_a_model_that_does_not_fit_is_refused_at_the_start(guides, models, kind, lm_folder, tmp_path, monkeypatch):
    """And not by an error that ends the batch of whoever asks first."""
    policy, (folder, _) = models[0], models[1][kind]
    start = lambda config: guides["v1"](config, "cpu", False)  # noqa: E731
    monkeypatch.setenv("PYARGS_VLLM_MODEL", folder)
    start(config_of(policy, max_model_len=2048))
    with pytest.raises(ValueError, match="--max-model-len 2048"):
        start(config_of(policy, max_model_len=2049))
    byte_level().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="different tokenizers"):
        start(Config(ModelConfig(str(tmp_path / "other"))))
    with pytest.warns(UserWarning, match="whether vLLM's tokenizer is that"):  # none is there, where vLLM is given ids alone
        start(Config(ModelConfig(str(tmp_path))))

    windowed = str(synthetic.tiny_lm(tmp_path / "lm", family="mistral", sliding_window=4))
    lm, tokenizer = load_lm(windowed)
    model = TokenReward(lm, tokenizer) if kind == "tokens" else reward_model(lm)
    model.about |= {"method": kind, "fields": {}}
    monkeypatch.setenv("PYARGS_VLLM_MODEL", saved(model, windowed, tmp_path / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that candidates are copied
        with pytest.raises(ValueError, match="come in and go on together"):
            start(config_of(policy))


def test_a_model_that_ranks_whole_answers_is_refused_at_the_start(guides, models, lm_folder, tmp_path, monkeypatch):
    small.saved(
        method("pal"), small.config_of("pal", lm_folder, variant="B", freeze_backbone=True), tmp_path / "pal", lm_folder
    )
    monkeypatch.setenv("PYARGS_VLLM_MODEL", str(tmp_path / "pal"))
    with pytest.raises(PyargsError, match="guides no decoder"):
        guides["v1"](config_of(models[0]), "cpu", False)


def test_a_user_who_comes_into_the_folder_is_served(guides, models, lm_folder, tmp_path, monkeypatch):
    policy, model = serving.pair(lm_folder)
    model.about |= {"method": "lore", "fields": {}}
    monkeypatch.setenv("PYARGS_VLLM_MODEL", saved(model, lm_folder, tmp_path / "model"))
    asked = [Asked([5, 9, 11], {"pyargs_user": user}, 6) for user in ("dora", "bob")]

    def guide(*given):
        made = guides["v1"](*given)
        model.users.append(["dora"], mixture=torch.tensor([[9.0, -9.0, 4.0]]))
        saved(model, lm_folder, tmp_path / "model")
        return made

    found = run_v1(guide, policy, asked, 2, random.Random(0))
    assert found == engines(policy, model, asked) and found[0] != found[1]
