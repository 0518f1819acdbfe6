"""Guided decoding on a GPU, with random weights of the shapes of Qwen2.5, beside its baselines in the same run.

    python benchmarks/gpu_decode.py --out FOLDER [--sizes 0.5B 7B] [--compiled] [--dry-run]

For each size, k = 10, bfloat16, prompts of 256 tokens, ms per step (prefill is not counted):

  own          Engine(backend="cuda-graph"), the reward model with weights of its own: two passes in one graph
  shared       the same, the reward model being LoRA on the policy's weights: one pass
  eager        Engine(backend="eager") with the models of `own`
  greedy       our own captured step of the policy alone: what `shared` is compared with
  generate     greedy `generate` of the policy, transformers
  reference    the pure PyTorch loop with k copies of the cache, eager
  compiled     the same with both models under torch.compile, where --compiled asks for it

`limit` is the bytes of the weights that a step must read over the rate of a copy within the device. The reward weight is such
that the policy's favourite wins in about half of the steps; `top-1` says in how many. Every row of a batch is another user;
`own` and `shared` are medians over five prompts with two users each.
--dry-run: a tiny model, on a CPU where there is no GPU; what needs a graph then runs uncaptured.
All times of a step are the difference of a long and a short run, over the steps between.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from bisect import bisect_left
from pathlib import Path

import torch
from gpu_kernels import copy_rate
from gpu_results import add
from timing import hardware, hardware_line, table
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from pyargs.decode import reference
from pyargs.decode.backends import capture, cuda_graph, eager
from pyargs.decode.engine import Engine
from pyargs.decode.request import Request
from pyargs.heads import linear
from pyargs.lm import lora
from pyargs.lm.fused_modules import few_launches
from pyargs.models.reward_model import RewardModel
from pyargs.ops import topk_logprobs
from pyargs.types import Users

SIZES = {  # hidden, intermediate, layers, heads, key-value heads, tied
    "tiny": (64, 96, 2, 4, 2, True),
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
}
USERS = [f"user_{i}" for i in range(32)]
K, PROMPT = 10, 256
COLUMNS = [
    "size",
    "B",
    "way",
    "passes",
    "ms",
    "tokens/s",
    "limit ms",
    "of limit",
    "x reference",
    "x greedy",
    "top-1",
    "RM KV MB",
]


def random_lm(size: str, device: str):
    """A causal language model of this shape, N(0, 0.02) weights made on the device."""
    hidden, intermediate, layers, heads, groups, tied = SIZES[size]
    config = Qwen2Config(
        vocab_size=1000 if size == "tiny" else 151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02 if "embed" not in name else 0.1)
    return lm.eval()


def reward_model(backbone) -> RewardModel:
    torch.manual_seed(1)
    head = linear.Head(backbone.config.hidden_size, 8, Users(USERS, mixture=torch.randn(len(USERS), 8) * 2), softmax=True)
    return RewardModel(backbone, None, head).to(backbone.device).eval()


def on_shared_weights(policy) -> RewardModel:
    backbone = lora.twin(policy.get_decoder())
    lora.add(backbone, rank=8, alpha=16, rslora=True, target_modules=["q_proj", "v_proj"])
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return reward_model(backbone)


def weight_bytes(*models) -> int:
    """Of the weights that a pass reads: all but the embedding, which is read in a few rows only unless it is tied."""
    found = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    for model in models:
        if not model.config.tie_word_embeddings or model.get_output_embeddings() is None:
            found.pop(model.get_input_embeddings().weight.data_ptr(), None)
    return sum(found.values())


def answers(engine: Engine, ids: Tensor, steps: int, weight: float, user: int = 0) -> list:
    """Of so many tokens each; another user for each row, beginning with this one."""
    users = [USERS[(user + row) % len(USERS)] for row in range(len(ids))]
    return engine.generate(
        ids.tolist(), users, reward_weight=weight, num_candidates=K, max_new_tokens=steps, temperature=0.0, stop=[]
    )


def favourites(found: list) -> float:
    """The share of steps in which the policy's favourite won."""
    return statistics.mean(slot == 0 for one in found for slot in one.slots)


def balanced_weight(engine: Engine, batches: list[Tensor], steps: int) -> float:
    """The reward weight, 0.001 times a power of 2, at which the policy's favourite wins in about half of so many steps. The
    larger it is, the less often the favourite wins."""
    off = {}

    def seldom(power: int) -> bool:
        share = statistics.mean(favourites(answers(engine, ids, steps, 0.001 * 2**power)) for ids in batches[:3])
        off[power] = abs(share - 0.5)
        return share < 0.5

    bisect_left(range(16), True, key=seldom)
    return 0.001 * 2 ** min(off, key=off.get)


def ours(engine: Engine, batches: list[Tensor], steps: int, weight: float) -> tuple[float, float]:
    """(seconds of a step, share of steps that the policy's favourite won), median over all prompts, each for two users."""
    answers(engine, batches[0], steps, weight)  # captures, with the caches as large as they get
    seconds, shares = [], []
    for ids in batches:
        for user in (0, 1):
            seconds.append(step_of(lambda n, ids=ids, user=user: answers(engine, ids, n, weight, user), steps))
            shares.append(favourites(answers(engine, ids, steps, weight, user)))
    return statistics.median(seconds), statistics.mean(shares)


def greedy(policy, ids: Tensor, steps: int) -> float:
    """Seconds of a captured step of the policy alone: one pass over the last token, the best token, the cache."""
    rows, length = ids.shape
    half = eager.Policy(policy, rows)
    places = length + steps + capture.TRIALS + 1
    logits = half.join(ids.tolist(), -(-places // cuda_graph.PLACES) * cuda_graph.PLACES).clone()
    half.cache.captured = rows

    def step() -> None:
        logits.copy_(half.advance(topk_logprobs(logits, 1)[1].squeeze(1)))

    with few_launches(policy.get_decoder()):
        replay = cuda_graph.capture(step, ids.device)
    return _seconds(lambda: [replay() for _ in range(steps)]) / steps


def step_of(run, steps: int) -> float:
    """Seconds of a step of run(steps)."""
    return (_seconds(lambda: run(steps)) - _seconds(lambda: run(steps // 4))) / (steps - steps // 4)


def clocked(run, steps: int) -> float:
    run(steps)
    return statistics.median(step_of(run, steps) for _ in range(3))


def tried(step, device):
    """In the place of a capture: what a graph may not do raises here, too."""
    capture.try_out(step, device)
    return step


def _seconds(fn) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return time.perf_counter() - start


def backend(device: str) -> str:
    return "cuda-graph" if device == "cuda" else "eager"


@torch.no_grad()
def measure(size: str, batches: tuple[int, ...], device: str, rate: float, steps: int, compiled: bool) -> list[dict]:
    torch.manual_seed(0)
    policy = random_lm(size, device)
    own, shared = reward_model(random_lm(size, device).get_decoder()), on_shared_weights(policy)
    rows = []
    for batch in batches:
        length, several = (PROMPT, 5) if device == "cuda" else (8, 2)
        prompts = [torch.randint(policy.config.vocab_size, (batch, length), device=device) for _ in range(several)]
        rows += [{"size": size, **row} for row in compare(policy, own, shared, prompts, rate, steps, compiled)]
    return rows


def compare(
    policy, own: RewardModel, shared: RewardModel, prompts: list[Tensor], rate: float, steps: int, compiled: bool
) -> list[dict]:
    ids = prompts[0]
    one, two = weight_bytes(policy), weight_bytes(policy) + weight_bytes(own.backbone)
    rows = [{"way": "greedy", "seconds": greedy(policy, ids, steps), "bytes": one}]
    weight = {}
    for way, model, name in (
        ("own", own, backend(ids.device.type)),
        ("shared", shared, backend(ids.device.type)),
        ("eager", own, "eager"),
    ):
        engine = Engine(policy, model, backend=name, max_rows=len(ids))
        weight[way] = weight["own"] if way == "eager" else balanced_weight(engine, prompts, min(steps, 16))
        second, top = ours(engine, prompts[:1] if way == "eager" else prompts, steps, weight[way])
        together = eager.shares(policy, model.backbone, len(ids), K)
        rows.append(
            {
                "way": way,
                "seconds": second,
                "bytes": one if together else two,
                "top-1": top,
                "passes": 1 if together else 2,
                "RM KV MB": _reward_memory(model, ids),
                "reward_weight": weight[way],
            }
        )

    def generate(n: int):
        return policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)

    def loop(n: int):
        wish = dict(reward_weight=weight["own"], num_candidates=K, max_new_tokens=n)
        asked = zip(ids.tolist(), USERS, strict=False)
        return reference.answers(policy, own, [Request(tuple(prompt), user, **wish) for prompt, user in asked])

    rows.append({"way": "generate", "seconds": clocked(generate, steps), "bytes": one})
    rows.append({"way": "reference", "seconds": clocked(loop, steps // 2), "bytes": two})
    if compiled:
        for model in (policy, own.backbone):
            model.forward = torch.compile(model.forward, dynamic=True)
        try:
            rows.append({"way": "compiled", "seconds": clocked(loop, steps // 2), "bytes": two})
        except Exception as error:  # whatever the compiler raises belongs into the report
            print(f"torch.compile of the reference failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        for model in (policy, own.backbone):
            del model.forward
    seconds = {row["way"]: row["seconds"] for row in rows}
    for row in rows:
        second, limit = row.pop("seconds"), row.pop("bytes") / rate / 1e9
        row |= {
            "B": len(ids),
            "ms": second * 1e3,
            "tokens/s": len(ids) / second,
            "limit ms": limit * 1e3,
            "of limit": limit / second,
            "x reference": seconds["reference"] / second,
            "x greedy": second / seconds["greedy"],
        }
    return rows


def _reward_memory(model, ids: Tensor) -> str:
    """Megabytes of the reward model's keys and values at k = 10 and k = 40, the same places: they do not grow with k."""
    sizes = []
    for k in (10, 40):
        half = eager.Scorer(model.backbone, len(ids))
        half.join(ids.tolist(), 512)
        half.branch(ids[:, :1].expand(-1, k))
        states = half.cache.layers
        sizes.append(sum(t.numel() * t.element_size() for layer in states for t in (layer.keys, layer.values)) / 2**20)
    return "/".join(f"{size:.0f}" for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="each size's numbers go into its gpu.json")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES)[1:], default=list(SIZES)[1:], help="default: all")
    parser.add_argument("--compiled", action="store_true", help="the reference under torch.compile, too: minutes a size")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, few steps; on a CPU where there is no GPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.dry_run:
        parser.error("no GPU here: --dry-run tries the script on a CPU")
    if device == "cpu":
        cuda_graph.capture = tried
    info, rate = hardware(), copy_rate(device)
    print(f"{hardware_line(info)}\ncopies at {rate:.0f} GB/s", flush=True)
    if options.dry_run:
        print("dry run: shapes too small for the numbers to mean anything", flush=True)
    warnings.simplefilter("ignore", FutureWarning)
    for size in ["tiny"] if options.dry_run else options.sizes:
        batches, steps = ((1, 3), 8) if options.dry_run else ((1, 32), 64)
        rows = measure(size, batches, device, rate, steps, compiled=options.compiled and not options.dry_run)
        print(table(rows, COLUMNS), flush=True)
        found = {"hardware": info, "copy_gb_s": round(rate, 1), "dry_run": options.dry_run, "rows": rows}
        add(options.out, "decode", found, key=("size", "B", "way"))
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
