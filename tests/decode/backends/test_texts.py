"""Rewards of texts of the reward model's own: a function guides as a plain loop does, which calls it on each candidate by
itself; another tokenizer's rewards are those of the whole text, encoded anew."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import reward_model, tiny_lm
from datasets import Dataset
from decoding import Words, engine_of, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokens import KINDS
from transformers import AutoConfig, AutoModelForSequenceClassification

from pyargs.data.synthetic import tiny_tokenizer
from pyargs.decode import backends
from pyargs.decode.backends.texts import Kept
from pyargs.decode.bridge import Bridge
from pyargs.decode.engine import Engine
from pyargs.decode.scorer import Scorer
from pyargs.errors import PyargsError
from pyargs.integrations.transformers import guide
from pyargs.lm.tokenize import encode_prompt, encode_response, text_ids
from pyargs.metrics.policy_accuracy import pair_scores
from pyargs.models.reward_model import RewardModel


def of_text(ids, mask):
    return torch.sin((ids * torch.arange(1, ids.shape[1] + 1) * mask).sum(1).double() * 0.37) + mask.sum(1) / 50


def alone(text) -> float:
    return of_text(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long)).item()


def by_hand(policy, prompt, weight, k, steps, eos_reward, stop):
    """The definition: (tokens, rewards)."""
    text, tokens, rewards, so_far = list(prompt), [], [], alone(prompt)
    for _ in range(steps):
        logprobs = policy(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        top = logprobs.sort(descending=True, stable=True)
        found = []
        for value, token in zip(top.values[:k].tolist(), top.indices[:k].tolist(), strict=True):
            reward = so_far if token in stop and eos_reward == "before" else alone([*text, token])
            found.append((value + weight * reward, token, reward))
        _, token, so_far = max(found, key=lambda one: one[0])
        tokens.append(token)
        rewards.append(so_far)
        text.append(token)
        if token in stop:
            break
    return tokens, rewards


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from(["before", "state"]),
    st.integers(0, 9),
    st.sampled_from([None, 3]),
)
def test_it_guides_as_a_plain_loop(rows, eos_reward, seed, prefill_tokens):
    """Rows of several lengths and numbers of candidates come and go, of which two are answered at a time."""
    policy, stop = tiny_lm(seed=seed), [1, 7, 9, 11]
    model = RewardModel.from_function(of_text, Words(61))
    engine = engine_of(policy, model, tokenizer=Words(61), max_rows=2, eos_reward=eos_reward, prefill_tokens=prefill_tokens)
    texts = prompts([length for length, *_ in rows], seed)
    asked = {
        engine.submit(text, reward_weight=2.0, num_candidates=k, max_new_tokens=steps, stop=stop): ([], text, k, steps)
        for text, (_, steps, k) in zip(texts, rows, strict=True)
    }
    while engine.busy:
        for event in engine.step():
            asked[event.number][0].append((event.token, event.reward))
    for found, text, k, steps in asked.values():
        tokens, rewards = by_hand(policy, text, 2.0, k, steps, eos_reward, stop)
        assert [token for token, _ in found] == tokens
        assert [reward for _, reward in found] == pytest.approx(rewards, abs=1e-5)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_the_policy_may_be_any(family):
    """One whose candidates cannot share a prefix, and one in float32 that the CPU stack computes."""
    policy = tiny_lm(family, dtype=torch.float32)
    engine = engine_of(policy, RewardModel.from_function(of_text, Words(61)), tokenizer=Words(61))
    (text,) = prompts([5])
    (answer,) = engine.generate([text], reward_weight=2.0, num_candidates=4, max_new_tokens=6, stop=[])
    assert answer.tokens == by_hand(policy, text, 2.0, 4, 6, "before", [])[0]


def test_an_encoder_guides_and_ranks():
    """What `from_sequence_classifier` refuses: a BERT, as any function."""
    tokenizer = tiny_tokenizer()
    size = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32, num_labels=1)
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", vocab_size=len(tokenizer), **size)
    ).eval()
    for parameter in bert.parameters():
        parameter.data.normal_(std=0.2)
    function = lambda ids, mask: bert(ids, attention_mask=mask).logits[:, 0]  # noqa: E731
    model = RewardModel.from_function(function, tokenizer, device="cpu")
    data = Dataset.from_list([{"user_id": "", "prompt": "Why?", "chosen": "happy cats", "rejected": "no"}])
    steps, rewards = model.pair_scores(data)
    prompt = encode_prompt(tokenizer, "Why?")
    for side, response in enumerate(("happy cats", "no")):
        ids = encode_response(tokenizer, response)
        with torch.no_grad():
            each = [bert(torch.tensor([[*prompt, *ids[: end + 1]]])).logits[0, 0] for end in range(len(ids))]
        assert rewards[0, side].item() == pytest.approx(each[-1].item(), abs=1e-5)
        assert steps[0, side].item() == pytest.approx(sum(map(float, each)), abs=1e-5)
    policy = tiny_lm(vocab=len(tokenizer), dtype=torch.float32)
    best = engine_of(policy, model, tokenizer=tokenizer, best_of=3).generate(["Why?"], max_new_tokens=5, seed=0, stop=[])[0]
    own = model.score([(prompt, [best.tokens])], [""])[0]
    assert max(best.rewards) == pytest.approx(own.item(), abs=1e-5)


def test_what_is_wrong_is_refused_by_name(tmp_path):
    def taste(ids, mask):
        return torch.full((len(ids),), float("nan"))

    policy, model = tiny_lm(), RewardModel.from_function(taste, Words(61))
    engine = engine_of(policy, model, tokenizer=Words(61))
    for call, message in [
        (lambda: engine.generate([[3]], reward_weight=1.0), "taste returned rewards"),
        (lambda: engine.generate([[3]]), "give reward_weight"),  # no unit of a strength
        (lambda: model.save_pretrained(tmp_path / "rm"), "nothing to save"),
        (lambda: Scorer(model), "call it in your loop"),
        (lambda: engine_of(policy, model, tokenizer=Words(61), backend="cuda-graph"), "one GPU"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()


# -- another tokenizer ---------------------------------------------------------------------------------------------------


def bridged(ours: str, theirs: str, family: str = "llama", dtype=torch.float64, seed: int = 0):
    """A policy and a reward model with tokenizers of these kinds."""
    policy = tiny_lm(vocab=len(KINDS[ours]()), seed=seed, dtype=dtype)
    policy.tokenizer = KINDS[ours]()
    model = reward_model(tiny_lm(family, vocab=len(KINDS[theirs]()), seed=seed + 1, dtype=dtype))
    model.tokenizer = KINDS[theirs]()
    return policy, model


def encoded(bridge: Bridge, prompt, answer) -> list[int]:
    """What the reward model reads of an answer, from nothing."""
    return [*prompt, *text_ids(bridge.theirs, bridge.whole(answer))]


def anew(model, bridge: Bridge, prompt, answer):
    return model.backbone(torch.tensor([encoded(bridge, prompt, answer)])).last_hidden_state[0, -1]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.sampled_from(list(KINDS)), st.sampled_from(["llama", "gpt2", "mistral"]), st.data()
)  # fmt: skip
def test_states_are_those_of_the_whole_text(ours, theirs, family, data):
    """Whatever the tokens are: rows come, go on by any candidate or stay, and leave."""
    policy, model = bridged(ours, theirs, family)
    bridge = Bridge(policy.tokenizer, model.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mistral, of which nothing is kept
        half = backends.reader(model.backbone, bridge, 3)
    assert isinstance(half, Kept) == (family != "mistral")
    token = st.one_of(st.integers(0, len(policy.tokenizer) - 1), st.sampled_from(policy.tokenizer("🙂 日 the").input_ids))
    here: list[tuple[list[int], list[int]]] = []  # prompt, answer
    for _ in range(data.draw(st.integers(1, 6))):
        if len(here) < 3 and (not here or data.draw(st.booleans())):
            prompt = data.draw(st.lists(st.integers(0, len(model.tokenizer) - 1), min_size=1, max_size=5))
            torch.testing.assert_close(half.join([prompt], 0)[0], anew(model, bridge, prompt, []))
            here.append((prompt, []))
        k = data.draw(st.integers(1, 4))
        candidates = [data.draw(st.lists(token, min_size=k, max_size=k)) for _ in here]
        states = half.branch(torch.tensor(candidates))
        for (prompt, answer), own, found in zip(here, candidates, states, strict=True):
            want = [anew(model, bridge, prompt, [*answer, one]) for one in own]
            torch.testing.assert_close(found, torch.stack(want), atol=1e-9, rtol=1e-9)
        if len(here) > 1 and data.draw(st.booleans()):  # a row leaves with its last choice, before the others go on
            gone = data.draw(st.integers(0, len(here) - 1))
            order = [place for place in range(len(here)) if place != gone]
            half.keep(order)
            here, candidates = [here[place] for place in order], [candidates[place] for place in order]
        slots = [data.draw(st.integers(-1, k - 1)) for _ in here]
        half.commit(torch.tensor([own[slot] for own, slot in zip(candidates, slots, strict=True)]), torch.tensor(slots))
        for (_, answer), own, slot in zip(here, candidates, slots, strict=True):
            if slot >= 0:
                answer.append(own[slot])


def guided_by_text(policy, model, ids, prompt, user, weight, k, steps, stop=()):
    """The definition: each candidate's text is encoded anew behind the reward model's own prompt."""
    bridge, row = Bridge(policy.tokenizer, model.tokenizer), model.users.rows([user])
    reward = lambda answer: model.head(anew(model, bridge, prompt, answer)[None], row).item()  # noqa: E731
    answer, rewards, so_far = [], [], reward([])
    for _ in range(steps):
        logprobs = policy(torch.tensor([[*ids, *answer]])).logits[0, -1].log_softmax(-1)
        top = logprobs.sort(descending=True, stable=True)
        found = []
        for value, token in zip(top.values[:k].tolist(), top.indices[:k].tolist(), strict=True):
            own = so_far if token in stop else reward([*answer, token])
            found.append((value + weight * own, token, own))
        _, token, so_far = max(found, key=lambda one: one[0])
        answer.append(token)
        rewards.append(so_far)
        if token in stop:
            break
    return answer, rewards


@pytest.mark.parametrize("ours", list(KINDS))
@pytest.mark.parametrize("theirs", ["byte level", "sentencepiece"])
def test_answers_are_those_of_the_definition(ours, theirs):
    """Text, messages, ids, and ids with the messages that they were made from; two of four rows at a time."""
    if ours == theirs:
        pytest.skip("one tokenizer goes straight")
    policy, model = bridged(ours, theirs)
    messages = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "日本 🙂"}]
    ids = encode_prompt(policy.tokenizer, messages)
    own = lambda prompt: encode_prompt(model.tokenizer, prompt)  # noqa: E731
    asked = [
        ("the cat", {}, encode_prompt(policy.tokenizer, "the cat"), own("the cat")),
        (messages, {}, ids, own(messages)),
        (ids, {}, ids, Bridge(policy.tokenizer, model.tokenizer).prompt(ids)),
        (ids, {"guide_prompt": messages}, ids, own(messages)),
        (ids, {"guide_prompt": "Hm"}, ids, own("Hm")),
        (ids, {"guide_prompt": [5, 6]}, ids, [5, 6]),
    ]
    engine = engine_of(policy, model, max_rows=2)
    wish = dict(reward_weight=4.0, num_candidates=6, max_new_tokens=8, stop=[2, 9, 20])
    numbers = [engine.submit(prompt, "ann", **more, **wish) for prompt, more, *_ in asked]
    while engine.busy:
        engine.step()
    for number, (*_, ids, prompt) in zip(numbers, asked, strict=True):
        tokens, rewards = guided_by_text(policy, model, ids, prompt, "ann", 4.0, 6, 8, (2, 9, 20))
        answer = engine.answer(number)
        stopped = len(tokens) - len(answer.tokens)
        assert stopped in (0, 1) and answer.tokens == tokens[: len(answer.tokens)]
        assert answer.rewards == pytest.approx(rewards[: len(answer.tokens)], abs=1e-4)


def test_what_is_read_is_the_text_and_the_cache_holds_most_of_it():
    """Passes are short: what the candidates' texts begin with alike is not read again."""
    policy, model = bridged("byte level", "sentencepiece")
    read = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, more: read.append(more["input_ids"].shape[1]), with_kwargs=True
    )
    bridge = Bridge(policy.tokenizer, model.tokenizer)
    half = Kept(model.backbone, 1, bridge, None)
    half.join([[5] * 40], 0)
    for token in text_ids(policy.tokenizer, "the cat sat on the mat"):
        half.branch(torch.tensor([[token, 7, 8]]))
        half.commit(torch.tensor([token]), torch.tensor([0]))
    assert read[0] == 40 and max(read[1:]) < 15 and half.rows[0].text == "the cat sat on the mat"


def test_one_message_and_the_same_tokenizer_goes_straight():
    policy, model = bridged("byte level", "sentencepiece", dtype=torch.float32)
    with pytest.warns(UserWarning, match="different tokenizers.*slower"):
        assert Engine(policy, model).pair.bridge is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = tiny_lm(vocab=len(model.tokenizer), dtype=torch.float32)
        engine = Engine(own, model, tokenizer=model.tokenizer)
        assert engine.pair.bridge is None and not engine.pair.by_text
        with pytest.raises(PyargsError, match="guide_prompt is for"):
            engine.submit("the cat", "ann", guide_prompt="the cat", reward_weight=1.0)
    policy, model = bridged("byte level", "sentencepiece", "mistral")
    with pytest.warns(UserWarning, match="keeps nothing of a text"):
        Engine(policy, model)


def test_a_function_with_another_tokenizer_and_best_of_n():
    ours, theirs = KINDS["byte level"](), KINDS["sentencepiece"]()
    policy = tiny_lm(vocab=len(ours))
    policy.tokenizer = ours
    model = RewardModel.from_function(of_text, theirs, device="cpu")
    bridge, wish = Bridge(ours, theirs), dict(max_new_tokens=6, stop=[])
    (answer,) = engine_of(policy, model).generate(["the cat"], reward_weight=3.0, num_candidates=5, **wish)
    prompt = encode_prompt(theirs, "the cat")
    want = [alone(encoded(bridge, prompt, answer.tokens[: end + 1])) for end in range(6)]
    assert answer.rewards == pytest.approx(want, abs=1e-5)
    best = engine_of(policy, model, best_of=4).generate(["the cat"], seed=3, **wish)[0]
    assert max(best.rewards) == pytest.approx(alone(encoded(bridge, prompt, best.tokens)), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_answer_beyond_the_reward_model_s_positions_ends_alone(caplog, family):
    policy, model = bridged("byte level", "sentencepiece", family)
    engine, ids = engine_of(policy, model), encode_prompt(policy.tokenizer, "🙂")
    ask = lambda prompt, weight, most: engine.submit(  # noqa: E731
        ids, "ann", guide_prompt=[5] * prompt, reward_weight=weight, stop=[], max_new_tokens=most
    )
    with pytest.raises(PyargsError, match="positions of"):
        ask(120, 1.0, 30)
    engine._rows.rows.passes.scorer.most = 30
    long, unguided, short = ask(20, 1.0, 40), ask(20, 0.0, 40), ask(2, 1.0, 4)
    while engine.busy:
        engine.step()
    with pytest.raises(PyargsError, match="not numbers"):
        engine.answer(long)
    assert len(engine.answer(unguided).tokens) == 40  # the policy's own choice needs no reward
    assert engine.answer(short).tokens == guided_by_text(policy, model, ids, [5] * 2, "ann", 1.0, 10, 4)[0]
    assert caplog.text.count("grows beyond the 30 positions") >= 2


def test_long_prompts_are_cut_alike_for_both():
    policy, model = bridged("byte level", "sentencepiece")
    model.about["max_length"] = 30
    engine = engine_of(policy, model)
    with pytest.warns(UserWarning, match="shortened"):
        request = engine.pair.request("the cat sat on the mat " * 5, "ann", reward_weight=1.0)
    assert len(request.theirs) <= 30
    said = model.tokenizer.decode(request.theirs, skip_special_tokens=True)
    said = said.removeprefix("[user]: ").removesuffix("[assistant]:").strip()
    read = policy.tokenizer.decode(request.prompt, skip_special_tokens=True)
    assert read == f"user\n{said}\nassistant\n" and len(said) > 20


def test_generate_of_transformers_reads_the_text_of_its_ids():
    policy, model = bridged("byte level", "sentencepiece")
    ids = encode_prompt(policy.tokenizer, "日本 🙂")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = guide(model, users=["ann"], reward_weight=4.0, num_candidates=6)
        inputs = dict(inputs=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        found = policy.generate(**inputs, custom_generate=loop, max_new_tokens=6, eos_token_id=None)
    prompt = Bridge(policy.tokenizer, model.tokenizer).prompt(ids)
    assert found[0, len(ids) :].tolist() == guided_by_text(policy, model, ids, prompt, "ann", 4.0, 6, 6)[0]


def test_policy_accuracy_reads_each_model_in_its_own_tokens():
    policy, model = bridged("byte level", "sentencepiece", dtype=torch.float32)
    data = Dataset.from_list([{"user_id": "ann", "prompt": "Hi", "chosen": "the cat", "rejected": "日本"}])
    scores = pair_scores(model, policy, data)
    assert scores.length.tolist() == [[len(text_ids(policy.tokenizer, text)) for text in ("the cat", "日本")]]
