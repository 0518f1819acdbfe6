"""What must hold of reward-guided decoding, whatever the models are."""

from __future__ import annotations

import pytest
import torch
from conftest import FULL_ATTENTION, reward_model, tiny_lm
from decoding import USERS, by_reference, chosen, pair_in_float32, prompts, same, steps_of, tokens

from pyargs.decode.engine import Engine
from pyargs.errors import PyargsError
from pyargs.ops.library import has_extension


@pytest.mark.parametrize("family", FULL_ATTENTION + ("mistral",))
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_alone_is_the_row_among_longer_and_shorter_ones(family, temperature):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    rows, users, weights = prompts([3, 8, 1, 5]), ["ann", "bob", "cid", "ann"], [1.0, 3.0, 0.0, 0.5]
    more = dict(temperature=temperature, max_new_tokens=[12, 3, 12, 7], num_candidates=[5, 2, 3, 5], seed=[4, 5, 6, 7])
    together = chosen(policy, model, rows, users, reward_weight=weights, **more)
    for b in range(4):
        own = {name: value[b] if isinstance(value, list) else value for name, value in more.items()}
        own["seed"] = [own["seed"]]
        for decoder in (chosen, by_reference):
            same(
                decoder(policy, model, rows[b : b + 1], users[b : b + 1], reward_weight=weights[b], **own), together[b : b + 1]
            )


@pytest.mark.parametrize("changes", [dict(reward_weight=0.0), dict(num_candidates=1, reward_weight=9.0)])
@pytest.mark.parametrize("decoder", [chosen, by_reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_0_and_one_candidate_are_greedy(changes, decoder, dtype):
    policy, model = tiny_lm(dtype=dtype), reward_model(tiny_lm(seed=3, dtype=dtype))
    rows = prompts([2, 6, 4])
    for row, got in zip(rows, decoder(policy, model, rows, USERS, **changes), strict=True):
        greedy = policy.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)[0, len(row) :]
        assert got.tokens == greedy.tolist()


def test_weight_0_is_greedy_even_when_rewards_are_not_numbers():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    want = chosen(policy, model, prompts([4]), ["ann"], reward_weight=0.0)
    model.head.directions.data.fill_(float("nan"))
    assert tokens(chosen(policy, model, prompts([4]), ["ann"], reward_weight=0.0)) == tokens(want)


def test_the_weight_matters_and_users_differ():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([4]) * 3
    got = tokens(chosen(policy, model, rows, USERS, reward_weight=5.0))
    assert got[0] != got[1] or got[1] != got[2]
    assert got != tokens(chosen(policy, model, rows, USERS, reward_weight=0.0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    policy, model = tiny_lm(attention=attention), reward_model(tiny_lm(seed=3, attention=attention))
    rows = prompts([2, 6, 4])
    same(chosen(policy, model, rows, USERS), chosen(tiny_lm(), reward_model(tiny_lm(seed=3)), rows, USERS))


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
    wish = dict(reward_weight=20.0, max_new_tokens=8, stop=[])
    assert tokens(chosen(policy, mean, [prompt], ["x"], **wish)) == [expected]
    assert tokens(by_reference(policy, mean, [prompt], ["x"], **wish)) == [expected]
    assert tokens(chosen(policy, token, [prompt], ["x"], **wish)) != [expected]


def test_a_constant_added_to_the_reward_changes_no_token():
    policy = tiny_lm()
    model = reward_model(tiny_lm(seed=3))
    rows = prompts([2, 6, 4])
    before = chosen(policy, model, rows, USERS, eos_reward="state")
    old = model.head.forward
    model.head.forward = lambda hidden, user: old(hidden, user) + 8.0
    for decoder in (chosen, by_reference):
        after = decoder(policy, model, rows, USERS, eos_reward="state")
        assert tokens(after) == tokens(before)
        assert after[0].rewards == pytest.approx([8.0 + reward for reward in before[0].rewards], abs=1e-5)


@pytest.mark.parametrize("where", ["policy", "reward"])
@pytest.mark.parametrize("decoder", [chosen, by_reference])
def test_nan_raises(where, decoder):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    broken = policy.lm_head if where == "policy" else model.backbone.norm
    broken.weight.data[7 if where == "policy" else ...] = float("nan")
    with pytest.raises(PyargsError, match="not numbers in row"):
        decoder(policy, model, prompts([4, 2]), USERS[:2])


@pytest.mark.parametrize("weight", [3e38, -3e38])
@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_a_weight_that_overflows_is_an_error(weight, backend):
    """A finite weight times a finite reward beyond float32: no candidate may win by being the first."""
    policy, model = pair_in_float32("own")
    model.head.directions.data *= 1e4
    if backend == "cpu" and not has_extension:
        pytest.skip("no extension")
    with pytest.raises(PyargsError, match=r"beyond float32, .* lower reward_weight"):
        asked = dict(rows=prompts([3, 2]), users=USERS[:2], reward_weight=weight)
        by_reference(policy, model, **asked) if backend == "reference" else chosen(policy, model, **asked, backend=backend)


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
    together = tokens(chosen(policy, model, rows, users, stop=[]))
    copies = tokens(by_reference(policy, model, rows, users, stop=[]))
    flips = compared = 0
    for own, copied, prompt, user in zip(together, copies, rows, users, strict=True):
        alone = tokens(chosen(policy, model, [prompt], [user], stop=[]))
        for other in (*alone, copied):
            compared += 1
            if own != other:
                t = next(i for i, (x, y) in enumerate(zip(own, other, strict=True)) if x != y)
                assert score_gap(policy, model, prompt, own[:t], user, 1.0, own[t], other[t]) < 1e-4
                flips += 1
    with capsys.disabled():
        print(f" [{family} float32: {flips} flips in {compared} answers]", end="")


def test_samples_do_not_depend_on_the_batch_and_the_seed_matters():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows, engine = prompts([4]) * 4, Engine(policy, model)
    wish = dict(temperature=2.0, reward_weight=0.3, num_candidates=5, max_new_tokens=12, stop=[])
    drawn = lambda seed, n=4: [one.tokens for one in engine.generate(rows[:n], ["ann"] * n, seed=seed, **wish)]  # noqa: E731
    one = drawn([1, 2, 3, 1])
    assert one[0] == one[3] and one[0] != one[1] and one[1] != one[2]
    assert drawn([3], 1) == [one[2]]
    assert drawn(5) == drawn(5) != drawn(6)
    torch.manual_seed(0)
    first = drawn(None)
    assert first != drawn(None)
    torch.manual_seed(0)
    assert drawn(None) == first
    with pytest.raises(PyargsError, match="seeds for 4 rows"):
        drawn([1, 2])


def test_filters_act_on_the_policy_before_rewards_and_temperature():
    """By their definition: of the k likeliest those that hold top_p of their probability, and those not too unlikely."""
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    (prompt,) = prompts([4])
    for top_p, min_p, temperature in ((0.6, 0.0, 0.0), (1.0, 0.4, 0.0), (0.8, 0.2, 1.5)):
        wish = dict(reward_weight=5.0, num_candidates=7, top_p=top_p, min_p=min_p, temperature=temperature, stop=[])
        (got,) = chosen(policy, model, [prompt], ["ann"], **wish)
        same([got], by_reference(policy, model, [prompt], ["ann"], **wish))
        left = []
        for n, slot in enumerate(got.slots):
            chance = policy(torch.tensor([prompt + got.tokens[:n]])).logits[0, -1].float().softmax(-1).topk(7).values
            before = (chance.cumsum(0) - chance) / chance.sum()
            kept = int(((before < top_p) & (chance >= min_p * chance[0])).sum())
            left.append(kept)
            assert slot < kept
        assert min(left) < 7 and max(got.slots) > 0


def test_a_head_that_is_not_as_written_is_called():
    policy, model = pair_in_float32("own")
    asked = policy, model, prompts([3, 5]), USERS[:2]
    before = chosen(*asked)
    engine = Engine(policy, model)
    handle = model.head.register_forward_hook(lambda module, args, out: out * -3.0)
    with pytest.raises(PyargsError, match="refresh"):
        engine.generate(*asked[2:], reward_weight=1.0)
    engine.refresh()
    got = steps_of(engine, *asked[2:])
    same(got, by_reference(*asked))
    assert got[0].rewards[0] not in (before[0].rewards[0], pytest.approx(before[0].rewards[0]))
    handle.remove()
    same(chosen(*asked), before)
