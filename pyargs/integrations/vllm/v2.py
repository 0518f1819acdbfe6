"""The interface of vLLM's Model Runner V2: `logits_processors=["pyargs.integrations.vllm.v2:Guide"]`. Not yet run on a GPU."""

from __future__ import annotations

from pyargs.errors import extra
from pyargs.integrations.vllm.rows import Guided, Row, wish_of

with extra("vllm", "guiding inside vLLM"):
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor


class Guide(LogitsProcessor):
    """See `pyargs.integrations.vllm`. Speculative decoding is refused: its rows follow drafts that may be taken back."""

    def __init__(self, vllm_config, req_states):
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise ValueError("a guided policy does not speculate: start vLLM without speculative decoding")
        self.guided, self.states, self.rows = Guided(req_states.device, vllm_config.model_config), req_states, {}

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        wish_of(sampling_params)

    def add_request(self, req_idx: int, sampling_params) -> bool:
        if (old := self.rows.pop(req_idx, None)) is not None:
            self.guided.drop(old)
        wish = wish_of(sampling_params)
        if wish is not None:
            self.rows[req_idx] = Row(wish)
        return wish is not None

    def apply(self, logits, ctx):
        slots, lengths = ctx.expanded_idx_mapping.tolist(), (ctx.pos + 1).tolist()
        guided = [(place, self.rows[slot]) for place, slot in enumerate(slots) if slot in self.rows]
        for place, row in guided:
            row.tokens = self.states.all_token_ids.gpu[slots[place], : lengths[place]].tolist()
        self.guided.guide(logits, guided)
        return logits
