"""What must hold of reward-guided decoding, whatever the models are."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, reward_model, tiny_lm
from decoding import USERS, arguments, guided, plain, prompts, same

import pyargs
from pyargs.decode import reference
from pyargs.decode.request import check
from pyargs.errors import PyargsError
from pyargs.lm.tokenize import left_pad


@pytest.mark.parametrize("family", FULL_ATTENTION + ("mistral",))
@pytest.mark.parametrize("sample", [False, True])
def test_a_row_alone_is_the_row_in_any_batch(family, sample):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    rows, users, weights = prompts([3, 8, 1, 5]), ["ann", "bob", "cid", "ann"], [1.0, 3.0, 0.0, 0.5]
    together = guided(policy, model, rows, users, reward_weight=weights, do_sample=sample)
    noise = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    for b in range(4):
        ids, mask = left_pad([rows[b]], pad_id=1)
        request = check(policy, model, ids, mask, [users[b]], **arguments(reward_weight=weights[b], do_sample=sample))
        if sample:
            request.uniform = noise[b : b + 1].T.contiguous()
        alone = pyargs_decode(policy, model, request)
        n = alone.tokens.shape[1]
        assert together.tokens[b, :n].tolist() == alone.tokens[0].tolist()
        assert together.lengths[b] == alone.lengths[0]
        assert set(together.tokens[b, n:].tolist()) <= {1}


def pyargs_decode(policy, model, request):
    from pyargs.decode import args
    from pyargs.lm.cache import can_branch

    return (args if can_branch(policy) else reference).decode(policy, model, request)


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_left_padding_changes_nothing(family):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    (prompt,) = prompts([6])
    bare = guided(policy, model, [prompt], ["cid"])
    for pad, token in ((1, 1), (5, 1), (3, prompt[0])):
        ids = torch.tensor([[token] * pad + prompt])
        mask = torch.tensor([[0] * pad + [1] * len(prompt)])
        same(bare, pyargs.generate(policy, model, ids, mask, ["cid"], **arguments()))


@pytest.mark.parametrize("changes", [dict(reward_weight=0.0), dict(num_candidates=1, reward_weight=9.0)])
@pytest.mark.parametrize("decoder", [guided, plain])
def test_weight_0_and_one_candidate_are_greedy(changes, decoder):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([2, 6, 4])
    ids, mask = left_pad(rows, pad_id=1)
    greedy = policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    got = decoder(policy, model, rows, USERS, **changes)
    assert got.tokens.tolist() == greedy[:, : got.tokens.shape[1]].tolist()


def test_weight_0_is_greedy_even_when_rewards_are_not_numbers():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    want = guided(policy, model, prompts([4]), ["ann"], reward_weight=0.0)
    model.head.directions.data.fill_(float("nan"))
    assert guided(policy, model, prompts([4]), ["ann"], reward_weight=0.0).tokens.tolist() == want.tokens.tolist()


def test_the_weight_matters_and_users_differ():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([4]) * 3
    got = guided(policy, model, rows, USERS, reward_weight=5.0).tokens.tolist()
    assert got[0] != got[1] or got[1] != got[2]
    assert got != guided(policy, model, rows, USERS, reward_weight=0.0).tokens.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    policy, model = tiny_lm(attention=attention), reward_model(tiny_lm(seed=3, attention=attention))
    rows = prompts([2, 6, 4])
    same(guided(policy, model, rows, USERS), guided(tiny_lm(), reward_model(tiny_lm(seed=3)), rows, USERS))


def test_token_averages_decode_with_the_running_mean():
    policy = tiny_lm()
    lm = tiny_lm(seed=3)
    token = reward_model(lm, head="mlp", pool="mean")
    mean = reward_model(lm, head="mlp", pool="mean", step_reward="prefix_mean")
    (prompt,) = prompts([5])
    # The definition: every candidate's mean over the response so far, written out.
    text, total, expected = list(prompt), 0.0, []

    def reward(ids):
        return token.head(token.backbone(torch.tensor([ids])).last_hidden_state[0, -1], torch.tensor(0)).item()

    for t in range(8):
        logprobs = policy(torch.tensor([text])).logits[0, -1].float().log_softmax(-1)
        values, ids = logprobs.topk(5)
        scores = [
            v + 20.0 * (total + reward([*text, i])) / (t + 1) for v, i in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        best = ids[max(range(5), key=scores.__getitem__)].item()
        total += reward([*text, best])
        text.append(best)
        expected.append(best)
    changes = dict(reward_weight=20.0, max_new_tokens=8, eos_token_id=[])
    assert guided(policy, mean, [prompt], ["x"], **changes).tokens[0].tolist() == expected
    assert plain(policy, mean, [prompt], ["x"], **changes).tokens[0].tolist() == expected
    assert guided(policy, token, [prompt], ["x"], **changes).tokens[0].tolist() != expected


def test_a_constant_added_to_the_reward_changes_no_token():
    policy = tiny_lm()
    model = reward_model(tiny_lm(seed=3))
    rows = prompts([2, 6, 4])
    before = guided(policy, model, rows, USERS, eos_reward="state")
    old = model.head.forward
    model.head.forward = lambda hidden, user: old(hidden, user) + 8.0
    after = plain(policy, model, rows, USERS, eos_reward="state")
    assert before.tokens.tolist() == after.tokens.tolist()


@pytest.mark.parametrize("where", ["policy", "reward"])
@pytest.mark.parametrize("decoder", [guided, plain])
def test_nan_raises(where, decoder):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    broken = policy.lm_head if where == "policy" else model.backbone.norm
    broken.weight.data[7 if where == "policy" else ...] = float("nan")
    with pytest.raises(PyargsError, match="not numbers in row"):
        decoder(policy, model, prompts([4, 2]), USERS[:2])


def test_an_empty_batch_is_an_empty_answer():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert pyargs.generate(policy, model, empty, empty, []).tokens.shape == (0, 0)


def score_gap(policy, model, prompt, tokens, user, weight, one, two):
    """How far apart the definition finds two candidates behind the same text."""
    row = model.users.rows([user])
    logprobs = policy(torch.tensor([prompt + tokens])).logits[0, -1].float().log_softmax(-1)
    scores = []
    for token in (one, two):
        hidden = model.backbone(torch.tensor([[*prompt, *tokens, token]])).last_hidden_state[0, -1:]
        scores.append((logprobs[token] + weight * model.head(hidden, row)[0]).item())
    return abs(scores[0] - scores[1])


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_in_float32_a_token_flips_only_between_equals(family, capsys):
    policy, model = tiny_lm(family, dtype=torch.float32), reward_model(tiny_lm(family, seed=3, dtype=torch.float32))
    rows, users = prompts([3, 8, 1, 5, 9, 2]), USERS * 2
    together = guided(policy, model, rows, users, eos_token_id=[])
    copies = plain(policy, model, rows, users, eos_token_id=[])
    flips = compared = 0
    for b, prompt in enumerate(rows):
        alone = guided(policy, model, [prompt], [users[b]], eos_token_id=[]).tokens[0].tolist()
        for other in (alone, copies.tokens[b].tolist()):
            own = together.tokens[b].tolist()
            compared += 1
            if own != other:
                t = next(i for i, (x, y) in enumerate(zip(own, other, strict=True)) if x != y)
                assert score_gap(policy, model, prompt, own[:t], users[b], 1.0, own[t], other[t]) < 1e-4
                flips += 1
    with capsys.disabled():
        print(f" [{family} float32: {flips} flips in {compared} answers]", end="")


def test_samples_do_not_depend_on_the_batch_and_the_seed_matters():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([4]) * 4
    changes = dict(do_sample=True, reward_weight=0.3, temperature=2.0, eos_token_id=[])
    one = guided(policy, model, rows, ["ann"] * 4, seed=[1, 2, 3, 1], **changes).tokens.tolist()
    assert one[0] == one[3] and one[0] != one[1] and one[1] != one[2]
    assert guided(policy, model, rows[:1], ["ann"], seed=[3], **changes).tokens.tolist() == [one[2]]
    fixed = lambda seed: guided(policy, model, rows, ["ann"] * 4, seed=seed, **changes).tokens.tolist()  # noqa: E731
    assert fixed(5) == fixed(5) != fixed(6)
    torch.manual_seed(0)
    first = fixed(None)
    assert first != fixed(None)
    torch.manual_seed(0)
    assert fixed(None) == first
    with pytest.raises(PyargsError, match="seeds for 4 rows"):
        fixed([1, 2])
