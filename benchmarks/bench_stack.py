"""Time of a pass through the CPU stack and through transformers, side by side.

    python benchmarks/bench_stack.py [--json FILE] [--quick] [--dtype bfloat16] [--threads N]

SmolLM2-135M. 1, 10 and 20 rows: next tokens behind one prefix of 64 (20 as for two users, or a policy and its reward model);
256 rows: a prompt. A pass leaves the output layer out; `head` is that layer for one row. GB/s counts each weight once, `of
stream` compares it with the rate at which this machine reads memory, taken in the same turn; GFLOP/s counts the products with
weights. The two take turns; ratios are medians of the ratios of a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from timing import hardware, hardware_line, options, streaming_rate, table
from tqdm import tqdm

import pyargs
from pyargs.files import write_json
from pyargs.lm.cache import RowCache, cache_name
from pyargs.lm.stack import pack

PREFIX = 64
COLUMNS = ["pass", "HF ms", "native ms", "HF/native", "GB/s", "of stream", "GFLOP/s", "largest error"]


def passes(model, stack, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    """A pass of so many rows through both; each call does the same again."""
    decoder, config = model.get_decoder(), model.config
    torch.manual_seed(rows)
    prompt, ids = (torch.randint(0, min(40000, config.vocab_size), (1, count)) for count in (PREFIX, rows))
    hf_cache = RowCache(config, 1, PREFIX + rows, "cpu")
    if rows > 30:  # a prompt
        return {
            "HF": lambda: prefill(decoder, ids, hf_cache),
            "native": lambda: stack(ids, stack.cache(1, rows)),
        }
    cache = stack.cache(1, PREFIX + rows)
    prefill(decoder, prompt, hf_cache)
    stack(prompt, cache)
    mask, positions = hf_cache.branches(rows), torch.full((1, rows), PREFIX)
    return {
        "HF": lambda: (
            decoder(ids, attention_mask=mask, position_ids=positions, **{cache_name(decoder): hf_cache}).last_hidden_state
        ),
        "native": lambda: stack(ids, cache, branches=True),
    }


def prefill(decoder, ids: torch.Tensor, cache: RowCache) -> torch.Tensor:
    cache.keep([])
    cache.join(torch.ones_like(ids))
    return decoder(ids, **{cache_name(decoder): cache}).last_hidden_state


def head(model, stack) -> dict[str, Callable[[], torch.Tensor]]:
    state = torch.randn(1, stack.dim)
    output, half = model.get_output_embeddings(), state.to(model.dtype)
    return {"HF": lambda: output(half), "native": lambda: stack.logits(state)}


def compare(name: str, fns: dict[str, Callable], rows: int, weights: int, size: int, turns: int, calls: int) -> dict:
    """weights: how many the pass reads, of `size` bytes each."""
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    rates = []
    results = [fn().float() for fn in fns.values()]  # also the warm-up
    for _ in range(turns):
        rates.append(streaming_rate(128))
        for side, fn in fns.items():
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                fn()
                times.append(time.perf_counter() - start)
            seconds[side].append(statistics.median(times))
    ours = statistics.median(seconds["native"])
    return {
        "pass": name,
        "HF ms": statistics.median(seconds["HF"]) * 1e3,
        "native ms": ours * 1e3,
        "HF/native": statistics.median(a / b for a, b in zip(seconds["HF"], seconds["native"], strict=True)),
        "GB/s": weights * size / ours / 1e9,
        "of stream": statistics.median(weights * size / 1e9 / t / r for t, r in zip(seconds["native"], rates, strict=True)),
        "GFLOP/s": 2 * rows * weights / ours / 1e9,
        "largest error": float((results[0] - results[1]).abs().max() / results[0].abs().max()),
    }


@torch.no_grad()
def main() -> None:
    given = options(
        __doc__,
        "a tiny random model and fewer repeats, for a smoke test",
        dtype=dict(choices=["float32", "bfloat16"], default="float32", help="of both"),
    )
    info = hardware()
    start = time.perf_counter()
    import transformers.models.llama.modeling_llama  # noqa: F401  what transformers imports before it can load anything
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    imported = time.perf_counter()
    model, _ = pyargs.load_lm("tiny-random" if given.quick else "smollm2-135m", dtype=given.dtype, device="cpu")
    loaded = time.perf_counter()
    stack = pack.pack(model)
    packed = time.perf_counter()
    print(
        f"{hardware_line(info)}\n{given.dtype}, transformers imported in {imported - start:.1f} s, "
        f"loaded in {loaded - imported:.1f} s, packed in {packed - loaded:.1f} s",
        flush=True,
    )

    in_head = model.get_output_embeddings().weight.numel()
    in_layers, size = sum(p.numel() for p in model.get_decoder().layers.parameters()), model.dtype.itemsize
    turns, calls = (3, 3) if given.quick else (9, 9)
    rows = []
    for count in tqdm([1, 10, 20, 256], unit="pass"):
        several = turns if count <= 30 else max(3, turns // 2)
        rows.append(
            compare(f"{count} rows", passes(model, stack, count), count, in_layers, size, several, calls if count <= 30 else 1)
        )
    rows.append(compare("head", head(model, stack), 1, in_head, size, turns, calls))
    print(table(rows, COLUMNS))
    if given.json:
        seconds = {
            "import_s": round(imported - start, 2),
            "load_s": round(loaded - imported, 2),
            "pack_s": round(packed - loaded, 2),
        }
        write_json(given.json, {"hardware": info, "dtype": given.dtype, **seconds, "rows": rows})


if __name__ == "__main__":
    main()
