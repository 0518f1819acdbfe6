"""What tests of decoding share: prompts, pairs of models, the ways to decode, and the definition that they follow."""

from __future__ import annotations

import warnings

import torch
from conftest import reward_model, tiny_lm
from hypothesis import strategies as st

from pyargs.decode import reference
from pyargs.decode.engine import Engine
from pyargs.decode.pair import check_pair
from pyargs.decode.reference import Chosen
from pyargs.decode.request import numbered
from pyargs.lm import lora

USERS = ["ann", "bob", "cid"]


def prompts(lengths, seed=0, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def wishes(count: int, *, guided: bool = True, **wish) -> list[dict]:
    """What each of so many requests asks for: a list is one value for each, and a seed gives each its own."""
    usual = dict(reward_weight=1.0, num_candidates=5) if guided else {}
    wish = usual | dict(max_new_tokens=12, seed=0) | wish
    if isinstance(wish["seed"], int):
        wish["seed"] = [numbered(wish["seed"], i) for i in range(count)]
    several = {name for name, value in wish.items() if isinstance(value, list) and name != "stop"}
    assert all(len(wish[name]) == count for name in several)
    return [{name: value[i] if name in several else value for name, value in wish.items()} for i in range(count)]


def engine_of(policy, model=None, **how) -> Engine:
    """Without the warnings that say why it is slow, or what is not known of the tokenizers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Engine(policy, model, **how)


def steps_of(engine, rows, users=None, **wish) -> list[Chosen]:
    """What an engine chooses for requests that come in together. Raises what ended one of them otherwise."""
    users = users or [""] * len(rows)
    asked = zip(rows, users, wishes(len(rows), guided=engine.pair.guided, **wish), strict=True)
    found = {engine.submit(row, user, **own): Chosen([], [], []) for row, user, own in asked}
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            for kept, new in zip(found[event.number], (event.token, event.slot, event.reward), strict=True):
                kept.append(new)
    return list(found.values())


def chosen(policy, model, rows, users=None, *, backend="auto", eos_reward=None, tokenizer=None, **wish) -> list[Chosen]:
    """What an engine chooses that has room for all."""
    how = dict(backend=backend, eos_reward=eos_reward, tokenizer=tokenizer, max_rows=max(len(rows), 1))
    return steps_of(engine_of(policy, model, **how), rows, users, **wish)


def by_reference(policy, model, rows, users, *, eos_reward="before", tokenizer=None, **wish) -> list[Chosen]:
    """What the plain loop chooses."""
    pair = check_pair(policy, model, tokenizer, 0)
    asked = zip(rows, users, wishes(len(rows), **wish), strict=True)
    requests = [pair.request(row, user, **own) for row, user, own in asked]
    return reference.answers(policy, model, requests, eos_reward=eos_reward, vocabulary=pair.vocabulary)


def tokens(found: list[Chosen]) -> list[list[int]]:
    return [one.tokens for one in found]


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


def alike(lengths, seed=0):
    """Prompts of which many begin as the one before did: [(tokens taken over from it, length)]."""
    rows, generator = [[]], torch.Generator().manual_seed(seed)
    for kept, length in lengths:
        taken = rows[-1][: min(kept, length)]
        rows.append(taken + torch.randint(2, 61, (length - len(taken),), generator=generator).tolist())
    return rows[1:]


def same(one, other):
    assert [row.tokens for row in one] == [row.tokens for row in other]
    assert [row.slots for row in one] == [row.slots for row in other]
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(torch.tensor(ours.rewards), torch.tensor(theirs.rewards), atol=2e-5, rtol=2e-5)


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
def batches(draw, most: int = 4):
    """Models and requests: (policy, reward model, prompts, users, what is asked for)."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=most))
    each = lambda values: draw(st.lists(st.sampled_from(values), min_size=len(lengths), max_size=len(lengths)))  # noqa: E731
    seed = draw(st.integers(0, 99))
    pair = shared_pair(
        draw(st.sampled_from(["own", "shared", "shared lora"])), draw(st.sampled_from(["linear", "mlp", "personal mlp"])), seed
    )
    wish = dict(
        num_candidates=each([1, 2, 7]),
        max_new_tokens=each([1, 5, 12]),
        temperature=each([0.0, 0.0, 0.7, 2.0]),
        top_p=each([1.0, 1.0, 0.4]),
        min_p=each([0.0, 0.0, 0.5]),
        stop=draw(st.sampled_from([[], [1], [1, 7, 9, 11, 13, 20, 21, 30, 31, 40, 41, 50, 51]])),
        eos_reward=draw(st.sampled_from(["before", "state"])),
        seed=seed,
        reward_weight=each([0.0, 1.5, 0.3, 4.0]),
        reward_clip=each([None, None, 0.05, 0.8]),
    )
    return *pair, prompts(lengths, seed), [USERS[i % 3] for i in range(len(lengths))], wish


class Words:
    """As much of a tokenizer as the decoder looks at."""

    def __init__(self, n: int, shift: int = 0):
        self.n, self.shift = n, shift

    def __len__(self):
        return self.n

    def get_vocab(self):
        return {f"w{i}": i + self.shift for i in range(self.n)}

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids)
