"""The ops of a decoding step, and RowState, which two of them keep. Each file holds an op, its plain PyTorch reference with
the same signature, and its fake kernel. The extension `pyargs._C` makes them fast; without it the references serve."""

from __future__ import annotations

from pyargs.ops.branch_attention import branch_attention, branch_attention_reference
from pyargs.ops.commit import commit, commit_reference
from pyargs.ops.library import native
from pyargs.ops.row_state import RowState
from pyargs.ops.score_select import score_select, score_select_reference
from pyargs.ops.score_step import score_step, score_step_reference
from pyargs.ops.tokenwise_select import tokenwise_select, tokenwise_select_reference
from pyargs.ops.tokenwise_step import tokenwise_step, tokenwise_step_reference
from pyargs.ops.topk_logprobs import topk_logprobs, topk_logprobs_reference
from pyargs.ops.user_mlp import user_mlp, user_mlp_reference

__all__ = [
    "RowState",
    "branch_attention",
    "branch_attention_reference",
    "commit",
    "commit_reference",
    "native",
    "score_select",
    "score_select_reference",
    "score_step",
    "score_step_reference",
    "tokenwise_select",
    "tokenwise_select_reference",
    "tokenwise_step",
    "tokenwise_step_reference",
    "topk_logprobs",
    "topk_logprobs_reference",
    "user_mlp",
    "user_mlp_reference",
]
