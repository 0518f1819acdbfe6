"""The CUDA kernels against the same work in PyTorch operators, both from CUDA graphs, over inputs that no cache holds.

    python benchmarks/gpu_kernels.py --out FOLDER [--dry-run]

`copy` is the rate at which this GPU copies a gigabyte (bytes read and written); an op's share of it counts the bytes that it
must read. "torch eager us" is the baseline launched operator by operator. --dry-run: small shapes, once, on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import bench_branch_attention
import torch
from gpu_results import add
from timing import hardware, hardware_line, table
from torch import Tensor

from pyargs.decode.backends.capture import NoHostReads
from pyargs.ops import commit, score_select, tokenwise_select, topk_logprobs, user_mlp

COLUMNS = ["op", "shape", "B", "k", "dtype", "ours us", "torch us", "ratio", "torch eager us", "GB/s", "of copy", "target"]
CALLS = 10
"""At least so many in a graph, so that its own launch counts for little."""


def seconds(fn: Callable, inputs: list[tuple], graph: bool) -> float:
    """Median seconds of one call, the calls taking the inputs in turn."""
    several = inputs * -(-CALLS // len(inputs))
    run = lambda: [fn(*args) for args in several]  # noqa: E731
    if not torch.cuda.is_available():
        start = time.perf_counter()
        with NoHostReads("cpu") if graph else nullcontext():  # which a capture forbids
            run()
        return (time.perf_counter() - start) / len(several)
    run()
    if graph:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = run()  # noqa: F841  (its memory stays the graph's)
        run = captured.replay
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:]) / len(several)


def copy_rate(device: str) -> float:
    """GB/s, bytes read and bytes written, of a copy within the device's memory."""
    one, two = (torch.empty(2**20 if device == "cpu" else 2**30, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * one.numel() / seconds(lambda a, b: b.copy_(a), [(one, two)] * 4, graph=False) / 1e9


class Table:
    """Rows as they are measured; `compare` adds one."""

    def __init__(self, device: str, dry: bool):
        self.device, self.dry, self.rows, self.rate = device, dry, [], copy_rate(device)

    def inputs(self, make: Callable[[], tuple], size: int) -> list[tuple]:
        """So many different inputs that 200 MB lie between two uses of one."""
        return [make() for _ in range(1 if self.dry else max(2, min(64, 200_000_000 // max(size, 1) + 1)))]

    def compare(self, op: str, shape: str, ours: Callable, theirs: Callable, make, size: int, *, target: str = "", **more):
        """make() -> arguments of both functions; size: bytes that one call must read."""
        inputs = self.inputs(make, size)
        one, two, eager = (seconds(fn, inputs, graph) for fn, graph in ((ours, True), (theirs, True), (theirs, False)))
        self.rows.append(
            {
                "op": op,
                "shape": shape,
                **more,
                "ours us": one * 1e6,
                "torch us": two * 1e6,
                "ratio": two / one,
                "torch eager us": eager * 1e6,
                "GB/s": size / one / 1e9,
                "of copy": size / one / 1e9 / self.rate,
                "target": target,
            }
        )
        print(table(self.rows[-1:], COLUMNS).splitlines()[-1], flush=True)

    def random(self, *shape: int, dtype=torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def topk(t: Table) -> None:
    def theirs(logits):
        top = logits.float().log_softmax(-1).topk(10)
        return top.values, top.indices

    def theirs_40(logits):
        top = logits.float().log_softmax(-1).topk(40)
        return top.values, top.indices

    targets = {1: "<= 8 us, 10x", 8: "10x", 32: "10x", 256: "<= 40 us, 65% of copy, 5x"}
    for vocab in (1000,) if t.dry else (32000, 128256, 151936):
        for batch in (1, 3) if t.dry else (1, 8, 32, 64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                for k, torch_way in ((10, theirs), (40, theirs_40)):
                    want = targets.get(batch, "") if vocab == 151936 and dtype == torch.bfloat16 else ""
                    t.compare(
                        "topk_logprobs",
                        f"V={vocab}",
                        lambda x, k=k: topk_logprobs(x, k),
                        torch_way,
                        lambda v=vocab, b=batch, d=dtype: (t.random(b, v, dtype=d),),
                        batch * vocab * dtype.itemsize,
                        B=batch,
                        k=k,
                        dtype=name(dtype),
                        target=want,
                    )


def linear_heads(t: Table) -> None:
    def theirs(features, weight, user, reward_weight, logprobs, ids, finished):
        reward = torch.bmm(features, weight[user].unsqueeze(-1)).squeeze(-1).float()
        slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
        return ids.gather(-1, slot), slot, reward

    dim, users = (64, 5) if t.dry else (4096, 1000)
    for batch in (2,) if t.dry else (1, 8, 32, 256):
        for k in (10, 40, 64):

            def make(batch=batch, k=k):
                return (
                    t.random(batch, k, dim),
                    t.random(users, dim),
                    torch.randint(users, (batch,), device=t.device),
                    torch.ones(batch, device=t.device),
                    t.random(batch, k, dtype=torch.float32),
                    torch.randint(1000, (batch, k), device=t.device),
                    torch.zeros(batch, dtype=torch.bool, device=t.device),
                )

            size = batch * (k + 1) * dim * 2
            want = "75% of copy" if (batch, k) == (256, 40) else ""
            t.compare(
                "score_select", f"D={dim}", score_select, theirs, make, size, B=batch, k=k, dtype="bfloat16", target=want
            )


def sampled_rows(t: Table) -> None:
    """The choice of a step whose rows have stop tokens, temperature and noise of their own. A stop token earns the reward so
    far."""

    def ours(features, weight, user, reward_weight, logprobs, ids, finished, stop, so_far, temperature, uniform):
        more = dict(stop=stop, stop_reward=so_far, temperature=temperature, uniform=uniform)
        return score_select(features, weight, user, reward_weight, logprobs, ids, finished, **more)

    def theirs(features, weight, user, reward_weight, logprobs, ids, finished, stop, so_far, temperature, uniform):
        ends = (ids.unsqueeze(2) == stop.unsqueeze(1)).any(2)
        reward = torch.bmm(features, weight[user].unsqueeze(-1)).squeeze(-1).float()
        reward = torch.where(ends, so_far.unsqueeze(1), reward)
        score = (logprobs + reward_weight.unsqueeze(1) * reward) / temperature.unsqueeze(1)
        chance = score.softmax(-1).cumsum(-1)
        slot = torch.searchsorted(chance, uniform.unsqueeze(1)).clamp(max=ids.shape[1] - 1)
        return ids.gather(-1, slot).squeeze(1), slot.squeeze(1), reward, finished | ends.gather(-1, slot).squeeze(1)

    dim, stops = (64 if t.dry else 4096), 4
    for batch in (2,) if t.dry else (1, 8, 32):
        for k in (10, 40):

            def make(batch=batch, k=k):
                return (
                    t.random(batch, k, dim),
                    t.random(batch, dim),
                    torch.arange(batch, device=t.device),
                    torch.ones(batch, device=t.device),
                    t.random(batch, k, dtype=torch.float32),
                    torch.randint(1000, (batch, k), device=t.device),
                    torch.zeros(batch, dtype=torch.bool, device=t.device),
                    torch.randint(1000, (batch, stops), device=t.device),
                    torch.zeros(batch, device=t.device),
                    torch.full((batch,), 0.7, device=t.device),
                    torch.rand(batch, device=t.device),
                )

            size = batch * (k + 1) * dim * 2
            t.compare("score_select", f"D={dim}, sampled rows", ours, theirs, make, size, B=batch, k=k, dtype="bfloat16")


def mlp_heads(t: Table) -> None:
    theirs = lambda hidden, bank, user: torch.bmm(hidden, bank[user].transpose(1, 2)).float()  # noqa: E731
    dim, units = (64, 8) if t.dry else (4096, 64)
    for batch in (2,) if t.dry else (1, 32, 256):
        for k in (10, 40):
            make = lambda batch=batch, k=k: (  # noqa: E731
                t.random(batch, k, dim),
                t.random(batch, units, dim),
                torch.randperm(batch, device=t.device),
            )
            want = "60% of copy" if batch == 256 else ""
            size = batch * (k + units) * dim * 2
            shape = f"D={dim} H={units}"
            t.compare("user_mlp", shape, user_mlp, theirs, make, size, B=batch, k=k, dtype="bfloat16", target=want)


def mlp_rewards(t: Table) -> None:
    """The whole head of each user: both layers and the choice."""

    def ours(hidden, weight, user, reward_weight, logprobs, ids, finished, bias, bank):
        more = dict(bias=bias, activation="relu", bank=bank)
        return score_select(hidden, weight, user, reward_weight, logprobs, ids, finished, **more)

    def theirs(hidden, weight, user, reward_weight, logprobs, ids, finished, bias, bank):
        first = torch.relu(torch.bmm(hidden, bank[user].transpose(1, 2)) + bias[user].unsqueeze(1))
        reward = torch.bmm(first, weight[user].unsqueeze(-1)).squeeze(-1).float()
        slot = (logprobs + reward_weight[:, None] * reward).argmax(-1, keepdim=True)
        return ids.gather(-1, slot), slot, reward

    dim, units = (64, 8) if t.dry else (4096, 64)
    for batch in (2,) if t.dry else (1, 8, 32, 256):
        for k in (10, 40):
            make = lambda batch=batch, k=k: (  # noqa: E731
                t.random(batch, k, dim),
                t.random(batch, units),
                torch.randperm(batch, device=t.device),
                torch.ones(batch, device=t.device),
                t.random(batch, k, dtype=torch.float32),
                torch.randint(1000, (batch, k), device=t.device),
                torch.zeros(batch, dtype=torch.bool, device=t.device),
                t.random(batch, units),
                t.random(batch, units, dim),
            )
            size = batch * (k + units) * dim * 2
            shape = f"D={dim} H={units}, of users"
            t.compare("score_select", shape, ours, theirs, make, size, B=batch, k=k, dtype="bfloat16")


def tokenwise(t: Table) -> None:
    def theirs(policy, reward, weight, finished):
        top = policy.float().log_softmax(-1).topk(10)
        rewards = reward.float().log_softmax(-1).gather(1, top.indices)
        slot = (top.values + weight[:, None] * rewards).argmax(1, keepdim=True)
        return top.indices.gather(1, slot), slot, rewards

    vocab = 1000 if t.dry else 151936
    for batch in (2,) if t.dry else (1, 8, 32, 256):
        make = lambda batch=batch: (  # noqa: E731
            t.random(batch, vocab),
            t.random(batch, vocab),
            torch.ones(batch, device=t.device),
            torch.zeros(batch, dtype=torch.bool, device=t.device),
        )
        ours = lambda policy, reward, weight, finished: tokenwise_select(policy, reward, weight, finished, 10)  # noqa: E731
        size = 2 * batch * vocab * 2
        t.compare("tokenwise_select", f"V={vocab}", ours, theirs, make, size, B=batch, k=10, dtype="bfloat16")


def commits(t: Table) -> None:
    def theirs(states, slot, length):
        row = torch.arange(len(slot), device=slot.device)
        for tensor in states:
            tensor[row, :, length] = tensor[row, :, length + slot]

    layers, heads, dim = (2, 2, 8) if t.dry else (28, 4, 128)
    for batch in (2,) if t.dry else (1, 8, 32):
        make = lambda batch=batch: (  # noqa: E731
            [t.random(batch, heads, 300, dim) for _ in range(2 * layers)],
            torch.randint(1, 10, (batch,), device=t.device),
            torch.full((batch,), 200, device=t.device),
        )
        size = 2 * batch * layers * 2 * heads * dim * 2
        t.compare("commit", f"{layers} layers", commit, theirs, make, size, B=batch, k=10, dtype="bfloat16")


def attention(t: Table) -> None:
    """Against sdpa with a mask over all places, whose making is not counted, and without copies of the keys."""
    sizes = [(4, 2, 8)] if t.dry else [(14, 2, 64), (28, 4, 128)]  # of Qwen2.5 with 0.5B and 7B
    for heads, kept, dim in sizes:
        for batch in (2,) if t.dry else (1, 8, 32):
            for prefix, places in [(20, 32)] if t.dry else [(100, 256), (300, 512), (2000, 2048)]:
                for k in (1, 10):
                    given = dict(batch=batch, k=k, prefix=prefix, places=places, device=t.device)
                    make = lambda heads=heads, kept=kept, dim=dim, given=given: bench_branch_attention.inputs(  # noqa: E731
                        heads, kept, dim, **given
                    )
                    t.compare(
                        "branch_attention",
                        f"{heads}/{kept} heads of {dim}, {prefix} of {places}",
                        bench_branch_attention.ours,
                        bench_branch_attention.masked,
                        make,
                        2 * batch * kept * (prefix + k) * dim * 2,
                        B=batch,
                        k=k,
                        dtype="bfloat16",
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the numbers go into its gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, each once; on a CPU where there is no GPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.dry_run:
        parser.error("no GPU here: --dry-run tries the script on a CPU")
    torch.manual_seed(0)
    t, info = Table(device, options.dry_run), hardware()
    print(f"{hardware_line(info)}\ncopies at {t.rate:.0f} GB/s", flush=True)
    if options.dry_run:
        print("dry run: shapes too small for the numbers to mean anything", flush=True)
    for part in (topk, linear_heads, sampled_rows, mlp_heads, mlp_rewards, tokenwise, commits, attention):
        part(t)
        found = {"hardware": info, "copy_gb_s": round(t.rate, 1), "dry_run": options.dry_run, "rows": t.rows}
        add(options.out, "kernels", found, key=("op", "shape", "B", "k", "dtype"))
    print(table(t.rows, COLUMNS))


if __name__ == "__main__":
    main()
