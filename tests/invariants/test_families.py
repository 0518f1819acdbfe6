"""Families of models against a slow oracle: float64, without cache, padding or batch, the whole text for each candidate."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import reward_model
from decoding import USERS, by_reference, chosen, prompts, tokens
from families import DOCUMENTED, FAMILIES, QUICK, SIZES, random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.data import synthetic
from pyargs.decode.engine import Engine
from pyargs.decode.policy import Policy
from pyargs.decode.scorer import Scorer
from pyargs.lm.cache import can_branch
from pyargs.lm.forward import token_logprobs
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import pack
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.ops.library import has_extension
from pyargs.scoring import response_logprobs, response_states
from pyargs.training import hooks, trainer
from pyargs.types import Users

EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]


class Oracle:
    """Log-probs and states of a text, float64, each in a pass of its own."""

    def __init__(self, model):
        self.model, self.kept = copy.deepcopy(model).double(), {}

    def __call__(self, text: list[int]) -> torch.Tensor:
        """Of a causal language model the log-probs [V] of the next token, of a decoder the states [T, D]."""
        if tuple(text) not in self.kept:
            with torch.no_grad():
                output = self.model(input_ids=torch.tensor([text]), use_cache=False)
            logits = "logits" in output
            self.kept[tuple(text)] = output.logits[0, -1].log_softmax(-1) if logits else output.last_hidden_state[0]
        return self.kept[tuple(text)]


def follows(found, rows, score, reward, k: int = 3) -> None:
    """Every token is the best of the k likeliest behind the row's own text, or within rounding of it, with its reward."""
    for row, (answer, _, rewards) in zip(rows, found, strict=True):
        for n, (token, value) in enumerate(zip(answer, rewards, strict=True)):
            text = row["prompt"] + answer[:n]
            logprobs = score(text)
            *_, last, next_one = logprobs.topk(k + 1).values.tolist()
            added = {c: reward(row, text, c) for c in (logprobs >= last - 1e-4).nonzero().flatten().tolist()}
            scores = {c: logprobs[c].item() + row["weight"] * value for c, value in added.items()}
            best = max((value for c, value in scores.items() if logprobs[c] > next_one + 1e-4), default=-torch.inf)
            assert token in scores and scores[token] >= best - 1e-3, (row, n, token, scores)
            assert value == pytest.approx(added[token], abs=1e-3)


ROWS = [dict(prompt=p, user=u, weight=w) for p, u, w in zip(prompts([2, 7, 4]), USERS, [2.0, 1.0, 3.0], strict=True)]


@pytest.mark.parametrize("name", EVERY)
def test_every_way_of_decoding_follows_the_oracle(name):
    policy, model = random_lm(name, 0), reward_model(random_lm(name, 1))
    score, state = Oracle(policy), Oracle(model.backbone)

    def reward(row, text, candidate) -> float:
        hidden = state([*text, candidate])[-1:].float()
        return model.head(hidden, model.users.rows([row["user"]])).item()

    call = dict(reward_weight=[row["weight"] for row in ROWS], num_candidates=3, max_new_tokens=3, stop=[])
    batch = policy, model, [row["prompt"] for row in ROWS], USERS
    follows(chosen(*batch, **call), ROWS, score, reward)
    follows(by_reference(*batch, **call), ROWS, score, reward)
    even = [row | {"prompt": row["prompt"][:2]} for row in ROWS]  # without padding
    follows(chosen(policy, model, [row["prompt"] for row in even], USERS, **call), even, score, reward)

    token_reward = TokenReward(random_lm(name, 2), None)
    rewards = Oracle(token_reward.lm)
    found = chosen(policy, token_reward, batch[2], **call)
    follows(found, ROWS, score, lambda row, text, candidate: rewards(text)[candidate].item())


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(QUICK),
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=5),
    k=st.sampled_from([1, 2, 4]),
    weight=st.sampled_from([0.0, 0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_any_lengths_follow_the_oracle(name, lengths, k, weight, seed):
    policy, model = random_lm(name, 0), reward_model(random_lm(name, 1))
    score, state = Oracle(policy), Oracle(model.backbone)
    rows = [dict(prompt=p, user=USERS[i % 3], weight=weight) for i, p in enumerate(prompts(lengths, seed))]

    def reward(row, text, candidate) -> float:
        return model.head(state([*text, candidate])[-1:].float(), model.users.rows([row["user"]])).item()

    call = dict(reward_weight=weight, num_candidates=k, max_new_tokens=2, stop=[])
    follows(
        chosen(policy, model, [row["prompt"] for row in rows], [row["user"] for row in rows], **call), rows, score, reward, k
    )


@pytest.mark.parametrize("name", EVERY)
def test_plain_decoding_and_responses_follow_the_oracle(name):
    lm = copy.deepcopy(random_lm(name, 0))
    score, state, rows = Oracle(lm), Oracle(lm.get_decoder()), [row["prompt"] for row in ROWS]
    for row, answer in zip(rows, tokens(chosen(lm, None, rows, max_new_tokens=4, stop=[])), strict=True):
        for n, token in enumerate(answer):
            logprobs = score(row + answer[:n])
            assert logprobs[token] >= logprobs.max() - 1e-4
    groups = [(row, [[9, 8, 7], [6], [6, 5]]) for row in rows]
    for (prompt, several), found in zip(groups, response_states(lm.get_decoder(), groups), strict=True):
        for response, states in zip(several, found, strict=True):
            torch.testing.assert_close(states.double(), state(prompt + response)[len(prompt) :], atol=1e-3, rtol=1e-3)
    for (prompt, several), found in zip(groups, response_logprobs(lm, groups), strict=True):
        for response, logprobs in zip(several, found, strict=True):
            want = [score(prompt + response[:n])[token].item() for n, token in enumerate(response)]
            assert logprobs.tolist() == pytest.approx(want, abs=1e-3)
    packed = pack(rows, [[[9, 8, 7], [6]]] * 3, share=can_branch(lm))
    values, mask = token_logprobs(lm, packed)  # as in training
    responses = [(row, response) for row in rows for response in ([9, 8, 7], [6])]
    for (row, response), logprobs, seen in zip(responses, values, mask, strict=True):
        want = [score(row + response[:n])[token].item() for n, token in enumerate(response)]
        assert logprobs[seen].tolist() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_soft_prompts_of_several_lengths_follow_the_definition(name):
    """Embeddings before the prompt go the same way as ids."""
    lm = copy.deepcopy(random_lm(name, 0))
    torch.manual_seed(0)
    soft = SoftPrompt(torch.randn(1, 2, 32) * 0.3, Users(USERS, offset=torch.randn(3, 2, 32) * 0.3))
    policy, exact, rows = UserPolicy(lm, None, soft=soft), copy.deepcopy(lm).double(), [row["prompt"] for row in ROWS]

    @torch.no_grad()
    def logprobs(user: str, text: list[int]) -> torch.Tensor:
        words = exact.get_input_embeddings()(torch.tensor([text]))
        embeds = torch.cat([soft(soft.users.rows([user])).double(), words], dim=1)
        return exact(inputs_embeds=embeds, use_cache=False).logits[0, -1].log_softmax(-1)

    found = tokens(chosen(policy, None, rows, USERS, max_new_tokens=3, stop=[]))
    for row, user, answer in zip(rows, USERS, found, strict=True):
        for n, token in enumerate(answer):
            own = logprobs(user, row + answer[:n])
            assert own[token] >= own.max() - 1e-4
    packed = pack(rows, [[[9, 8, 7], [6]]] * 3, share=can_branch(lm))
    with torch.no_grad():
        values, mask = policy.logprobs(packed, torch.arange(3).repeat_interleave(2))
    responses = [(row, user, response) for row, user in zip(rows, USERS, strict=True) for response in ([9, 8, 7], [6])]
    for (row, user, response), value, seen in zip(responses, values, mask, strict=True):
        want = [logprobs(user, row + response[:n])[token].item() for n, token in enumerate(response)]
        assert value[seen].tolist() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("lengths", [(2, 5), (14, 20), (2, 14, 5, 20)])
def test_longrope_is_right_on_either_side_of_its_border(lengths):
    """Rows on both sides take turns, since a pass turns all its rows as the longest one asks."""
    policy, model = random_lm("phi3 longrope", 0), reward_model(random_lm("phi3 longrope", 1))
    score, state = Oracle(policy), Oracle(model.backbone)
    rows = [dict(prompt=p, user="ann", weight=2.0) for p in prompts(lengths)]

    def reward(row, text, candidate) -> float:
        return model.head(state([*text, candidate])[-1:].float(), model.users.rows(["ann"])).item()

    call = dict(reward_weight=2.0, num_candidates=3, max_new_tokens=4, stop=[])
    follows(chosen(policy, model, [row["prompt"] for row in rows], ["ann"] * len(rows), **call), rows, score, reward)


def documented():
    """Rows of the table: family, backend, how candidates stand."""
    text = (Path(__file__).parents[2] / "docs/decoding.md").read_text()
    lines = text.split("| family | backend on a CPU | candidates |\n")[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(name, backend.strip("`"), how) for names, backend, how in rows for name in names.split(", ")]


def test_the_table_has_all_families():
    assert sorted(name for name, *_ in documented()) == sorted(DOCUMENTED)


@pytest.mark.skipif(not has_extension, reason="no extension, so no backend cpu")
@pytest.mark.parametrize(("name", "backend", "how"), documented(), ids=[name for name, *_ in documented()])
def test_a_family_is_computed_as_the_table_says(name, backend, how):
    lm = random_lm(DOCUMENTED[name], 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = Engine(lm, reward_model(lm))
    assert engine.backend == backend, engine.reason
    assert ["side by side", "copies"][sum("with k copies" in str(one.message) for one in caught)] == how
    if backend == "eager":  # it says which part the stack has not
        assert "the CPU stack does not do" in engine.reason


PAIRS = synthetic.load(users=2, pairs=12, new_users=1, support=4, query=4)


@pytest.mark.filterwarnings("ignore:policy or reward model has layers")
@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_family_trains_and_decodes_in_both_halves(name, tmp_path):
    family, changes = FAMILIES[DOCUMENTED[name]]
    sizes = "head_dim", "sliding_window", "ffn_dim", "word_embed_proj_dim"
    known = vars(random_lm(DOCUMENTED[name], 0).config)
    more = {size: SIZES[size] for size in sizes if size in known} | changes
    folder = str(synthetic.tiny_lm(tmp_path / "lm", family=family, width=32, **more))
    lm, tokenizer = load_lm(folder)
    text, users = tokenizer("a small cat").input_ids, ["user_00"]

    model = trained("lore", folder, freeze_backbone=True, rank=2)
    policy, scorer, score, state = Policy(lm), Scorer(model), Oracle(lm), Oracle(model.backbone)
    policy.prefill(["a"], [text])
    scorer.prefill(["a"], [text], users)
    for step in range(3):
        (logprobs,) = policy.next_logits().log_softmax(1).double()
        torch.testing.assert_close(logprobs[: len(score(text))], score(text), atol=1e-3, rtol=1e-3)
        candidates = logprobs.topk(3).indices.tolist()
        want = torch.stack([state([*text, token])[-1] for token in candidates]).float()
        want = model.head(want, model.users.rows(users * 3))
        torch.testing.assert_close(scorer.score([candidates])[0], want, atol=1e-3, rtol=1e-3)
        token = 7 if step == 1 and scorer.shared else candidates[1]  # no candidate, and one
        policy.advance(["a"], [token])
        scorer.advance(["a"], [token])
        text = [*text, token]

    rewarding = trained("genarm", folder, lora_lr=1e-2)
    assert all(value.abs().sum() > 0 for key, value in rewarding.state_dict().items() if "lora_B" in key)
    rewards, row = Oracle(rewarding.lm), dict(prompt=text, weight=2.0)
    found = chosen(lm, rewarding, [text], reward_weight=2.0, num_candidates=3, max_new_tokens=3, stop=[])
    follows(found, [row], score, lambda row, text, candidate: rewards(text)[candidate].item())


def trained(method: str, folder: str, **fields):
    return trainer.train(method, PAIRS, hooks.method(method).Config(backbone=folder, epochs=1, batch_size=8, **fields)).eval()
