"""What is asked of a decoder is checked by value and by type: refused by the argument's name, or done."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import reward_model, tiny_lm
from decoding import USERS, Words, arguments, guided, plain, prompts
from families import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

import pyargs
from pyargs.decode import args, reference
from pyargs.decode.backends import cuda_graph
from pyargs.decode.request import check, numbered, seeds, whole
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.tokenize import left_pad

INF, NAN = math.inf, math.nan
IDS, MASK = torch.tensor([[1, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.fixture(scope="module")
def pair():
    return tiny_lm(), reward_model(tiny_lm(seed=3))


def ask(pair, ids=IDS, mask=MASK, **changes):
    defaults = dict(
        reward_weight=1.0,
        num_candidates=5,
        max_new_tokens=2,
        eos_token_id=[],
        pad_token_id=1,
        do_sample=False,
        temperature=0.7,
        seed=0,
        eos_reward="before",
        tokenizer=None,
        token_callback=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(*pair, ids, mask, ["ann", "bob"], **(defaults | changes))


WRONG = {
    "reward_weight": [INF, NAN, 3.5e38, True, [True, False], "strong", None, [1.0, None], 1j, [1.0, 2.0, 3.0], [[1.0, 2.0]],
        torch.tensor([1.0, NAN])],
    "num_candidates": [0, -1, 65, 62, 2.5, 2.0, True, "5", [5], np.float64(5), torch.tensor([5, 5])],
    "max_new_tokens": [0, -3, 2.5, 2.0, True, None, "4", np.float32(4), torch.tensor(4.0)],
    "seed": [2**64, -(2**63) - 1, 1.0, True, "7", [1], [1, 2, 3], [1, 2.5], [1, True], np.array([0.5, 1.0])],
    "eos_token_id": [2.5, True, "2", [3, None], [3, -1], -1],
    "pad_token_id": [2.5, True, "2", -1, 10**6],
    "eos_reward": ["none", None, 1, ["before"]],
    "token_callback": [1, "print"],
    "do_sample": [None, 1, "no"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name(pair, name):
    for value in WRONG[name]:
        with pytest.raises(PyargsError, match=name):
            ask(pair, **{name: value})
            pytest.fail(f"{name}={value!r} was accepted")


def test_temperature_of_samples(pair):
    for value in (0, 0.0, -1, INF, NAN, True, "1", None, 1j):
        with pytest.raises(PyargsError, match="temperature"):
            ask(pair, do_sample=True, temperature=value)
    for value in (1, 0.5, np.float32(0.5), np.int64(2), 5e-324):
        assert ask(pair, do_sample=True, temperature=value).temperature == value


def test_numbers_of_numpy_and_torch_are_welcome(pair):
    got = ask(
        pair,
        num_candidates=np.int32(4),
        max_new_tokens=torch.tensor(3),
        seed=np.array([3, 2**63], dtype=np.uint64),
        eos_token_id=np.int64(7),
        pad_token_id=np.int8(0),
        reward_weight=np.array([0.5, 2], dtype=np.float16),
        do_sample=True,
    )
    assert (got.num_candidates, got.max_new_tokens, got.pad_id) == (4, 3, 0)
    assert got.stop.tolist() == [7] and got.weight.tolist() == [0.5, 2.0] and got.uniform.shape == (3, 2)
    assert ask(pair, eos_token_id=torch.tensor([7, 8])).stop.tolist() == [7, 8]
    for weight in (2, np.float64(2), torch.tensor(2), torch.tensor([2.0]), [2, 2.0], (np.int64(2), 2)):
        assert ask(pair, reward_weight=weight).weight.tolist() == [2.0, 2.0]


@given(value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=2), st.none(), st.binary(max_size=2)))
def test_whole_numbers_are_themselves_or_refused(value):
    """500 values of a dozen types: an int within the bounds comes back, and all else is one PyargsError."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64
    if fits:
        assert whole("k", value, 1, 64) == value and seeds(value, 3) == value
    else:
        with pytest.raises(PyargsError, match="k must be a whole number, 1 to 64, got"):
            whole("k", value, 1, 64)


def test_seeds_of_many_prompts_stay_within_torch():
    for seed in (0, 7, 2**60, 2**64 - 1, -5):
        assert torch.Generator().manual_seed(numbered(seed, 10**6)).initial_seed() == numbered(seed, 10**6)
    assert numbered(7, 3) == 7_000_024


@settings(max_examples=150)
@given(st.lists(st.lists(st.sampled_from([0, 1, 1, 0.5, -5, 2, NAN, INF]), min_size=3, max_size=3), min_size=2, max_size=2))
def test_masks_are_left_padded_ones_and_zeros(pair, rows):
    good = all(row in ([1, 1, 1], [0, 1, 1], [0, 0, 1]) for row in rows)
    for dtype in (torch.float32, torch.float64, torch.long, torch.bool):
        mask = torch.tensor(rows)
        if not mask.is_floating_point() or dtype.is_floating_point:
            mask = mask.to(dtype)
        if not mask.is_floating_point() and dtype == torch.bool:
            good = all(row in ([1, 1, 1], [0, 1, 1], [0, 0, 1]) for row in mask.int().tolist())
        if good:
            assert ask(pair, mask=mask).attention_mask.tolist() == mask.long().tolist()
        else:
            with pytest.raises(PyargsError, match="attention_mask|padded on the left"):
                ask(pair, mask=mask)


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[1, 2, 3]], None, "input_ids"),
        (IDS.float(), None, "input_ids"),
        (IDS.int(), None, "input_ids"),
        (IDS[0], None, "input_ids"),
        (IDS, MASK.tolist(), "attention_mask"),
        (IDS, MASK[:, 1:], "attention_mask"),
        (IDS, torch.zeros(2, 3), "padded on the left"),
        (IDS, "ones", "attention_mask"),
    ],
)
def test_prompts_of_another_form(pair, ids, mask, says):
    with pytest.raises(PyargsError, match=says):
        ask(pair, ids, mask)


@pytest.mark.parametrize("weight", [3e38, -3e38])
@pytest.mark.parametrize("way", ["passes", "captured", "reference"])
def test_a_weight_that_overflows_is_an_error(pair, weight, way, monkeypatch):
    """A finite weight times a finite reward beyond float32: no candidate may win by being the first."""
    policy, model = pair
    model = reward_model(tiny_lm(seed=3))
    model.head.directions.data *= 1e4
    request = ask(pair, reward_weight=weight)
    if way == "captured":
        monkeypatch.setattr(cuda_graph, "capture", lambda step, device: step)
    decode = {"captured": cuda_graph.decode, "reference": reference.decode}.get(way, args.decode)
    with pytest.raises(PyargsError, match=r"beyond float32: .* lower reward_weight"):
        decode(policy, model, request)


def test_the_whole_vocabulary_is_not_for_a_head(pair):
    with pytest.raises(PyargsError, match="num_candidates=None"):
        pyargs.generate(*pair, IDS, MASK, ["ann", "bob"], num_candidates=None)


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


def test_a_reward_model_of_fewer_positions_is_refused():
    policy, rows = random_lm("llama", 0), prompts([4, 2])
    model = reward_model(random_lm("llama", 1))
    model.backbone.config.max_position_embeddings = 6
    with pytest.raises(PyargsError, match="4 prompt . 5 new tokens exceed the 6 positions of LlamaModel"):
        guided(policy, model, rows, ["ann"] * 2, num_candidates=3, max_new_tokens=5)


def test_a_policy_with_more_tokens_than_the_reward_model_knows():
    policy = tiny_lm(vocab=80)
    model = reward_model(tiny_lm(vocab=61))
    with pytest.raises(PyargsError, match=r"80 tokens.*knows 61.*tokenizer="):
        pyargs.generate(policy, model, torch.tensor([[5, 6]]), None, ["ann"], reward_weight=1.0, max_new_tokens=2)
