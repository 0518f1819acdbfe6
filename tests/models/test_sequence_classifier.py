"""Classifiers as reward models: rewards are the classifier's own outputs, alone, in a batch, saved, and while they guide."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_lm
from datasets import Dataset
from decoding import by_reference, chosen, engine_of, prompts, tokens
from safetensors.torch import save_file
from tokens import byte_level
from transformers import AutoConfig, AutoModelForSequenceClassification

from pyargs.cli import main
from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, encode_response, left_pad
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.models import load_model
from pyargs.models.reward_model import RewardModel
from pyargs.training.adapt import adapt

FAMILIES = ("llama", "qwen2", "gpt2", "mistral", "gemma")
PAIRS = [
    ("Why do cats purr?", "They are happy.", "No idea, ask a vet."),
    ("Why do cats purr?", "A vet knows that", "They are happy."),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "Hello!", "Hi, how are you today?"),
    ([{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two, "}], "three", "four and <|im_end|> five"),
]
PLAIN = PAIRS[:3]
"""Without the text of a control token, which transformers takes for one."""


def classifier(family: str, labels: int = 1, *, vocab: int = 0, dtype=torch.float32, **config):
    tokenizer = tiny_tokenizer()
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    if family not in ("gpt2", "bert"):
        sizes |= dict(num_key_value_heads=2, head_dim=8, intermediate_size=48)
    sizes |= dict(vocab_size=vocab or len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes | config)).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model


def rows(users=("",), pairs=PAIRS) -> Dataset:
    """Of every user all pairs. Prompts are told as messages, since a column has one type."""
    messages = lambda prompt: [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt  # noqa: E731
    return Dataset.from_list(
        [
            {"user_id": user, "prompt": messages(prompt), "chosen": chosen, "rejected": rejected}
            for user in users
            for prompt, chosen, rejected in pairs
        ]
    )


def whole(tokenizer, prompt, response) -> list[int]:
    """One conversation, as a classifier's card would read it."""
    turns = [dict(turn) for turn in prompt]
    if turns[-1]["role"] == "assistant":
        turns[-1]["content"] += response
    else:
        turns.append({"role": "assistant", "content": response})
    return tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]


@torch.no_grad()
def by_hand(model, tokenizer, data) -> torch.Tensor:
    """The classifier's logits float32 [N, 2, K] of pairs, one conversation at a time."""
    sides = [[whole(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in data]
    return torch.stack([torch.cat([model(torch.tensor([ids])).logits.float() for ids in both]) for both in sides])


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_the_classifier_s_own_outputs(family):
    own, tokenizer = classifier(family, 3), tiny_tokenizer()
    users = {"ann": {"LABEL_0": 1.0, "LABEL_2": -0.5}, "bob": {"LABEL_1": 2.0}}
    model = RewardModel.from_sequence_classifier(own, tokenizer, users=users)
    data = rows(["ann", "bob"], PLAIN)
    steps, rewards = model.pair_scores(data)
    weights = torch.tensor([[1.0, 0.0, -0.5], [0.0, 2.0, 0.0]]).repeat_interleave(len(PLAIN), 0)
    want = torch.einsum("npk,nk->np", by_hand(own, tokenizer, data), weights)
    torch.testing.assert_close(rewards, want, atol=2e-5, rtol=2e-5)
    assert steps.shape == rewards.shape and not torch.allclose(steps.float(), rewards)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("left", [False, True])
def test_rewards_are_those_of_a_padded_batch(family, left):
    own, tokenizer, data = classifier(family), tiny_tokenizer(), rows(pairs=PLAIN)
    several = [whole(tokenizer, row["prompt"], row["chosen"]) for row in data]
    ids, mask = left_pad(several, tokenizer.pad_token_id)
    if not left:
        fill = ids.shape[1]
        ids = torch.tensor([one + [tokenizer.pad_token_id] * (fill - len(one)) for one in several])
        mask = mask.flip(1)
    with torch.no_grad():
        want = own(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 0]
    rewards = RewardModel.from_sequence_classifier(own, tokenizer).pair_scores(data)[1][:, 0]
    torch.testing.assert_close(rewards, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_within_its_rounding(family):
    """Against float32 with the same weights, neither is off by more than some of bfloat16's steps at the size of a reward."""
    own, tokenizer, data = classifier(family, dtype=torch.bfloat16), tiny_tokenizer(), rows(pairs=PLAIN)
    got = RewardModel.from_sequence_classifier(own, tokenizer).pair_scores(data)[1]
    theirs, exact = by_hand(own, tokenizer, data)[..., 0], by_hand(own.float(), tokenizer, data)[..., 0]
    step = 2.0**-8 * own.score.weight.detach().abs().sum()  # a state's entries are about 1
    assert (got - exact).abs().max() < 4 * step and (theirs - exact).abs().max() < 4 * step
    assert exact.diff().abs().max() > 4 * step, "they say something"


def test_padding_behind_a_conversation_is_passed_over_as_transformers_does():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n' }}", "'<|im_end|>' }}")
    assert tokenizer.pad_token == "<|im_end|>"
    own = classifier("llama")
    model, data = RewardModel.from_sequence_classifier(own, tokenizer), rows(pairs=PLAIN)
    torch.testing.assert_close(model.pair_scores(data)[1], by_hand(own, tokenizer, data)[..., 0], atol=2e-5, rtol=2e-5)


def test_control_tokens_in_a_response_are_text_and_other_pairs_change_nothing():
    model = RewardModel.from_sequence_classifier(classifier("llama"), tiny_tokenizer())
    data = rows()
    together = model.pair_scores(data)[1]
    alone = torch.cat([model.pair_scores(data.select([i]))[1] for i in range(len(data))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    encoded, pairs = model.encode(data)
    group, _, rejected = pairs[3]
    text = model.tokenizer.decode([*encoded[group][0], *encoded[group][1][rejected]])
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text.endswith("Two, four and <|im_end|> five<|im_end|>\n")
    assert [*encoded[group][0], *encoded[group][1][rejected]].count(end) == 2  # one for each turn


def test_a_long_conversation_is_cut_as_everywhere():
    tokenizer, own = tiny_tokenizer(), classifier("llama")
    model = RewardModel.from_sequence_classifier(own, tokenizer)
    long = [("happy cats " * 40, "yes", "no, never")]
    whole = model.encode(rows(pairs=long))[0]
    model.about["max_length"] = 40
    ((prompt, several),) = model.encode(rows(pairs=long))[0]
    assert len(whole[0][0]) > 40 and max(len(prompt) + len(one) for one in several) == 40
    assert [tokenizer.decode([*prompt, *one])[-16:] for one in several] == ["t\nyes<|im_end|>\n", "never<|im_end|>\n"]


def test_accuracy_is_a_plain_loop_s_and_best_of_n_s_scores_are_the_same():
    own, tokenizer = classifier("qwen2"), tiny_tokenizer()
    model, data = RewardModel.from_sequence_classifier(own, tokenizer), rows(pairs=PLAIN)
    right = [bool(chosen > rejected) for chosen, rejected in by_hand(own, tokenizer, data)]
    rewards = model.pair_scores(data)[1]
    assert rm_accuracy(rewards, data["user_id"])["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    ids = lambda row: [encode_response(tokenizer, row[side]) for side in ("chosen", "rejected")]  # noqa: E731
    groups = [(encode_prompt(tokenizer, row["prompt"]), ids(row)) for row in data]
    torch.testing.assert_close(torch.stack(model.score(groups, [""] * 3)), rewards, atol=2e-5, rtol=2e-5)


def test_it_guides_as_the_slow_reference_does():
    policy, own = tiny_lm(dtype=torch.float64), classifier("llama", 2, vocab=61, dtype=torch.float64, pad_token_id=None)
    model = RewardModel.from_sequence_classifier(own, Words(61))
    texts, users = prompts([3, 7, 1]), ["LABEL_0", "LABEL_1", "LABEL_0"]
    wish = dict(reward_weight=1.5, num_candidates=5, stop=[1])
    got, want = chosen(policy, model, texts, users, **wish), by_reference(policy, model, texts, users, **wish)
    assert tokens(got) == tokens(want)
    assert tokens(got) != tokens(chosen(policy, model, texts, ["LABEL_1"] * 3, **wish))


class Words:
    """As much of a tokenizer as an engine with ids looks at."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def decode(self, ids, **_):
        return str(ids)


@pytest.fixture
def on_disk(tmp_path):
    own = classifier("llama", 2, id2label={0: "kind", 1: "brief"}, label2id={"kind": 0, "brief": 1})
    own.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    return own, tmp_path / "classifier"


def test_save_load_and_refuse_changed_weights(on_disk, tmp_path):
    own, folder = on_disk
    model = RewardModel.from_sequence_classifier(str(folder))
    assert list(model.known_users) == ["kind", "brief"] == model.about["labels"]
    model.users.append(["ann"], mixture=[[1.0, -2.0]])
    model.save_pretrained(tmp_path / "rm")
    again, data = load_model(tmp_path / "rm"), rows(["kind", "brief", "ann"])
    assert again.closed and again.about == model.about
    assert torch.equal(again.pair_scores(data)[1], model.pair_scores(data)[1])
    want = RewardModel.from_sequence_classifier(own, tiny_tokenizer()).pair_scores(rows(["kind"]))[1]
    torch.testing.assert_close(again.pair_scores(rows(["kind"]))[1], want, atol=1e-5, rtol=1e-5)
    policy = tiny_lm(vocab=len(tiny_tokenizer()), dtype=torch.float32)
    answers = [
        engine_of(policy, one, tokenizer=tiny_tokenizer()).generate(["Hi"], ["ann"], reward_weight=3.0, max_new_tokens=5)[0]
        for one in (model, again, str(tmp_path / "rm"))
    ]
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    config = json.loads((tmp_path / "rm/config.json").read_text())
    del config["closed"]
    (tmp_path / "rm/config.json").write_text(json.dumps(config))
    with pytest.raises(PyargsError, match="LlamaForSequenceClassification"):  # as load_lm says it
        load_model(tmp_path / "rm")
    (tmp_path / "rm/config.json").write_text(json.dumps(config | {"closed": True}))
    weights = own.state_dict()
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PyargsError, match="not those that this model was trained on"):
        load_model(tmp_path / "rm")


def test_a_strength_is_measured_when_somebody_asks(on_disk, tmp_path):
    model = RewardModel.from_sequence_classifier(str(on_disk[1]), users={"ann": {"kind": 1}})
    policy = tiny_lm(vocab=len(tiny_tokenizer()), dtype=torch.float32)
    policy.tokenizer = model.tokenizer
    policy.config.max_position_embeddings = 2048
    assert Engine(policy, model).raw_weight(1.0) > 0


def test_one_label_is_a_reward_for_everyone_or_for_who_weighs_it():
    own, tokenizer = classifier("llama"), tiny_tokenizer()
    everyone = RewardModel.from_sequence_classifier(own, tokenizer)
    assert not everyone.known_users
    against = RewardModel.from_sequence_classifier(own, tokenizer, users={"sceptic": {"LABEL_0": -1}})
    torch.testing.assert_close(against.pair_scores(rows(["sceptic"]))[1], -everyone.pair_scores(rows())[1])
    with pytest.raises(UnknownUser):
        against.pair_scores(rows(["ann"]))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problem_types_whose_labels_stand_alone(problem):
    model = RewardModel.from_sequence_classifier(classifier("llama", 2, problem_type=problem), tiny_tokenizer())
    assert list(model.known_users) == ["LABEL_0", "LABEL_1"]


def test_what_is_wrong_is_refused_by_name(on_disk, tmp_path):
    own, tokenizer = classifier("llama", 2), tiny_tokenizer()
    make = RewardModel.from_sequence_classifier
    relative = classifier("llama", 2, problem_type="single_label_classification")
    biased = classifier("llama", 1)
    biased.score.bias = torch.nn.Parameter(torch.ones(1))
    strange = classifier("llama", 1)
    vars(strange.config)["problem_type"] = "ranking"  # some transformers let nobody write that
    for call, message in [
        (lambda: make(classifier("bert"), tokenizer), "BertForSequenceClassification is no decoder"),
        (lambda: make(tiny_lm(), tokenizer), "LlamaForCausalLM is no sequence classifier"),
        (lambda: make(own), "pass tokenizer="),
        (lambda: make(own, tokenizer, dtype="bfloat16"), "keeps its dtype"),
        (lambda: make(own, tokenizer, users={"ann": {"LABEL_7": 1.0}}), "no label 'LABEL_7' .*LABEL_0"),
        (lambda: make(own, tokenizer, users={"ann": {"LABEL_0": float("nan")}}), "finite"),
        (lambda: make(own, tokenizer, users={"ann": {"LABEL_0": "much"}}), "must be numbers"),
        (lambda: make(own, tokenizer, users={"ann": 3.0}), "dict of labels"),
        (lambda: make(own, tokenizer, users={}), "users is empty"),
        (lambda: make(relative, tokenizer), "sum to 0"),
        (lambda: make(relative, tokenizer, users={"ann": {"LABEL_0": 1.0}}), "'ann' do not"),
        (lambda: make(biased, tokenizer), "bias"),
        (lambda: make(strange, tokenizer), "problem_type .*'ranking'"),
        (lambda: make(str(tmp_path / "nowhere")), "cannot load"),
        (lambda: load_lm(str(on_disk[1])), "LlamaForSequenceClassification"),
        (lambda: RewardModel(own.model, tokenizer, None, pool="mean", closed=True), "closed"),
        (lambda: adapt(make(own, tokenizer), rows(["x"]).add_column("split", ["support"] * len(PAIRS))), "LABEL_0, LABEL_1"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
    make(relative, tokenizer, users={"ann": {"LABEL_0": 1.0, "LABEL_1": -1.0}})
    lm = tmp_path / "lm"
    tiny_lm().save_pretrained(lm)
    tokenizer.save_pretrained(lm)
    with pytest.raises(PyargsError, match="LlamaForCausalLM, which is no sequence classifier"):
        make(str(lm))
    (on_disk[1] / "model.safetensors").unlink()
    torch.save(own.state_dict(), on_disk[1] / "pytorch_model.bin")
    with pytest.raises(PyargsError, match="pickled"):
        make(str(on_disk[1]))


def test_the_command_line_takes_its_folder(on_disk, tmp_path, capsys):
    """RM accuracy of its pairs, answers of a policy with another tokenizer, and no measures of these in mixed tokens."""
    own, folder = on_disk
    model = RewardModel.from_sequence_classifier(str(folder))
    model.save_pretrained(tmp_path / "rm")
    data = [{**row, "split": "query", "pair_id": f"p{i}"} for i, row in enumerate(rows(["kind"], PLAIN[:2]))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, data)))
    run = lambda *words: main([*words, "--data", str(tmp_path / "pairs.jsonl")])  # noqa: E731
    assert run("evaluate", str(tmp_path / "rm"), "--out", str(tmp_path / "r.json")) == 0
    found = json.loads((tmp_path / "r.json").read_text())["values"]["rm_accuracy"]
    want = rm_accuracy(model.pair_scores(rows(["kind"], PLAIN[:2]))[1], ["kind"] * 2)
    assert found["n"] == 2 and found["accuracy"] == want["accuracy"]
    lm = tiny_lm(vocab=len(byte_level()), dtype=torch.float32)
    lm.save_pretrained(tmp_path / "lm")
    byte_level().save_pretrained(tmp_path / "lm")
    how = ["--policy", str(tmp_path / "lm"), "--reward-weight", "2"]
    answers = str(tmp_path / "a.jsonl")
    with pytest.warns(UserWarning, match="different tokenizers"):
        assert run("decode", str(tmp_path / "rm"), *how, "--max-new-tokens", "4", "--out", answers) == 0
    more = ["--generations", answers, "--out", str(tmp_path / "e.json")]
    capsys.readouterr()
    assert run("evaluate", str(tmp_path / "rm"), *how, *more) == 1
    assert "different tokenizers" in capsys.readouterr().err
