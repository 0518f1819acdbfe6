"""Guided answers through `generate` of transformers.

    python examples/generate.py [--model smollm2-135m] [--reward-model FOLDER --users ID ID] [--max-new-tokens 40]

Without --reward-model it trains a small head on the demo data first.
"""

from __future__ import annotations

import quick

import pyargs


def main(words: list[str] | None = None):
    options = quick.arguments(__doc__, words)
    policy, tokenizer = pyargs.load_lm(options.model)
    reward_model = quick.reward_model(options.reward_model, options.model)
    inputs = quick.prompts(tokenizer)
    weight = options.reward_weight or quick.unit_weight(policy, reward_model, inputs, options.users)

    guided = pyargs.guide(reward_model, users=options.users, reward_weight=weight)
    sequences = policy.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, custom_generate=guided)

    tokens = sequences[:, inputs["input_ids"].shape[1] :]
    quick.show(tokenizer, options.users, tokens)
    return tokens


if __name__ == "__main__":
    main()
