"""Others who decode the same model on this machine: llama.cpp through its wheel, transformers, and the official rule."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pyargs.files import cache_dir


def gguf_file(source: Path, kind: str) -> Path:
    """The model of a GGUF file with all its matrices in another type (F32, BF16, Q8_0), made once."""
    target = cache_dir() / "benchmarks" / f"{source.stem}-{kind}.gguf"
    if target.exists():
        return target
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    target.parent.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(source)
    writer = GGUFWriter(target.with_suffix(".part"), reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        wanted = GGMLQuantizationType[kind if len(tensor.shape) > 1 else "F32"]
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.move(target.with_suffix(".part"), target)
    return target


class LlamaCpp:
    """llama.cpp's server (the wheel `xllamacpp`) for one number of rows, in a process of its own: beside the OpenMP threads of
    torch those of llama.cpp would sleep at each barrier."""

    def __init__(self, file: Path, rows: int, threads: int, room: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(file), rows, threads, room), daemon=True)
        self.process.start()

    def run(self, ids: torch.Tensor, steps: int) -> tuple[float, float]:
        """Seconds of a step and of reading the prompts, by its own clock; each row asks by itself."""
        self.pipe.send((ids.tolist(), steps))
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe, file: str, rows: int, threads: int, room: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel, params.n_ctx, params.warmup = rows, rows * room, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt, params.cache_ram_mib, params.verbosity = False, 0, -1
    server = xllamacpp.Server(params)

    def ask(row: list[int], steps: int) -> dict:
        wish = dict(prompt=row, n_predict=steps, temperature=0.0, ignore_eos=True, cache_prompt=False)
        return server.handle_completions(wish)["timings"]

    with ThreadPoolExecutor(rows) as pool:
        while True:
            try:
                several, steps = pipe.recv()
            except EOFError:
                return
            start = time.perf_counter()
            found = list(pool.map(ask, several, [steps] * len(several)))
            whole = time.perf_counter() - start
            step = statistics.median(timing["predicted_ms"] / max(timing["predicted_n"] - 1, 1) for timing in found) / 1e3
            pipe.send((step, max(whole - step * (steps - 1), 0.0)))


@torch.no_grad()
def official(policy, backbone, head, ids: torch.Tensor, steps: int, weight: float, clock, k: int = 10) -> None:
    """The rule as the authors of ARGS publish it, for one row: the policy's step, then the reward model over the k candidates
    as a batch, with k copies of its cache, of which the chosen one's is copied k times again."""
    from transformers import DynamicCache

    own, theirs = DynamicCache(config=policy.config), DynamicCache(config=backbone.config)
    logits = policy(ids, past_key_values=own).logits[0, -1]
    backbone(ids, past_key_values=theirs)
    theirs.batch_repeat_interleave(k)
    for _ in range(steps):
        best = logits.log_softmax(-1).topk(k)
        states = backbone(best.indices.unsqueeze(1), past_key_values=theirs).last_hidden_state[:, -1]
        chosen = (best.values + weight * head(states)).argmax()
        theirs.batch_select_indices(chosen.repeat(k))
        token = best.indices[chosen].view(1, 1)
        clock(token)
        logits = policy(token, past_key_values=own).logits[0, -1]
