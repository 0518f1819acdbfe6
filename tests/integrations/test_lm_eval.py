"""lm_eval's requests: scores are the decoder's own sums, answers the engine's, whole tasks have a user for each document."""

from __future__ import annotations

import json

import pytest
import serving
import torch

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError, UnknownUser
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import UserPolicy

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

from pyargs.integrations.lm_eval import GuidedLM  # noqa: E402

PAIRS = [("Hello you", " are kind"), ("tell me", " more of it"), ("", "alone"), ("a b c ", "d"), ("x" * 3000, " y")]
WEIGHT = 0.7


@pytest.fixture(scope="module")
def pair(lm_folder):
    return serving.pair(lm_folder)


def asked(kind: str, *arguments, user: str = "ann") -> Instance:
    return Instance(kind, {"user": user}, arguments, 0)


def scores(guided: GuidedLM, pairs=PAIRS) -> list[tuple[float, bool]]:
    return guided.loglikelihood([asked("loglikelihood", *pair) for pair in pairs])


@torch.no_grad()
def sums(guided: GuidedLM, policy, model, context: str, continuation: str, user: str) -> tuple[float, float]:
    """Sums of log pi and of r over the continuation's tokens, from whole passes of transformers."""
    before, after = guided._pair(context, continuation)
    before = before[-(guided.max_length - len(after)) :]
    ids = torch.tensor([before + after])
    logprobs = policy(input_ids=ids).logits[0].float().log_softmax(-1)[len(before) - 1 : -1]
    states = model.backbone(input_ids=ids).last_hidden_state[0, len(before) :]
    rewards = model.head(states, model.users.rows([user] * len(after)))
    return logprobs.gather(1, torch.tensor(after).unsqueeze(1)).double().sum().item(), rewards.double().sum().item()


def test_a_policy_alone_gives_its_log_likelihoods(pair):
    policy, model = pair
    for guided in (GuidedLM(policy), GuidedLM(policy, model, user="ann", reward_weight=0.0)):
        want = [sums(guided, policy, model, *pair, "ann")[0] for pair in PAIRS]
        assert [score for score, _ in scores(guided)] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("user", ["ann", "bob"])
def test_a_guided_score_is_the_sum_of_log_pi_and_w_r(pair, user):
    policy, model = pair
    guided = GuidedLM(policy, model, user=user, reward_weight=WEIGHT)
    parts = [sums(guided, policy, model, *pair, user) for pair in PAIRS]
    assert [score for score, _ in scores(guided)] == pytest.approx([own + WEIGHT * r for own, r in parts], abs=1e-3)


def test_a_token_reward_guides_too(pair, lm_folder):
    policy, _ = pair
    reward = TokenReward(serving.pair(lm_folder)[0], policy.tokenizer)
    alone, guided = scores(GuidedLM(policy)), scores(GuidedLM(policy, reward, reward_weight=0.5))
    assert [score for score, _ in guided] == pytest.approx([1.5 * score for score, _ in alone], abs=1e-3)


def test_greedy_is_what_the_engine_answers(pair):
    policy, model = pair
    guided = GuidedLM(policy, model, user="ann", reward_weight=WEIGHT)
    ids = guided.tok_encode("Hello you")
    tokens = Engine(policy, model).generate([ids], ["ann"], reward_weight=WEIGHT, max_new_tokens=3, stop=[])[0].tokens
    other = [tokens[0], tokens[1], (tokens[2] + 1) % len(policy.tokenizer)]
    found = guided._loglikelihood_tokens([(("", ""), ids, one) for one in (tokens, other)], users=["ann"] * 2)
    assert [greedy for _, greedy in found] == [True, False]


def test_whole_texts_have_likelihoods_of_the_policy_alone(pair):
    policy, model = pair
    text = "Hello you are kind"
    (found,) = GuidedLM(policy).loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    ((want, _),) = scores(GuidedLM(policy), [("", text)])
    assert found == pytest.approx(want, abs=1e-3)
    with pytest.raises(PyargsError, match="scores, not log-likelihoods: ask for reward_weight=0"):
        GuidedLM(policy, model, user="ann").loglikelihood_rolling([asked("loglikelihood_rolling", text)])


def test_answers_are_the_engines_up_to_the_first_stop_string(pair):
    policy, model = pair
    guided = GuidedLM(policy, model, user=lambda doc: doc["user"], reward_weight=WEIGHT)
    contexts = [("Hello you", "ann"), ("Hello you", "bob"), ("tell me", "cid")]
    wish = {"reward_weight": WEIGHT, "max_new_tokens": 12}
    prompts = [guided.tok_encode(context) for context, _ in contexts]
    answers = Engine(policy, model).generate(prompts, [user for _, user in contexts], **wish)
    whole = [policy.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
    stops = [text[len(text) // 2 :][:2] for text in whole]
    ask = lambda until: guided.generate_until(  # noqa: E731
        [
            asked("generate_until", context, {"until": [one] if until else [], "max_gen_toks": 12}, user=user)
            for (context, user), one in zip(contexts, stops, strict=True)
        ]
    )
    assert ask(False) == whole
    assert ask(True) == [text.partition(stop)[0] for text, stop in zip(whole, stops, strict=True)]


def test_sampling_of_a_task_is_the_engines(pair):
    policy, model = pair
    guided = GuidedLM(policy, model, user="ann", reward_weight=WEIGHT)
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    (found,) = guided.generate_until([asked("generate_until", "Hello you", {**how, "until": [], "max_gen_toks": 8})])
    prompt, wish = guided.tok_encode("Hello you"), {"temperature": 0.8, "top_p": 0.9, "seed": [5]}
    (want,) = Engine(policy, model).generate([prompt], ["ann"], reward_weight=WEIGHT, max_new_tokens=8, **wish)
    assert found == policy.tokenizer.decode(want.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.2}, {"top_k": 5}, {"num_beams": 4}])
def test_what_the_engine_does_not_do_is_refused_by_name(pair, how):
    with pytest.raises(PyargsError, match=next(iter(how))):
        GuidedLM(pair[0]).generate_until([asked("generate_until", "Hello", {**how, "do_sample": True, "until": []})])


def test_who_is_unknown_is_refused_at_once(pair, lm_folder):
    policy, model = pair
    with pytest.raises(UnknownUser):
        GuidedLM(policy, model, user="dora")
    with pytest.raises(PyargsError, match="UserPolicy writes prompts of its own"):
        GuidedLM(None, UserPolicy(policy, policy.tokenizer))


TASK = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}}


def task(name: str, tmp_path, **more) -> ConfigurableTask:
    file = tmp_path / f"{name}.jsonl"
    docs = [{"user": user, "question": question} for user in ("ann", "bob") for question in ("Hello you", "tell me", "who")]
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return ConfigurableTask(config={"task": name, **TASK, "dataset_kwargs": {"data_files": {"test": str(file)}}, **more})


def test_whole_tasks_run_with_a_user_for_each_document(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    policy, model = pair
    guided = GuidedLM(policy, model, user=lambda doc: doc["user"], reward_weight=WEIGHT)
    choices = ["yes", "no", "more"]
    choose = task(
        "choose", tmp_path, output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice=choices, doc_to_target=1
    )
    write = task(
        "write", tmp_path, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{question}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
    )  # fmt: skip
    found = lm_eval.simple_evaluate(model=guided, tasks=[choose, write], bootstrap_iters=0, log_samples=True)
    right = []
    for sample in found["samples"]["choose"]:
        user, question = sample["doc"]["user"], sample["doc"]["question"]
        parts = [sums(guided, policy, model, question, f" {choice}", user) for choice in choices]
        want = [own + WEIGHT * reward for own, reward in parts]
        assert [score for ((score, _),) in sample["resps"]] == pytest.approx(want, abs=1e-3)
        right.append(max(range(3), key=want.__getitem__) == 1)
    assert found["results"]["choose"]["acc,none"] == pytest.approx(sum(right) / len(right))
    wish = {"reward_weight": WEIGHT, "max_new_tokens": 6}
    for sample in found["samples"]["write"]:
        prompt = guided.tok_encode(sample["doc"]["question"])
        (answer,) = Engine(policy, model).generate([prompt], [sample["doc"]["user"]], **wish)
        text = policy.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert sample["resps"] == [[text.partition("\n")[0]]]
