"""The native stack computes what transformers computes, and a token's state depends on nothing but the text before it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CAPABILITIES
from hypothesis import given, settings
from hypothesis import strategies as st

import pyargs
from pyargs.errors import PyargsError
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.loading import load_lm
from pyargs.lm.stack import pack
from pyargs.models.reward_model import RewardModel
from pyargs.ops import score_select, topk_logprobs
from pyargs.ops.library import has_extension
from pyargs.types import Users

if not has_extension:
    pytest.skip("no extension", allow_module_level=True)
from pyargs import _C  # noqa: E402

LEVELS = (*CAPABILITIES, "avx512_bf16")
AVAILABLE = LEVELS[: LEVELS.index(_C.cpu_capability_detected()) + 1]
VOCABULARY = 67


@contextmanager
def using(capability: str):
    before = _C.cpu_capability()
    _C.set_cpu_capability(capability)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


def random_lm(
    family="llama", *, seed=0, heads=4, kv_heads=2, head_dim=8, hidden=32, inner=48, layers=2, vocabulary=VOCABULARY, **more
):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        **more,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return model


@st.composite
def models(draw, **fixed):
    family = draw(st.sampled_from(["llama", "qwen2"]))
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    more = dict(
        heads=kv_heads * share,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 24)),
        hidden=kv_heads * share * draw(st.integers(1, 9)),
        inner=draw(st.integers(1, 80)),
        layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
    if family == "llama":
        more |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    return random_lm(family, **(more | fixed))


@st.composite
def batches(draw, longest=40):
    """Texts of different lengths, padded on the left: ids, mask, lengths."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 2))
    torch.manual_seed(draw(st.integers(0, 999)))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return torch.randint(0, VOCABULARY, mask.shape), mask, lengths


@torch.no_grad()
def hf_states(model, text) -> torch.Tensor:
    return model.get_decoder()(torch.as_tensor(text)[None]).last_hidden_state[0].float()


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max() + 1), rtol=0)


def identical(ours, theirs):
    assert torch.equal(ours, theirs), f"differs by {(ours - theirs).abs().max()}"


@settings(max_examples=60, deadline=None)
@given(model=models(), batch=batches(), capability=st.sampled_from(AVAILABLE))
def test_prompts_of_any_model_as_in_transformers(model, batch, capability):
    ids, mask, _ = batch
    stack = pack.pack(model)
    with using(capability):
        states = stack(ids, stack.cache(len(ids), ids.shape[1]), mask)
        logits = stack.logits(states[:, -1])
    assert (states[~mask] == 0).all()
    for row, text, seen in zip(states, ids, mask, strict=True):
        close(row[seen], hf_states(model, text[seen]))
    with torch.no_grad():
        close(logits, model.get_output_embeddings()(states[:, -1]))


@settings(max_examples=30, deadline=None)
@given(model=models(), batch=batches(), k=st.integers(1, 14), data=st.data(), capability=st.sampled_from(AVAILABLE))
def test_branches_and_the_committed_one_as_in_transformers(model, batch, k, data, capability):
    ids, mask, lengths = batch
    stack = pack.pack(model)
    texts = [text[seen].tolist() for text, seen in zip(ids, mask, strict=True)]
    with using(capability):
        cache = stack.cache(len(ids), ids.shape[1] + 3 + k)
        stack(ids, cache, mask)
        for _ in range(3):
            candidates = torch.randint(0, VOCABULARY, (len(ids), k))
            states = stack(candidates, cache, branches=True)
            for b, text in enumerate(texts):
                for j in range(k):
                    close(states[b, j], hf_states(model, [*text, int(candidates[b, j])])[-1])
            slot = torch.tensor([data.draw(st.integers(0, k - 1)) for _ in texts])
            stack.commit(cache, slot)
            texts = [[*text, int(candidates[b, slot[b]])] for b, text in enumerate(texts)]
        assert cache.length == [length + 3 for length in lengths]
        last = stack(torch.zeros(len(ids), 1, dtype=torch.long), cache)
    for b, text in enumerate(texts):
        close(last[b, 0], hf_states(model, [*text, 0])[-1])


@pytest.mark.parametrize("capability", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_does_not_depend_on_its_pass(capability, dtype, with_threads):
    """Bit by bit: in a prompt, one after the other, as a branch in any column, beside others, with any threads."""
    stack = pack.pack(random_lm(hidden=44, inner=45, head_dim=10), dtype=dtype)
    text = torch.randint(0, VOCABULARY, (1, 600))
    with using(capability):
        whole = stack(text, stack.cache(1, 600))
        identical(with_threads(3, lambda: stack(text, stack.cache(1, 600))), whole)

        cache = stack.cache(3, 620)
        parts = [stack(part, cache, rows=[1]) for part in text[:, :550].split([3, 1, 400, 146], dim=1)]
        identical(torch.cat(parts, dim=1), whole[:, :550])
        stack(text[:, :70].expand(2, -1), cache, rows=[2, 0])
        for t in range(550, 570):
            branches = torch.randint(0, VOCABULARY, (3, 13))
            column = t % 13
            branches[1, column] = text[0, t]
            states = stack(branches, cache, branches=True)
            identical(states[1, column], whole[0, t])
            stack.commit(cache, torch.tensor([column]), rows=[1])
        identical(stack(text[:, 570:], cache, rows=[1]), whole[:, 570:])
        identical(stack.logits(whole[0])[599], stack.logits(whole[0, 599:])[0])


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), 7.0).contiguous().view(torch.int32)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), capability=st.sampled_from(AVAILABLE), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_largest_logits_are_those_of_the_whole_output_layer(data, capability, dtype):
    """Bit by bit: ties, numbers that are none, and those at the ends of the range included. All others are smaller."""
    draw, heads = data.draw, data.draw(st.integers(1, 70))
    model = random_lm(
        heads=heads, kv_heads=heads, head_dim=2, hidden=2 * heads, layers=1, vocabulary=draw(st.integers(1, 3000))
    )
    torch.manual_seed(draw(st.integers(0, 999)))
    weight = model.get_output_embeddings().weight.data
    if draw(st.booleans()):
        weight *= torch.randn(len(weight), 1).exp()
    else:  # hard to tell apart
        weight.copy_(weight[:1] + weight * draw(st.sampled_from([1e-1, 1e-2, 1e-7])))
    weight *= draw(st.sampled_from([1.0, 1e-12, 1e-20, 1e-37, 1e15, 1e23, 1e38]))
    odd = torch.randint(0, len(weight), (draw(st.integers(0, 6)),))
    weight[odd, torch.randint(0, weight.shape[1], odd.shape)] *= draw(st.sampled_from([0.0, 30.0, 1e-39, 1e30]))
    weight[torch.randint(0, len(weight), odd.shape)] = weight[odd]
    weight[odd[:1], 0] = draw(st.sampled_from([0.0, 1.0, torch.inf, -torch.inf, torch.nan]))
    states = torch.randn(draw(st.integers(1, 8 if dtype == torch.float32 else 2)), weight.shape[1])
    states[0] *= draw(st.sampled_from([1.0, 0.0, 1e-18, 1e-23, 1e-30, 1e-38, 1e15, 1e30, torch.nan]))
    vocabulary = draw(st.integers(1, len(weight)))
    top = draw(st.integers(1, min(vocabulary, 64)))
    stack = pack.pack(model, dtype=dtype)
    with using(capability):
        whole, found = stack.logits(states)[:, :vocabulary], stack.logits(states, top=top, vocabulary=vocabulary)
        for row, state in zip(found, states, strict=True):
            identical(bits(stack.logits(state[None], top=top, vocabulary=vocabulary)[0]), bits(row))
    for right, row in zip(whole, found, strict=True):
        order = right.sort(descending=True, stable=True).indices[:top]
        identical(row.sort(descending=True, stable=True).indices[:top], order)
        identical(bits(row[order]), bits(right[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_screen_leaves_most_of_the_output_layer_out(dtype):
    """Else it would be exact, and of no use; a row that has finished, all zero, is left out as a whole."""
    stack = pack.pack(random_lm(hidden=256, head_dim=64, layers=1, vocabulary=20000), dtype=dtype)
    states = torch.cat([torch.randn(1, 256), torch.zeros(1, 256)])
    whole, found = stack.logits(states), stack.logits(states, top=10)
    assert 10 <= (whole[0] == found[0]).sum() < 2000
    assert (whole - found).abs().max() < 0.01 * whole.abs().max()
    identical(found[1], torch.zeros(20000))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_long_prompts(family):
    model = random_lm(family, layers=1)
    stack = pack.pack(model)
    text = torch.randint(0, VOCABULARY, (1, 1500))
    close(stack(text, stack.cache(1, 1500))[0], hf_states(model, text[0]))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ],
)
def test_rope_scaling(scaling):
    model = random_lm(rope_parameters={"rope_theta": 500.0, **scaling}, head_dim=32)
    stack = pack.pack(model)
    text = torch.randint(0, VOCABULARY, (1, 100))
    close(stack(text, stack.cache(1, 100))[0], hf_states(model, text[0]))


@settings(max_examples=15, deadline=None)
@given(model=models(), batch=batches(), capability=st.sampled_from(AVAILABLE))
def test_bfloat16_is_as_near_to_the_truth_as_that_of_transformers(model, batch, capability):
    ids, mask, _ = batch
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).float()
    for stack in (pack.pack(half), pack.pack(exact, dtype=torch.bfloat16)):
        with using(capability):
            states = stack(ids, stack.cache(len(ids), ids.shape[1]), mask)
        for row, text, seen in zip(states, ids, mask, strict=True):
            truth, theirs = hf_states(exact, text[seen]), hf_states(half, text[seen])
            assert (row[seen] - truth).pow(2).mean() <= 2 * (theirs - truth).pow(2).mean() + 1e-4 * truth.pow(2).mean()


def with_lora(model, modules=("q_proj", "v_proj"), std=0.3):
    decoder = copy.deepcopy(model.get_decoder())
    lora.add(decoder, rank=3, alpha=8, rslora=True, target_modules=modules)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return decoder


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@settings(max_examples=30, deadline=None)
@given(
    model=models(),
    batch=batches(20),
    modules=st.sets(st.sampled_from(ALL), min_size=1),
    capability=st.sampled_from(AVAILABLE),
    merged=st.booleans(),
)
def test_lora_merged_and_as_a_delta_of_single_rows(model, batch, modules, capability, merged):
    ids, mask, _ = batch
    tuned = with_lora(model, sorted(modules))
    delta = torch.arange(len(ids)) % 2 == 0
    truth = [hf_states(tuned if d else model, text[seen]) for text, seen, d in zip(ids, mask, delta, strict=True)]
    lora_states = [hf_states(tuned, text[seen]) for text, seen in zip(ids, mask, strict=True)]
    both = pack.pack(model, adapter=tuned)
    if merged:
        lora.merge(tuned)
    alone, plain = pack.pack(tuned), pack.pack(model)
    with using(capability):
        run = lambda stack, **more: stack(ids, stack.cache(len(ids), ids.shape[1]), mask, **more)  # noqa: E731
        for row, seen, states in zip(run(both, delta=delta), mask, truth, strict=True):
            close(row[seen], states)
        for states in (run(alone), run(both, delta=True)):
            for row, seen, truth in zip(states, mask, lora_states, strict=True):
                close(row[seen], truth)
        identical(run(both), run(plain))
        assert torch.equal(run(both, delta=delta)[~delta], run(plain)[~delta])


def test_policy_and_reward_model_in_one_pass():
    """Two policy rows and k reward-model rows of each sequence, each with its own row of the cache."""
    model = random_lm()
    tuned, k = with_lora(model), 5
    stack = pack.pack(model, adapter=tuned)
    ids, prompt = torch.randint(0, VOCABULARY, (2, k)), torch.randint(0, VOCABULARY, (2, 9))
    cache = stack.cache(4, 9 + k)
    delta = [False, False, True, True]
    stack(prompt.repeat(2, 1), cache, delta=delta)
    mask = torch.ones(4, k, dtype=torch.bool)
    mask[:2, 2:] = False
    states = stack(ids.repeat(2, 1), cache, mask, branches=True, delta=delta)
    for b in range(2):
        for j in range(k):
            text = [*prompt[b].tolist(), int(ids[b, j])]
            close(states[2 + b, j], hf_states(tuned, text)[-1])
            if j < 2:
                close(states[b, j], hf_states(model, text)[-1])
    assert (states[:2, 2:] == 0).all()
    stack.commit(cache, torch.tensor([1, -1, 1, -1]))
    assert cache.length == [10, 9, 10, 9]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda: random_lm(hidden_act="gelu"), "gelu"),
        (lambda: random_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0), "sliding_attention"),
        (lambda: random_lm(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: random_lm("mistral"), "mistral"),
        (lambda: random_lm().double(), "float64"),
        (lambda: random_lm().to("meta"), "meta"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    with pytest.raises(PyargsError, match=named):
        pack.pack(change())


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(PyargsError, match="same base weights"):
        pack.pack(random_lm(seed=1), adapter=with_lora(random_lm(seed=2)))


def test_wrong_arguments_are_errors():
    model = random_lm()
    stack = pack.pack(model)
    cache = stack.cache(2, 8)
    ids = torch.zeros(2, 6, dtype=torch.long)
    stack(ids, cache)
    for call, message in [
        (lambda: stack(ids, cache), "full"),
        (lambda: stack(ids[:, :3], cache, branches=True), "full"),
        (lambda: stack(ids[:, :1] + VOCABULARY, cache), "vocabulary"),
        (lambda: stack(ids[:, :1] - 1, cache), "vocabulary"),
        (lambda: stack(ids[0], cache), r"\[B, n\]"),
        (lambda: stack(ids[:, :1] + 0.5, cache), "ids must be whole numbers, got torch.float32"),
        (lambda: stack(ids[:, :1], cache, rows=[0.0, 1.7]), "rows must be whole numbers"),
        (lambda: stack(ids[:, :1], cache, torch.ones(2, 2)), "mask"),
        (lambda: stack(ids[:, :1], cache, rows=[0, 2]), "row"),
        (lambda: stack(ids.repeat(2, 1)[:, :1], cache), "rows of ids"),
        (lambda: stack(ids[:, :1], cache, rows=[1, 1]), "twice"),
        (lambda: stack(ids[:, :1], cache, delta=True), "adapter"),
        (lambda: stack.commit(cache, torch.tensor([0, 2])), "slot"),
        (lambda: cache.copy(2, 0, 0), "not in the cache"),
        (lambda: cache.copy(0, 0, 0), "no copy of itself"),
        (lambda: cache.copy(1, 0, 9), "not as many"),
        (lambda: stack.logits(torch.zeros(2, 31)), "states"),
        (lambda: stack.logits(torch.zeros(2, 32), top=-1), "the -1 largest"),
        (lambda: stack.logits(torch.zeros(2, 32), vocabulary=-1), "-1 tokens"),
        (lambda: stack.logits(torch.zeros(2, 32), vocabulary=VOCABULARY + 1), "tokens"),
        (lambda: stack(ids[:, :1], pack.pack(random_lm(layers=1)).cache(2, 8)), "sizes"),
        (lambda: pack.pack(model.get_decoder()).logits(torch.zeros(1, 32)), "output layer"),
    ]:
        with pytest.raises(PyargsError, match=message):
            call()
    assert cache.length == [6, 6]  # a pass that failed leaves no trace
    assert stack(ids[:, :0], cache).shape == (2, 0, 32)


def test_only_a_branch_of_the_last_pass_is_committed():
    stack = pack.pack(random_lm())
    cache = stack.cache(3, 12)
    ids = torch.zeros(3, 3, dtype=torch.long)
    stack(ids, cache)
    stack(ids, cache, torch.tensor([[1, 0, 1]] * 3, dtype=torch.bool), branches=True)
    for slot, rows, message in [
        ([0, 1, 0], None, "no branch"),  # masked out
        ([0, 3, 0], None, "no branch"),
        ([0, 2], [1, 1], "twice"),
    ]:
        with pytest.raises(PyargsError, match=message):
            stack.commit(cache, torch.tensor(slot), rows)
    assert cache.length == [3, 3, 3]
    stack.commit(cache, torch.tensor([2, -1, -1]))
    stack(ids[:1, :1], cache, rows=[1])
    for slot, row in [(0, 0), (0, 1)]:  # behind a commit and behind an ordinary token
        with pytest.raises(PyargsError, match="no branch"):
            stack.commit(cache, torch.tensor([slot]), [row])
    stack(ids, cache, branches=True)
    cache.cut(2)
    with pytest.raises(PyargsError, match="no branch"):
        stack.commit(cache, torch.tensor([0, 0, 0]))
    assert cache.length == [2, 2, 2]


@pytest.fixture(scope="module")
def smollm2():
    folder = Path.home() / ".cache" / "pyargs" / "models" / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no SmolLM2 at {folder}: pyargs demo fetches it")
    return load_lm(str(folder), device="cpu")


def test_greedy_text_of_smollm2(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer("The first thing to know about winter is that it")["input_ids"]])
    stack = pack.pack(model)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=[])
    cache, text = stack.cache(1, 64), ids
    states = stack(ids, cache)
    while text.shape[1] < expected.shape[1]:
        token = stack.logits(states[:, -1]).argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
        states = stack(token, cache)
    assert text.tolist() == expected.tolist()


def test_args_of_two_users_on_smollm2(smollm2):
    """A stack that is policy and reward model at once gives the tokens of pyargs.generate."""
    model, tokenizer = smollm2
    texts = ["The first thing to know about winter is that it", "My favourite book is"]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask, batch, k, steps = encoded["input_ids"], encoded["attention_mask"], 2, 10, 16
    decoder = with_lora(model, std=0.01)
    torch.manual_seed(0)
    users = Users(["ann", "bob"], mixture=torch.randn(2, 8) * 2)
    head = linear.Head(model.config.hidden_size, 8, users, softmax=True, divisor=model.config.hidden_size**0.5)
    reward_model = RewardModel(decoder, tokenizer, head).eval()
    decoded = pyargs.generate(
        model,
        reward_model,
        ids,
        mask,
        ["ann", "bob"],
        reward_weight=1.8,
        num_candidates=k,
        max_new_tokens=steps,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert 0 < (decoded.slots > 0).sum() < decoded.slots.numel()  # the reward model decides, and not alone

    stack = pack.pack(model, adapter=decoder)
    cache = stack.cache(2 * batch, ids.shape[1] + steps + k)
    policy, reward = [0, 1], [2, 3]
    state = stack(ids.repeat(2, 1), cache, mask.repeat(2, 1), delta=[False, False, True, True])[:batch, -1]
    for step in range(steps):
        logprobs, candidates, _ = topk_logprobs(stack.logits(state), k)
        hidden = stack(candidates, cache, branches=True, rows=reward, delta=True)
        token, slot, _, _ = score_select(
            hidden,
            head.fold().weight,
            users.rows(["ann", "bob"]),
            torch.full((batch,), 1.8),
            logprobs,
            candidates,
            torch.zeros(batch, dtype=torch.bool),
        )
        assert token.tolist() == decoded.tokens[:, step].tolist()
        stack.commit(cache, slot, rows=reward)
        state = stack(token[:, None], cache, rows=policy)[:, -1]


def test_a_pass_ends_with_fewer_threads_than_asked_for():
    """Whoever is there takes the share of those who never come."""
    code = (
        "import torch; from conftest import tiny_lm; from pyargs.lm.stack.pack import pack; torch.set_num_threads(8);"
        "stack = pack(tiny_lm(dtype=torch.float32)); ids = torch.arange(40).view(2, 20);"
        "many = stack(ids, stack.cache(2, 20)); torch.set_num_threads(1);"
        "assert many.equal(stack(ids, stack.cache(2, 20)))"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=300, check=True)
