"""ICL without demonstrations is the policy as it is."""

from __future__ import annotations

from small import config_of

from pyargs.lm.tokenize import encode_prompt
from pyargs.training import adapt, trainer


def test_zero_shots_is_the_policy_as_it_is(lm_folder, rows):
    model = trainer.train("icl", rows, config_of("icl", lm_folder, shots=0))
    adapt.adapt(model, rows)
    assert model.prompt_ids("tell me", "anybody") == encode_prompt(model.tokenizer, "tell me")
