"""Families of models against a slow oracle: float64, without cache, padding or batch, the whole text for each candidate."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from conftest import reward_model
from decode.test_args import guided, prompts
from decode.test_args import plain as with_copies
from hypothesis import given, settings
from hypothesis import strategies as st

from pyargs.decode import genarm as tokenwise_module
from pyargs.decode import unguided
from pyargs.errors import PyargsError
from pyargs.lm.cache import can_branch
from pyargs.lm.forward import masks_every_step, plain_output_layer
from pyargs.lm.tokenize import left_pad, pack
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import SoftPrompt, UserPolicy
from pyargs.scoring import response_logprobs, response_states
from pyargs.types import Users

VOCABULARY, USERS = 61, ["ann", "bob", "cid"]
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, sliding_window=4, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, state_size=4, time_step_rank=4, mamba_d_state=4,
    n_embd=32, n_head=4, n_layer=2, n_positions=128, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, rotary_dim=4,
    ffn_dim=48, word_embed_proj_dim=32,
)  # fmt: skip
"""By whatever name a family's config has for it."""

LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[8.0] * 4)

FAMILIES = {
    name: (name, {})
    for name in (
        "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt",
        "olmo2", "granite", "smollm3", "bloom", "mpt", "mamba", "mixtral", "qwen2_moe", "stablelm", "starcoder2", "cohere",
        "gptj",
    )
} | {
    "mamba2": ("mamba2", dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=8)),
    "jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2)),
    "falcon": ("falcon", {}),
    "falcon alibi": ("falcon", dict(alibi=True)),
    "gpt_neo": ("gpt_neo", dict(num_layers=2, num_heads=4, window_size=4, attention_types=[[["global", "local"], 1]])),
    "phi3 without window": ("phi3", dict(sliding_window=None)),
    "phi3 longrope": ("phi3", dict(sliding_window=None, original_max_position_embeddings=12, rope_parameters=LONGROPE)),
    "granite with scales": ("granite", dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5)),
    "cohere2": ("cohere2", dict(num_hidden_layers=4)),
    "olmo3": ("olmo3", {}),
    "gpt_oss": ("gpt_oss", {}),
    "exaone4": ("exaone4", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "nemotron": ("nemotron", {}),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
}  # fmt: skip
QUICK = ("gemma2", "bloom", "mpt", "mamba", "falcon alibi", "gpt_neo", "qwen2_moe", "cohere")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
NO_BRANCHES = {
    "mistral", "gemma2", "gemma3_text", "phi3", "bloom", "mpt", "mamba", "mamba2", "jamba", "mixtral", "starcoder2",
    "falcon alibi", "gpt_neo", "cohere2", "olmo3", "gpt_oss", "exaone4", "lfm2",
}  # fmt: skip
CAPPED = {"gemma2", "cohere", "cohere2", "granite with scales"}


@lru_cache(maxsize=4)
def random_lm(name: str, seed: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = FAMILIES[name]
    known = vars(AutoConfig.for_model(family))
    sizes = {size: value for size, value in SIZES.items() if size in known}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes | changes
    )
    config._experts_implementation = "eager"  # the others know no float64, which the oracle takes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # the usual tiny start values make every token nearly equally likely
        if parameter.ndim > 1 and "mamba" not in family:
            parameter.data.normal_(std=0.2)
    return model


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


def tokenwise(policy, model, rows, **changes):
    ids, mask = left_pad(rows, pad_id=5)
    return tokenwise_module.generate(policy, model, ids, mask, **dict(num_candidates=3) | changes)


def follows(decoded, rows, score, reward, k: int = 3) -> None:
    """Every token is the best of the k likeliest behind the row's own text, or within rounding of it, with its reward."""
    for row, answer, rewards in zip(rows, decoded.tokens.tolist(), decoded.rewards.tolist(), strict=True):
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

    call = dict(reward_weight=[row["weight"] for row in ROWS], num_candidates=3, max_new_tokens=3, eos_token_id=[])
    batch = policy, model, [row["prompt"] for row in ROWS], USERS
    follows(guided(*batch, **call), ROWS, score, reward)
    follows(with_copies(*batch, **call), ROWS, score, reward)
    even = [row | {"prompt": row["prompt"][:2]} for row in ROWS]  # without padding
    follows(guided(policy, model, [row["prompt"] for row in even], USERS, **call), even, score, reward)

    token_reward = TokenReward(random_lm(name, 2), None)
    rewards = Oracle(token_reward.lm)
    found = tokenwise(policy, token_reward, batch[2], reward_weight=call["reward_weight"], max_new_tokens=3, eos_token_id=[])
    follows(found, ROWS, score, lambda row, text, candidate: rewards(text)[candidate].item())


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(QUICK),
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=5),
    k=st.sampled_from([1, 2, 4]),
    weight=st.sampled_from([0.0, 0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_any_padding_follows_the_oracle(name, lengths, k, weight, seed):
    policy, model = random_lm(name, 0), reward_model(random_lm(name, 1))
    score, state = Oracle(policy), Oracle(model.backbone)
    rows = [dict(prompt=p, user=USERS[i % 3], weight=weight) for i, p in enumerate(prompts(lengths, seed))]

    def reward(row, text, candidate) -> float:
        return model.head(state([*text, candidate])[-1:].float(), model.users.rows([row["user"]])).item()

    call = dict(reward_weight=weight, num_candidates=k, max_new_tokens=2, eos_token_id=[])
    follows(
        guided(policy, model, [row["prompt"] for row in rows], [row["user"] for row in rows], **call), rows, score, reward, k
    )


@pytest.mark.parametrize("name", EVERY)
def test_plain_decoding_and_responses_follow_the_oracle(name):
    lm = copy.deepcopy(random_lm(name, 0))
    lm.generation_config.eos_token_id = None
    score, state, rows = Oracle(lm), Oracle(lm.get_decoder()), [row["prompt"] for row in ROWS]
    for row, answer in zip(rows, unguided.generate(lm, rows, max_new_tokens=4).tokens.tolist(), strict=True):
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


@pytest.mark.parametrize("name", EVERY)
def test_soft_prompts_of_several_lengths_follow_the_definition(name):
    """Embeddings before the prompt, padded on the left, go the same way as ids."""
    lm = copy.deepcopy(random_lm(name, 0))
    lm.generation_config.eos_token_id = None
    torch.manual_seed(0)
    soft = SoftPrompt(torch.randn(1, 2, 32) * 0.3, Users(USERS, offset=torch.randn(3, 2, 32) * 0.3))
    policy, exact, rows = UserPolicy(lm, None, soft=soft), copy.deepcopy(lm).double(), [row["prompt"] for row in ROWS]

    @torch.no_grad()
    def logprobs(user: str, text: list[int]) -> torch.Tensor:
        words = exact.get_input_embeddings()(torch.tensor([text]))
        embeds = torch.cat([soft(soft.users.rows([user])).double(), words], dim=1)
        return exact(inputs_embeds=embeds, use_cache=False).logits[0, -1].log_softmax(-1)

    for row, user, answer in zip(
        rows, USERS, unguided.generate(policy, rows, USERS, max_new_tokens=3).tokens.tolist(), strict=True
    ):
        for n, token in enumerate(answer):
            own = logprobs(user, row + answer[:n])
            assert own[token] >= own.max() - 1e-4
    if name in CAPPED:
        return
    packed = pack(rows, [[[9, 8, 7], [6]]] * 3, share=can_branch(lm))
    with torch.no_grad():
        values, mask = policy.logprobs(packed, torch.arange(3).repeat_interleave(2))
    responses = [(row, user, response) for row, user in zip(rows, USERS, strict=True) for response in ([9, 8, 7], [6])]
    for (row, user, response), value, seen in zip(responses, values, mask, strict=True):
        want = [logprobs(user, row + response[:n])[token].item() for n, token in enumerate(response)]
        assert value[seen].tolist() == pytest.approx(want, abs=1e-3)


def test_what_a_model_does_is_found_out():
    """Once for all families, without decoding anything."""
    for name in FAMILIES:
        lm = random_lm(name, 0)
        assert can_branch(lm) == can_branch(lm.get_decoder()) == (name not in NO_BRANCHES), name
        assert masks_every_step(lm) == (name not in ("mamba",)), name
        assert plain_output_layer(lm) == (name not in CAPPED), name


@pytest.mark.parametrize("lengths", [(2, 5), (14, 20)])
def test_longrope_is_right_on_either_side_of_its_border(lengths):
    policy, model = random_lm("phi3 longrope", 0), reward_model(random_lm("phi3 longrope", 1))
    score, state = Oracle(policy), Oracle(model.backbone)
    rows = [dict(prompt=p, user="ann", weight=2.0) for p in prompts(lengths)]

    def reward(row, text, candidate) -> float:
        return model.head(state([*text, candidate])[-1:].float(), model.users.rows(["ann"])).item()

    call = dict(reward_weight=2.0, num_candidates=3, max_new_tokens=4, eos_token_id=[])
    follows(guided(policy, model, [row["prompt"] for row in rows], ["ann"] * 2, **call), rows, score, reward)


@pytest.mark.parametrize("lengths", [(2, 14), (10, 10), (2, 10)])
def test_longrope_across_its_border_is_refused(lengths):
    policy, rows = random_lm("phi3 longrope", 0), prompts(lengths)
    model = reward_model(random_lm("phi3 longrope", 1))
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        guided(policy, model, rows, ["ann"] * 2, num_candidates=3, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        unguided.generate(policy, rows, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        tokenwise(policy, TokenReward(policy, None), rows, max_new_tokens=4)
    with pytest.raises(PyargsError, match="more than 12 tokens"):
        response_states(policy.get_decoder(), [(rows[0], [[3], [4] * 12])])


def test_a_reward_model_of_fewer_positions_is_refused():
    policy, rows = random_lm("llama", 0), prompts([4, 2])
    model = reward_model(random_lm("llama", 1))
    model.backbone.config.max_position_embeddings = 6
    with pytest.raises(PyargsError, match="4 prompt . 5 new tokens exceed the 6 positions of LlamaModel"):
        guided(policy, model, rows, ["ann"] * 2, num_candidates=3, max_new_tokens=5)


def test_caches_of_a_models_own_are_refused_where_rows_must_be_copied():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    config = MiniMaxConfig(**SIZES | dict(sliding_window=None), vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    config._experts_implementation = "eager"
    lm = MiniMaxForCausalLM(config).eval()
    with pytest.raises(PyargsError, match="MiniMaxCache"):
        with_copies(lm, reward_model(lm), [row["prompt"] for row in ROWS], USERS, num_candidates=3)


def test_a_model_that_padding_changes_is_refused_where_there_is_padding():
    from transformers import LlamaForCausalLM

    class Blind(LlamaForCausalLM):
        def forward(self, input_ids, cache=None, use_cache=None):
            return super().forward(input_ids=input_ids, cache=cache, use_cache=use_cache)

    config = random_lm("llama", 0).config
    torch.manual_seed(0)
    lm = Blind(config).double().eval()  # in float64, which the native stack leaves alone
    model, rows = reward_model(random_lm("llama", 1)), prompts([3, 5])
    assert unguided.generate(lm, rows[:1], max_new_tokens=2).tokens.shape == (1, 2)
    for way in (
        lambda: unguided.generate(lm, rows, max_new_tokens=2),
        lambda: tokenwise(lm, TokenReward(random_lm("llama", 1), None), rows, max_new_tokens=2),
        lambda: guided(lm, model, rows, USERS[:2], num_candidates=3, max_new_tokens=2),
    ):
        with pytest.raises(PyargsError, match="Blind does not leave padding out.*batch_size=1"):
            way()


def test_trying_a_model_leaves_its_modes_as_they_were():
    lm = copy.deepcopy(random_lm("llama", 0)).train()
    lm.model.layers[0].eval()
    before = [module.training for module in lm.modules()]
    assert can_branch(lm) and masks_every_step(lm) and plain_output_layer(lm)
    assert [module.training for module in lm.modules()] == before
