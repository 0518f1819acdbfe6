"""The interface of vLLM's V1 runner, which its CPU builds have: `logits_processors=["pyargs.integrations.vllm.v1:Guide"]`."""

from __future__ import annotations

from pyargs.errors import extra
from pyargs.integrations.vllm.rows import Guided, Row, wish_of

with extra("vllm", "guiding inside vLLM"):
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality


class Answer:
    """A request's tokens as vLLM has them: its prompt, and the list that it appends to."""

    def __init__(self, prompt: list[int] | None, output: list[int]):
        if prompt is None:
            raise ValueError("a guided request has a prompt of tokens, not of embeddings")
        self.prompt, self.output = prompt, output

    def __iter__(self):
        yield from self.prompt
        yield from self.output


class Guide(LogitsProcessor):
    """See `pyargs.integrations.vllm`."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.guided, self.rows = Guided(device, vllm_config.model_config), {}

    @classmethod
    def validate_params(cls, params) -> None:
        wish_of(params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(index)
        for index, params, prompt, output in batch_update.added:
            self._leave(index)
            wish = wish_of(params)
            if wish is not None:
                self.rows[index] = Row(wish, Answer(prompt, output))
        for one, other, how in batch_update.moved:
            moving = self.rows.pop(one, None)
            if how == MoveDirectionality.SWAP:
                staying = self.rows.pop(other, None)
                if staying is not None:
                    self.rows[one] = staying
            else:
                self._leave(other)
            if moving is not None:
                self.rows[other] = moving

    def apply(self, logits):
        self.guided.guide(logits, sorted(self.rows.items()))
        return logits

    def _leave(self, index: int) -> None:
        if (row := self.rows.pop(index, None)) is not None:
            self.guided.drop(row)
