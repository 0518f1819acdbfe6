"""What rows ask of a step, and the filters on their candidates."""

from __future__ import annotations

import torch

from pyargs.decode.request import Request
from pyargs.decode.rows import Rows, filtered, of_requests
from pyargs.ops.row_state import counts


def rows_of(*requests: Request) -> Rows:
    rows = Rows(len(requests))
    rows.requests += requests
    rows.join(**of_requests(requests, "cpu"))
    return rows


def counted(rows: Rows, logprobs: torch.Tensor) -> torch.Tensor:
    return counts(logprobs, rows["own_k"], rows["top_p"], rows["min_p"])


def test_a_row_without_a_filter_keeps_all_its_candidates_beside_one_that_has_one():
    """However unlikely the last ones are: a reward may still choose them."""
    logprobs = torch.tensor([[0.0, -40.0, -60.0, -800.0]] * 2)
    free, narrow = Request((1,), num_candidates=4), Request((1,), num_candidates=4, top_p=0.9)
    assert counted(rows_of(free, narrow), logprobs).tolist() == [4, 1]
    kept = filtered(rows_of(free, narrow), logprobs)
    assert kept[0].tolist() == logprobs[0].tolist()
    assert kept[1].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf]


def test_filters_count_within_a_rows_own_candidates():
    logprobs = torch.tensor([[0.5, 0.25, 0.15, 0.1]] * 4).log()
    asked = [
        Request((1,), num_candidates=3),
        Request((1,), num_candidates=4, top_p=0.75),
        Request((1,), num_candidates=2, top_p=0.75),  # of two the first holds two thirds
        Request((1,), num_candidates=4, min_p=0.25),
    ]
    rows = rows_of(*asked)
    assert counted(rows, logprobs).tolist() == [3, 2, 2, 3]
    assert (rows.most, rows.filtered, rows.narrowed, rows.sampled) == (4, True, True, False)
    rows.keep([0])
    assert (rows.most, rows.filtered, rows.narrowed) == (3, False, False)
