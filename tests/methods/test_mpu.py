"""A model for each user: who is absent does not move, and the loss is its formula."""

from __future__ import annotations

import planted
import torch
from formulas import USERS, compare, leaves, some_batch
from planted import ids

from pyargs.methods import mpu
from pyargs.training import optimizers


def test_absent_users_do_not_move():
    """SparseAdam: a minibatch moves its own users only, even when others have momentum."""
    data = planted.pairs("own")
    config = mpu.Config(hidden=8)
    model = mpu.build(planted.Backbone(), None, ids(data.train), config)
    model.head.train()
    optimizer = optimizers.make(mpu, model, config)
    rows = model.users.rows(data.train.users)
    first, second = (rows == 0).nonzero().flatten()[:8], (rows == 5).nonzero().flatten()[:8]
    for index in (first, second):
        before = {name: value.detach().clone() for name, value in model.users.vectors.items()}
        optimizer.zero_grad()
        mpu.loss(model, data.train.batch(rows, index, last=True), config).backward()
        optimizer.step()
        user = int(rows[index[0]])
        for name, value in model.users.vectors.items():
            moved = (value != before[name]).flatten(1).any(1)
            assert moved[user] and not moved[torch.arange(len(moved)) != user].any(), name


def test_formula_of_mpu():
    torch.manual_seed(0)
    config = mpu.Config(hidden=5, pool="mean")
    model = mpu.build(planted.Backbone(), None, USERS, config).train()
    for value in model.users.vectors.values():
        value.data += 0.1 * torch.randn_like(value)
    batch = some_batch(tokens=4)
    ours, p = leaves(model)
    total = 0.0
    for n, u in enumerate(batch.user.tolist()):
        r = []
        for side in (0, 1):
            h = batch.hidden[n, side][batch.mask[n, side]].double()
            x = torch.relu(h @ p["users.vectors.first"][u].view(5, -1).T + p["users.vectors.bias"][u])
            r.append((x @ p["users.vectors.last"][u]).mean())
        total = total + torch.log1p(torch.exp(-(r[0] - r[1])))
    compare(mpu.loss(model, batch, config), total / len(batch), ours, p)
