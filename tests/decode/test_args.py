"""What must hold of reward-guided decoding, whatever the models are."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FULL_ATTENTION, OTHER_LAYERS, reward_model, tiny_lm
from hypothesis import given, settings
from hypothesis import strategies as st

import pyargs
from pyargs.decode import reference
from pyargs.decode.request import check
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm import lora
from pyargs.lm.tokenize import left_pad

USERS = ["ann", "bob", "cid"]


def prompts(lengths, seed=0, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def arguments(**changes):
    defaults = dict(
        reward_weight=1.0,
        num_candidates=5,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=None,
        do_sample=False,
        temperature=0.7,
        seed=0,
        eos_reward="before",
        tokenizer=None,
        token_callback=None,
    )
    return {**defaults, **changes}


def guided(policy, model, rows, users, **changes):
    ids, mask = left_pad(rows, pad_id=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pyargs.generate(policy, model, ids, mask, users, **arguments(**changes))


def plain(policy, model, rows, users, **changes):
    ids, mask = left_pad(rows, pad_id=1)
    return reference.decode(policy, model, check(policy, model, ids, mask, users, **arguments(**changes)))


def shared_pair(weights, head, seed):
    """A policy and a reward model with weights of their "own", the "shared" ones, or these and LoRA ("shared lora")."""
    policy = tiny_lm("llama", seed=seed)
    model = reward_model(policy if weights != "own" else tiny_lm("llama", seed=seed + 1), head=head)
    if weights == "shared lora":
        torch.manual_seed(seed)
        lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj", "down_proj"])
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.3
    return policy, model.eval()


def same(one, other):
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.slots.tolist() == other.slots.tolist()
    assert one.lengths.tolist() == other.lengths.tolist()
    torch.testing.assert_close(one.rewards, other.rewards, atol=2e-5, rtol=2e-5)


def without_cache(policy, model, prompt, user, weight, k, steps, eos_reward="before", eos=(1,)):
    """The definition, with no cache and no batch: every candidate of every step in a pass of its own."""
    text, tokens, rewards = list(prompt), [], []
    row = model.users.rows([user])
    state = lambda ids: model.backbone(torch.tensor([ids])).last_hidden_state[0, -1:]  # noqa: E731
    so_far = model.head(state(text), row).item()
    for _ in range(steps):
        logprobs = policy(torch.tensor([text])).logits[0, -1].float().log_softmax(-1)
        order = logprobs.sort(descending=True, stable=True)
        best = None
        for value, token in zip(order.values[:k].tolist(), order.indices[:k].tolist(), strict=True):
            reward = so_far if token in eos and eos_reward == "before" else model.head(state([*text, token]), row).item()
            score = value + weight * reward
            if best is None or score > best[0]:
                best = (score, token, reward)
        tokens.append(best[1])
        rewards.append(best[2])
        so_far = best[2]
        text.append(best[1])
        if best[1] in eos:
            break
    return tokens, rewards


@pytest.mark.parametrize("family", FULL_ATTENTION + OTHER_LAYERS)
@pytest.mark.parametrize("decoder", [guided, plain])
def test_decoders_follow_the_definition(family, decoder):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=5))
    for seed, length in enumerate([4] if family == "mamba" else [1, 4, 9]):  # mamba without its kernels is slow
        (prompt,) = prompts([length], seed)
        expected, rewards = without_cache(policy, model, prompt, "bob", 2.0, 5, 6)
        got = decoder(policy, model, [prompt], ["bob"], reward_weight=2.0, max_new_tokens=6)
        assert got.tokens[0].tolist() == expected
        torch.testing.assert_close(got.rewards[0], torch.tensor(rewards), atol=2e-5, rtol=2e-5)


@st.composite
def requests(draw, most: int = 4):
    """Models and a batch: (policy, reward model, prompts, users, changes of the arguments)."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=most))
    head = draw(st.sampled_from(["linear", "mlp", "personal mlp"]))
    weights = draw(st.sampled_from(["own", "shared", "shared lora"]))
    seed = draw(st.integers(0, 99))
    changes = dict(
        num_candidates=draw(st.sampled_from([1, 2, 7])),
        do_sample=draw(st.booleans()),
        eos_token_id=draw(st.sampled_from([[], [1], [1, 7, 9, 11, 13, 20, 21, 30, 31, 40, 41, 50, 51]])),
        eos_reward=draw(st.sampled_from(["before", "state"])),
        seed=seed,
        reward_weight=[0.0, 1.5, 0.3, 4.0, 1.0, 2.0][: len(lengths)],
    )
    users = [USERS[i % 3] for i in range(len(lengths))]
    return *shared_pair(weights, head, seed), prompts(lengths, seed), users, changes


@settings(max_examples=25, deadline=None)
@given(request=requests())
def test_shared_prefix_equals_k_copies(request):
    *batch, changes = request
    same(guided(*batch, **changes), plain(*batch, **changes))


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


def test_stopped_rows_write_padding_and_lengths_leave_the_stop_token_out():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    stops = list(range(1, 40))  # most tokens stop
    got = guided(policy, model, prompts([2, 6, 4]), USERS, eos_token_id=stops, pad_token_id=50)
    for row, length in zip(got.tokens.tolist(), got.lengths.tolist(), strict=True):
        assert all(token not in stops for token in row[:length])
        if length < len(row):
            assert row[length] in stops and set(row[length + 1 :]) <= {50}


def test_tokens_are_streamed_as_they_are_chosen():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    seen = []
    got = guided(policy, model, prompts([2, 6]), USERS[:2], token_callback=lambda tokens: seen.append(tokens.tolist()))
    assert torch.tensor(seen).T.tolist() == got.tokens.tolist()


@pytest.mark.parametrize("family", OTHER_LAYERS)
def test_layers_that_cannot_branch_take_the_copies_with_one_warning(family):
    policy, model = tiny_lm(family), reward_model(tiny_lm(family, seed=3))
    ids, mask = left_pad(prompts([4]), pad_id=1)
    with pytest.warns(UserWarning, match="copies") as caught:
        got = pyargs.generate(policy, model, ids, mask, ["ann"], **arguments())
    assert len([w for w in caught if "copies" in str(w.message)]) == 1
    same(got, plain(policy, model, prompts([4]), ["ann"]))


@pytest.mark.parametrize("where", ["policy", "reward"])
@pytest.mark.parametrize("decoder", [guided, plain])
def test_nan_raises(where, decoder):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    broken = policy.lm_head if where == "policy" else model.backbone.norm
    broken.weight.data[7 if where == "policy" else ...] = float("nan")
    with pytest.raises(PyargsError, match="not numbers in row"):
        decoder(policy, model, prompts([4, 2]), USERS[:2])


def test_wrong_requests_say_how_to_mend_them():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([4, 2])
    for changes, message in [
        (dict(reward_weight=[1.0, 2.0, 3.0]), "3 values for 2 rows"),
        (dict(reward_weight=float("inf")), "finite"),
        (dict(num_candidates=0), "num_candidates"),
        (dict(num_candidates=62), "num_candidates"),
        (dict(do_sample=True, temperature=0.0), "temperature"),
        (dict(eos_reward="none"), "eos_reward"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=500), "positions"),
    ]:
        with pytest.raises(PyargsError, match=message):
            guided(policy, model, rows, USERS[:2], **changes)
    with pytest.raises(UnknownUser, match="Did you mean: ann"):
        guided(policy, model, rows, ["anne", "bob"])
    with pytest.raises(PyargsError, match="one user for each row"):
        guided(policy, model, rows, ["ann"])
    ids, mask = left_pad(rows, pad_id=1)
    with pytest.raises(PyargsError, match="padding_side"):
        pyargs.generate(policy, model, ids.flip(1), mask.flip(1), USERS[:2])
    with pytest.raises(PyargsError, match="int64"):
        pyargs.generate(policy, model, ids.float(), mask, USERS[:2])


def test_an_empty_batch_is_an_empty_answer():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert pyargs.generate(policy, model, empty, empty, []).tokens.shape == (0, 0)


@pytest.mark.parametrize("sample", [False, True])
def test_generate_of_transformers_gives_the_same_tokens(sample):
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    rows = prompts([2, 6, 4])
    ids, mask = left_pad(rows, pad_id=1)
    own = guided(policy, model, rows, USERS, do_sample=sample, reward_weight=[1.0, 2.0, 0.0])
    got = policy.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=sample,
        **({"temperature": 0.7} if sample else {}),
        custom_generate=pyargs.args(model, users=USERS, reward_weight=[1.0, 2.0, 0.0], num_candidates=5, seed=0),
    )
    assert got[:, : ids.shape[1]].tolist() == ids.tolist()
    assert got[:, ids.shape[1] :].tolist() == own.tokens.tolist()


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


class Words:
    """As much of a tokenizer as the decoder looks at."""

    def __init__(self, n: int, shift: int = 0):
        self.n, self.shift = n, shift

    def __len__(self):
        return self.n

    def get_vocab(self):
        return {f"w{i}": i + self.shift for i in range(self.n)}


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_chosen():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(20)
    policy.lm_head.weight.data[20:] *= 50  # the padding rows would win nearly always
    for decoder in (guided, plain):
        got = decoder(policy, model, prompts([4, 2], vocab=20), USERS[:2], tokenizer=Words(20), eos_token_id=[])
        assert got.tokens.max() < 20


def test_tokenizers_are_compared_by_their_ids():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(30)
    guided(policy, model, prompts([4], vocab=30), ["ann"], tokenizer=Words(30))
    with pytest.raises(PyargsError, match="different tokenizers"):
        guided(policy, model, prompts([4], vocab=30), ["ann"], tokenizer=Words(30, shift=1))


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


def test_a_policy_of_unknown_tokenizer_is_named():
    policy, model = tiny_lm(), reward_model(tiny_lm(seed=3))
    model.tokenizer = Words(30)
    policy.config._name_or_path = policy.name_or_path = "someone/else"
    ids, mask = left_pad(prompts([4], vocab=30), pad_id=1)
    with pytest.warns(UserWarning, match="pass tokenizer="):
        pyargs.generate(policy, model, ids, mask, ["ann"], **arguments())
    policy.tokenizer = Words(30, shift=1)
    with pytest.raises(PyargsError, match="different tokenizers"):
        pyargs.generate(policy, model, ids, mask, ["ann"], **arguments())
