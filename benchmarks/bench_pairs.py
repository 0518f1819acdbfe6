"""A pair's two responses in one pass behind one copy of their prompt, against a pass over each whole sequence.

    python benchmarks/bench_pairs.py [--json FILE] [--quick] [--threads N]

SmolLM2-135M (--quick: a tiny random model), float32, 2 pairs, responses of 16 to 32 tokens. train: forward and backward pass
of LoRE with LoRA; features: the states of a frozen backbone; scoring: log-probs of the responses. The baseline is a plain
causal pass over prompt and response, all four sequences in one batch, with the same reading of states and output layer.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from timing import interleaved, main

from pyargs.lm import lora
from pyargs.lm.forward import packed_states, spans, token_logprobs
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import Packed, pack
from pyargs.methods import lore
from pyargs.training.trainer import _collate

COLUMNS = ["what", "prompt", "packed ms", "separate ms", "ratio", "tokens packed", "tokens separate", "largest difference"]

LENGTHS = {True: (32,), False: (64, 384)}


def measure(quick: bool, rate: float) -> list[dict]:
    lm, tokenizer = load_lm("tiny-random" if quick else "smollm2-135m")
    config = lore.Config()
    torch.manual_seed(0)
    model = lore.build(lm, tokenizer, ["ann", "bob"], config)
    lm.requires_grad_(False)
    rows = [compare(what, length, lm, model, quick) for length in LENGTHS[quick] for what in ("features", "scoring")]
    lora.add(lm.get_decoder(), rank=8, alpha=16, rslora=True, target_modules=None)
    return rows + [compare("train", length, lm, model, quick) for length in LENGTHS[quick]]


def compare(what: str, length: int, lm, model, quick: bool) -> dict:
    generator = torch.Generator().manual_seed(length)
    draw = lambda n: torch.randint(3, 400, (n,), generator=generator).tolist()  # noqa: E731
    sizes = torch.randint(16, 33, (2, 2), generator=generator).tolist()
    examples = [
        {"prompt": draw(length), "responses": [draw(n) for n in two], "user": i % 2, "pair": i} for i, two in enumerate(sizes)
    ]
    ways = {
        "packed": lambda: once(what, lm, model, examples, True),
        "separate": lambda: once(what, lm, model, examples, False),
    }
    difference = (ways["packed"]() - ways["separate"]()).abs().max().item()
    seconds = interleaved(ways, repeats=3, warmup=1)
    share, own = (pack([e["prompt"] for e in examples], [e["responses"] for e in examples], share=s) for s in (True, False))
    return {
        "what": what,
        "prompt": length,
        "packed ms": round(1e3 * seconds["packed"], 1),
        "separate ms": round(1e3 * seconds["separate"], 1),
        "ratio": round(seconds["separate"] / seconds["packed"], 2),
        "tokens packed": share.input_ids.numel(),
        "tokens separate": own.input_ids.numel(),
        "largest difference": difference,
    }


def once(what: str, lm, model, examples: list[dict], share: bool) -> torch.Tensor:
    """The losses' margins, the states, or the log-probs [responses, T], computed one way or the other."""
    inputs = {name: value for name, value in _collate(examples, share).items() if name != "part"}
    if what == "train":
        packed, rest = split(inputs)
        with causal(lm.get_decoder(), not share):
            batch = model(**rest, **vars(packed))
        loss = lore.loss(model, batch, lore.Config())
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        return model.rewards(batch).detach()
    packed, _ = split(inputs)
    with torch.no_grad(), causal(lm.get_decoder(), not share):
        if what == "scoring":
            return token_logprobs(lm, packed)[0]
        states, mask = spans(packed_states(lm.get_decoder(), packed), packed)
        return states * mask.unsqueeze(-1)


def split(inputs: dict) -> tuple[Packed, dict]:
    names = Packed.__dataclass_fields__
    return Packed(**{k: inputs[k] for k in names}), {k: v for k, v in inputs.items() if k not in names}


@contextmanager
def causal(decoder, on: bool):
    """Within it the decoder is called without mask and positions: one response a row needs neither, and runs faster so."""
    forward = decoder.forward
    if on:
        decoder.forward = lambda input_ids, use_cache, **_: forward(input_ids=input_ids, use_cache=use_cache)
    try:
        yield
    finally:
        decoder.__dict__.pop("forward", None)


if __name__ == "__main__":
    main(__doc__, measure, COLUMNS)
