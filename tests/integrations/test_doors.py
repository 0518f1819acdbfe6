"""Every kind of reward through every door: the engine's answers, or a refusal by name. docs/embedding.md has the table."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import serving
import torch
from conftest import reward_model
from decoding import engine_of
from tokens import byte_level
from transformers import LlamaConfig, LlamaForSequenceClassification, LogitsProcessorList

import pyargs
from pyargs import RewardLogitsProcessor, RewardModel
from pyargs.data import synthetic
from pyargs.errors import PyargsError
from pyargs.integrations.vllm.rows import MODEL, Guided, Row, Wish, wish_of
from pyargs.lm import lora
from pyargs.lm.loading import fingerprint, load_lm
from pyargs.lm.tokenize import left_pad
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.serve.wire import Chat
from pyargs.types import Users

ROOT = Path(__file__).parents[2]
PROMPTS, USERS = ["Hello you", "tell me more of cats"], ["ann", "bob"]
WEIGHT, LENGTH = 1.5, 8


class Pair(NamedTuple):
    """users: of the prompts, None where the model is the same for everyone."""

    policy: object
    model: object
    users: list[str] | None = USERS


# -- kinds of rewards ----------------------------------------------------------------------------------------------------


def own(folder: str, place: Path) -> tuple:
    """The policy, and another language model that a reward model may rest on."""
    return load_lm(folder)[0], load_lm(str(synthetic.tiny_lm(place / "other", seed=5)))[0]


def over(lm, tokenizer, **how) -> RewardModel:
    """A reward model over a language model's weights."""
    model = reward_model(lm, **how)
    model.tokenizer = tokenizer
    model.about |= {"backbone": lm.name_or_path, "fingerprint": fingerprint(model.backbone)}
    return model


def lora_reward(folder: str, place: Path) -> Pair:
    policy, tokenizer = load_lm(folder)
    model = over(policy, tokenizer)
    lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    for name, parameter in model.backbone.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return Pair(policy, model.eval())


def sequence_classifier(folder: str, place: Path) -> Pair:
    policy, tokenizer = load_lm(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**policy.config.to_dict() | {"num_labels": 2, "initializer_range": 0.3})
    LlamaForSequenceClassification(config).save_pretrained(place / "classifier")
    tokenizer.save_pretrained(place / "classifier")
    weights = {"ann": {"LABEL_0": 1.0}, "bob": {"LABEL_0": -1.0, "LABEL_1": 2.0}}
    return Pair(policy, RewardModel.from_sequence_classifier(str(place / "classifier"), users=weights))


def function(folder: str, place: Path) -> Pair:
    policy, tokenizer = load_lm(folder)
    reward = lambda ids, mask: torch.sin((ids * mask).sum(1).double())  # noqa: E731
    return Pair(policy, RewardModel.from_function(reward, tokenizer, device="cpu"), None)


def other_tokenizer(folder: str, place: Path) -> Pair:
    theirs = byte_level()
    other = synthetic.tiny_lm(place / "other", seed=5)
    theirs.save_pretrained(other)
    return Pair(load_lm(folder)[0], over(load_lm(str(other))[0], theirs))


def token_reward(folder: str, place: Path) -> Pair:
    policy, other = own(folder, place)
    model = TokenReward(other, policy.tokenizer)
    model.about["backbone"] = other.name_or_path
    return Pair(policy, model, None)


def mean_of_rewards(folder: str, place: Path) -> Pair:
    policy, tokenizer = load_lm(folder)
    return Pair(policy, over(policy, tokenizer, pool="mean", step_reward="prefix_mean"))


def user_policy(folder: str, place: Path) -> Pair:
    policy, tokenizer = load_lm(folder)
    torch.manual_seed(0)
    width = policy.config.hidden_size
    soft = SoftPrompt(torch.randn(1, 3, width), Users(USERS, offset=torch.randn(2, 3, width)))
    model = UserPolicy(policy, tokenizer, soft=soft).eval()
    model.about["backbone"] = folder
    return Pair(policy, model)


def few_bits(folder: str, place: Path) -> Pair:
    other = own(folder, place)[1]
    policy, tokenizer = load_lm(folder, dtype="int8")
    return Pair(policy, over(other, tokenizer))


KINDS = {
    "LoRA on the policy's weights": lora_reward,
    "a sequence classifier": sequence_classifier,
    "any function": function,
    "another tokenizer": other_tokenizer,
    "a token reward (GenARM)": token_reward,
    "a mean over the answer (`prefix_mean`)": mean_of_rewards,
    "a policy of each user (P-DPO, ICL)": user_policy,
    "a policy in `int8` or `file`": few_bits,
}


# -- doors: texts of the answers to PROMPTS ------------------------------------------------------------------------------


def texts(policy, answers) -> list[str]:
    return [policy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]


def ids(policy) -> list[list[int]]:
    return [policy.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def stops(policy) -> list[int]:
    found = policy.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


def engine(pair: Pair):
    return engine_of(None if isinstance(pair.model, UserPolicy) else pair.policy, pair.model)


def weight(pair: Pair) -> dict:
    return {} if isinstance(pair.model, UserPolicy) else {"reward_weight": WEIGHT}


def by_engine(pair: Pair, place: Path) -> list[str]:
    answers = engine(pair).generate(ids(pair.policy), pair.users, max_new_tokens=LENGTH, **weight(pair))
    return texts(pair.policy, [answer.tokens for answer in answers])


def generated(policy, **how) -> list[str]:
    rows, mask = left_pad(ids(policy), policy.tokenizer.pad_token_id)
    asked = dict(max_new_tokens=LENGTH, do_sample=False, pad_token_id=policy.tokenizer.pad_token_id)
    return texts(policy, policy.generate(rows, attention_mask=mask, **asked, **how)[:, rows.shape[1] :].tolist())


def by_guide(pair: Pair, place: Path) -> list[str]:
    return generated(pair.policy, custom_generate=pyargs.guide(pair.model, pair.users, **weight(pair)))


def by_processor(pair: Pair, place: Path) -> list[str]:
    policy, how = pair.policy, dict(reward_weight=WEIGHT, eos_token_id=stops(pair.policy), tokenizer=pair.policy.tokenizer)
    _, mask = left_pad(ids(policy), policy.tokenizer.pad_token_id)
    made = RewardLogitsProcessor(pair.model, pair.users or [""] * len(PROMPTS), attention_mask=mask, **how)
    return generated(policy, logits_processor=LogitsProcessorList([made]))


class ModelConfig(NamedTuple):
    """Of vLLM's."""

    tokenizer: str
    max_model_len: int = 256


def save(model, folder: Path) -> str:
    model.about |= {"method": "any", "fields": {}, "dtype": "float32"}
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def by_vllm(pair: Pair, place: Path) -> list[str]:
    """What both adapters call; tests/integrations/vllm has themselves."""
    policy, model = pair.policy, pair.model
    save(model, place / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODEL, str(place / "model"))
        guided = Guided("cpu", ModelConfig(policy.name_or_path))
        users = pair.users or ["anybody"] * len(PROMPTS)
        wishes = [Wish(user, WEIGHT, 10, frozenset(stops(policy))) for user in users]
        rows = [Row(wish, list(prompt)) for wish, prompt in zip(wishes, ids(policy), strict=True)]
        for _ in range(LENGTH):
            here = [row for row in rows if row.tokens[-1] not in stops(policy)]
            if not here:
                break
            logits = torch.stack([policy(torch.tensor([row.tokens])).logits[0, -1] for row in here])
            guided.guide(logits, list(enumerate(here)))
            for row, token in zip(here, logits.argmax(1).tolist(), strict=True):
                row.tokens.append(token)
    return texts(policy, [row.tokens[len(prompt) :] for row, prompt in zip(rows, ids(policy), strict=True)])


def by_lm_eval(pair: Pair, place: Path) -> list[str]:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from pyargs.integrations.lm_eval import GuidedLM

    user = (lambda doc: doc["user"]) if pair.users else ""
    guided = GuidedLM(pair.policy, pair.model, user=user, reward_weight=WEIGHT)
    asked = {"until": [], "max_gen_toks": LENGTH}
    rows = enumerate(zip(PROMPTS, pair.users or [""] * len(PROMPTS), strict=True))
    return guided.generate_until([Instance("generate_until", {"user": u}, (text, asked), i) for i, (text, u) in rows])


def by_service(pair: Pair, place: Path) -> list[str]:
    how = dict(model=serving.MODEL, max_tokens=LENGTH, temperature=0.0, extra_body=weight(pair))
    with serving.service(engine(pair)) as (_, address):
        client, users = serving.client(address), pair.users or [""] * len(PROMPTS)
        asked = zip(ids(pair.policy), users, strict=True)
        return [client.completions.create(prompt=prompt, user=user, **how).choices[0].text for prompt, user in asked]


DOORS = {"`generate`": by_guide, "processor": by_processor, "vLLM": by_vllm, "lm_eval": by_lm_eval, "HTTP": by_service}

FUNCTION, TOKENIZER, TOKENS, MEAN, POLICY, BITS = list(KINDS)[2:]
REFUSED = {
    (FUNCTION, "processor"): "take pyargs.guide",
    (FUNCTION, "vLLM"): "nothing to save",
    (TOKENIZER, "processor"): "different tokenizers",
    (TOKENIZER, "vLLM"): "different tokenizers",
    (TOKENIZER, "lm_eval"): "different tokenizers",
    (TOKENS, "processor"): "head of a RewardModel",
    (MEAN, "processor"): "mean over the answer",
    (MEAN, "vLLM"): "mean of its rewards",
    (POLICY, "`generate`"): "answers by itself",
    (POLICY, "processor"): "head of a RewardModel",
    (POLICY, "vLLM"): "answers by itself",
    (POLICY, "lm_eval"): "answers by itself|prompts of its own",
}
THEIRS = {(BITS, "processor"), (BITS, "vLLM")}
"""There the policy's passes are not ours."""


@pytest.mark.parametrize(("kind", "door"), [(kind, door) for kind in KINDS for door in DOORS if (kind, door) not in THEIRS])
def test_it_is_the_engine_or_refused_by_name(kind, door, lm_folder, tmp_path):
    pair = KINDS[kind](lm_folder, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another tokenizer is slower
        if (kind, door) in REFUSED:
            with pytest.raises((PyargsError, ValueError), match=REFUSED[kind, door]):
                DOORS[door](pair, tmp_path)
            return
        found = by_engine(pair, tmp_path)
        assert DOORS[door](pair, tmp_path) == found
    alone = engine_of(pair.policy).generate(ids(pair.policy), max_new_tokens=LENGTH)
    assert all(one != other for one, other in zip(found, texts(pair.policy, [a.tokens for a in alone]), strict=True))


def test_the_table_says_so():
    """The page's words for these kinds, door by door."""
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    said = {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows if row[0] in KINDS}
    for kind in KINDS:
        for door in DOORS:
            word = re.match(r"\[(\w+)\]", said[kind][door])[1]
            slow = "slow" if kind in (FUNCTION, TOKENIZER) else "yes"
            want = "no" if (kind, door) in REFUSED else "theirs" if (kind, door) in THEIRS else slow
            assert word == want, f"{kind}, {door}"


# -- settings and C++ ----------------------------------------------------------------------------------------------------


def asked_of_vllm(name: str):
    return wish_of(SimpleNamespace(extra_args={"pyargs_user": "ann", f"pyargs_{name}": 0.1}))


def asked_of_lm_eval(**how):
    pytest.importorskip("lm_eval")
    from pyargs.integrations.lm_eval import GuidedLM

    return GuidedLM(None, **how)


def asked_over_http(**fields):
    return Chat.model_validate({"model": "m", "messages": serving.messages("Hello"), **fields})


def asked_of_ray(**how):
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    from pyargs.ray import map_prompts

    return map_prompts(SimpleNamespace(map_batches=None), policy="any", **how)


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (lambda pair: engine(pair).generate(PROMPTS, USERS, stop=["."], reward_weight=1.0), "stop holds token ids"),
        (lambda pair: engine(pair).generate(PROMPTS, USERS, num_beams=2), "num_beams"),
        (lambda pair: asked_of_vllm("min_p"), "pyargs_min_p"),
        (lambda pair: asked_of_vllm("reward_clip"), "pyargs_reward_clip"),
        (lambda pair: asked_of_lm_eval(reward_clip=1.0), "reward_clip"),
        (lambda pair: asked_over_http(use_beam_search=True), "use_beam_search"),
        (lambda pair: asked_of_ray(num_beams=2), "num_beams"),
        (lambda pair: asked_of_ray(stop_strings=["."]), "stop_strings"),
    ],
)
def test_what_a_door_does_not_do_is_refused_by_name(ask, name, lm_folder):
    with pytest.raises((PyargsError, ValueError, TypeError), match=name):
        ask(Pair(*serving.pair(lm_folder)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != BITS])
def test_what_the_program_does_not_read_is_refused_by_name(kind, lm_folder, tmp_path, monkeypatch):
    """examples/cxx: a linear head over the policy's own weights."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "cxx"))
    import export

    pair = KINDS[kind](lm_folder, tmp_path)
    with pytest.raises(PyargsError, match="linear head|not those that|holds a|nothing to save"):
        folder = save(pair.model, tmp_path / "model")
        export.main(["--model", lm_folder, "--reward-model", folder, "--out", str(tmp_path / "out")])
