"""What holds of every head: folded it gives the same rewards from its rows' users alone, and it adds no constant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyargs.heads import distance, latent, linear, mlp, user_mlp
from pyargs.ops import score_select
from pyargs.types import Users


def table(count: int, **shapes) -> Users:
    """At most 500 users with random vectors. The first rows are the same whatever the count is."""
    torch.manual_seed(0)
    made = {name: torch.randn(500, width)[:count].clone() for name, width in shapes.items()}
    return Users([f"user {i}" for i in range(count)], **made)


HEADS = {
    "one direction": lambda count: linear.Head(32, 1, Users()),
    "linear": lambda count: linear.Head(32, 3, table(count, mixture=3), divisor=2.0),
    "softmax": lambda count: linear.Head(32, 3, table(count, mixture=3), softmax=True),
    "mlp": lambda count: mlp.Head(32, 8, Users()),
    "two layers": lambda count: mlp.Head(32, 8, Users(), activation="gelu", second=6),
    "personal mlp": lambda count: mlp.Head(32, 8, table(count, bias=8)),
    "personal two layers": lambda count: mlp.Head(32, 8, table(count, bias=8), activation="gelu", second=6),
    "distance": lambda count: distance.Head(32, 32, 4, table(count, mixture=4)),
    "latent": lambda count: latent.Head(32, 5, table(count, latent=5)),
    "user_mlp": lambda count: user_mlp.Head(32, 8, table(count, first=8 * 32, bias=8, last=8)),
}


def made(kind: str, count: int):
    torch.manual_seed(1)
    return HEADS[kind](count)


def rewards(folded, hidden):
    rows, k, _ = hidden.shape
    features, bank = folded.scored(hidden)
    return score_select(
        features,
        folded.weight,
        torch.arange(rows),
        torch.ones(rows),
        torch.zeros(rows, k),
        torch.arange(k).expand(rows, k),
        torch.zeros(rows, dtype=torch.bool),
        bias=folded.bias,
        activation=folded.activation,
        bank=bank,
    )[2]


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), k=st.integers(1, 7), seed=st.integers(0, 99))
def test_a_folded_head_gives_the_same_rewards(kind, rows, k, seed):
    head = made(kind, 3)
    torch.manual_seed(seed)
    hidden, user = torch.randn(rows, k, 32), torch.randint(0, 3, (rows,))
    reward = rewards(head.fold(user), hidden)
    torch.testing.assert_close(reward, head(hidden, user.unsqueeze(1).expand(rows, k)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=20, deadline=None)
@given(user=st.lists(st.integers(0, 39), min_size=1, max_size=9))
def test_a_row_is_the_same_in_any_company(kind, user):
    """Bit for bit: folded among others, among all users, or where no number of another user is one."""
    head, user = made(kind, 40), torch.tensor(user)
    hidden = torch.randn(len(user), 4, 32, generator=torch.Generator().manual_seed(0))
    want = rewards(head.fold(user), hidden)
    everyone = rewards(head.fold(torch.arange(40)), hidden.new_zeros(40, 4, 32).index_copy(0, user, hidden))
    assert torch.equal(everyone[user[-1:]], want[-1:])  # of a user that is there twice, `hidden` has the last
    others = torch.ones(40, dtype=torch.bool).index_fill(0, user, False)
    for vector in head.users.vectors.values():
        vector.data[others] = torch.nan
    assert torch.equal(rewards(head.fold(user), hidden), want)
    for i in range(len(user)):
        assert torch.equal(rewards(head.fold(user[i : i + 1]), hidden[i : i + 1]), want[i : i + 1])


class Operators(TorchDispatchMode):
    """Notes which operators run and the shapes of what they make."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.append((function, getattr(result, "shape", None)))
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_rewards_cost_the_same_however_many_users_are_known(kind):
    few, many = Operators(), Operators()
    user, hidden = torch.tensor([2, 0, 2]), torch.randn(3, 4, 32)
    for count, operators in ((5, few), (500, many)):
        head = made(kind, count)
        with operators, torch.no_grad():
            got = torch.stack([rewards(head.fold(user), hidden), head.eval()(hidden, user.unsqueeze(1).expand(3, 4))])
        if count == 5:
            want = got
    assert few.seen == many.seen and torch.equal(got, want)


@pytest.mark.parametrize("kind", HEADS)
def test_folded_rows_are_copies(kind):
    head, user, hidden = made(kind, 5), torch.tensor([4, 1]), torch.randn(2, 3, 32)
    folded = head.fold(user)
    want = rewards(folded, hidden)
    for vector in head.users.vectors.values():
        vector.data.fill_(torch.nan)
    assert torch.equal(rewards(folded, hidden), want)


def test_no_head_has_an_output_bias():
    """A constant has no gradient under Bradley-Terry, so its random start value would stay and count once per token."""
    for head in (linear.Head(4, 1, Users()), mlp.Head(4, 3, Users()), mlp.Head(4, 3, Users(), second=2)):
        assert head(torch.zeros(1, 4), torch.tensor([0])).isfinite()
        assert not any(name.startswith("last.bias") for name, _ in head.named_parameters())
    assert linear.Head(4, 1, Users())(torch.zeros(1, 4), torch.tensor([0])).item() == 0
