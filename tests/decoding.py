"""What tests of decoding share: prompts, pairs of models, the ways to decode, and the definition that they follow."""

from __future__ import annotations

import warnings

import torch
from conftest import reward_model, tiny_lm
from hypothesis import strategies as st

import pyargs
from pyargs.decode import args, reference
from pyargs.decode import genarm as tokenwise_module
from pyargs.decode.request import check
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


def pair_in_float32(weights: str, family: str = "llama", seed: int = 0):
    """As `shared_pair`, in float32, which the stack computes in."""
    policy = tiny_lm(family, seed=seed, dtype=torch.float32)
    model = reward_model(policy if weights != "own" else tiny_lm(family, seed=seed + 1, dtype=torch.float32))
    if weights == "shared lora":
        torch.manual_seed(seed)
        lora.add(model.backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj", "down_proj"])
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
    return policy, model.eval()


def decoded(policy, model, rows, users, **changes):
    ids, mask = left_pad(rows, pad_id=1)
    return args.decode(policy, model, check(policy, model, ids, mask, users, **arguments(**changes)))


def tokenwise(policy, model, rows, **changes):
    ids, mask = left_pad(rows, pad_id=5)
    return tokenwise_module.generate(policy, model, ids, mask, **dict(num_candidates=3) | changes)


def alike(lengths, seed=0):
    """Prompts of which many begin as the one before did: [(tokens taken over from it, length)]."""
    rows, generator = [[]], torch.Generator().manual_seed(seed)
    for kept, length in lengths:
        taken = rows[-1][: min(kept, length)]
        rows.append(taken + torch.randint(2, 61, (length - len(taken),), generator=generator).tolist())
    return rows[1:]


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


class Words:
    """As much of a tokenizer as the decoder looks at."""

    def __init__(self, n: int, shift: int = 0):
        self.n, self.shift = n, shift

    def __len__(self):
        return self.n

    def get_vocab(self):
        return {f"w{i}": i + self.shift for i in range(self.n)}
