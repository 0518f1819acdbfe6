"""A captured step where there is no GPU: its operators run on fake tensors of device cuda, which have shapes but no numbers.

    python tests/fake_device.py        the operators of a layer and of a step

An operator that makes the host wait, or that works on the CPU, raises Forbidden where it is called. The others are counted.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_lm
from decoding import USERS, prompts
from every_head import HEADS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyargs.decode import backends
from pyargs.decode.backends import cuda_graph
from pyargs.decode.pair import Pair
from pyargs.decode.request import Request
from pyargs.lm import lora, structure
from pyargs.models.reward_model import RewardModel
from pyargs.models.token_reward import TokenReward

WEIGHTS = ("own", "shared", "shared lora")
WAYS = {
    "greedy": dict(),
    "sampled": dict(temperature=0.7),
    "filtered": dict(top_p=0.9, min_p=0.1),
    "sampled, filtered": dict(temperature=0.7, top_p=0.9, min_p=0.1),
}
GPU = "cuda:0"
"""With its number: a driver would be asked for it."""
ONE = ("rms_norm", "scaled_dot_product_attention")
"""One operator each on a GPU, which this build of torch may only know in parts."""


class Forbidden(AssertionError):
    """What a captured step must not do."""


class Operators(TorchDispatchMode):
    """Within it operators are checked, and counted by name: views are none."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.within = ""  # the one of ONE whose parts run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        given = tensors((args, kwargs))
        if read_by_host(function, name, given):
            raise Forbidden(f"read by the host: {name} of {given}")
        check(name, "from", given)
        result = function(*args, **(kwargs or {}))
        made = tensors(result)
        check(name, "to", made)
        if (given or made) and not function.is_view and name not in ("_unsafe_view", "prim::device") and not self.within:
            self.count[name] += 1
        return result


class Whole(TorchFunctionMode):
    """Counts each of ONE as one operator."""

    def __init__(self, operators: Operators):
        super().__init__()
        self.operators = operators

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ONE and not self.operators.within:
            self.operators.count[name] += 1
            self.operators.within = name
            try:
                return function(*args, **(kwargs or {}))
            finally:
                self.operators.within = ""
        return function(*args, **(kwargs or {}))


class Blind(TorchDispatchMode):
    """Outside of steps the host reads "yes" and 0, of tensors that have no numbers: models are probed, and prompts come in."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags:
            return function is torch.ops.aten.equal.default or args[0].dtype == torch.bool
        return function(*args, **(kwargs or {}))


def tensors(values) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def check(name: str, how: str, several: list[Tensor]) -> None:
    if strange := [tensor for tensor in several if tensor.device != torch.device(GPU)]:
        raise Forbidden(f"{how} the CPU: {name} with {strange}")


def read_by_host(function, name: str, given: list[Tensor]) -> bool:
    """Whether the host needs the tensors' numbers: as the result, or to know its shape."""
    if name in ("index", "index_put", "index_put_"):  # by whole numbers, the shape is known
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(function.tags)


@contextmanager
def no_guard_of_cuda() -> Iterator[None]:
    """The "device guard", which tells the driver where kernels run, is one that does nothing. torch does so itself where it is
    built for CUDA and there is no GPU. A build for the CPU has no guard, so that indexing a fake tensor would fail."""
    folder = Path(torch.__file__).parent / "lib"
    c10, cpu = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    cuda, meta = cpu.aoti_torch_device_type_cuda(), cpu.aoti_torch_device_type_meta()
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[cuda]
    if before is None:
        guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def fake_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Within it tensors are fake, and to capture a step is to check and count it: its replay returns the Operators."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(cuda_graph, "capture", checked)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)  # models are made where they belong
        # Weights without numbers are the same where they share their memory; fake tensors are no stranger's class or mode.
        patch.setattr(lora, "_equal", torch._C._is_alias_of)
        patch.setattr(cuda_graph, "contents", list)
        patch.setattr(structure, "TENSORS", {*structure.TENSORS, FakeTensor})
        patch.setattr(structure, "_check_surroundings", lambda: None)
        for mode in (no_guard_of_cuda(), FakeTensorMode(), Blind(), torch.no_grad()):
            stack.enter_context(mode)
        yield patch


def checked(step: Callable[[], None], device: torch.device) -> Callable[[], Operators]:
    """In the place of `cuda_graph.capture`."""
    operators = Operators()
    with operators, Whole(operators):
        step()
    return lambda: operators


def fake_lm(family: str, layers: int):
    """In bfloat16, with shapes of tests/conftest.py."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(GPU):
            return tiny_lm(family, layers=layers)
    finally:
        torch.set_default_dtype(before)


def on_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """The module, its tensors moved; torch's own `to` fails for fake ones."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                moved = None if tensor is None else tensor.to(GPU)
                held[name] = torch.nn.Parameter(moved) if held is part._parameters and moved is not None else moved
    return module


def steps_of(weights="own", way="greedy", head="linear", *, layers=2, family="qwen2", eos_reward="before", wish=None, **more):
    """The steps of three rows of an engine, where four have room; prompts have come in. wish: what else they ask for."""
    policy = fake_lm(family, layers)
    backbone = (fake_lm(family, layers) if weights == "own" else policy).get_decoder()
    if weights == "shared lora":
        backbone = copy.deepcopy(backbone, {id(one): one for one in [*backbone.parameters(), *backbone.buffers()]})
        with torch.device(GPU):
            lora.add(backbone, rank=2, alpha=4, rslora=False, target_modules=["q_proj", "v_proj"])
    model = RewardModel(backbone, None, on_gpu(HEADS[head]()), **more).eval()
    pair = Pair(policy, model, None, vocabulary=60, best_of=0)
    steps = backends.steps(backends.Backend("cuda-graph", ""), pair, 4, eos_reward)
    wish = dict(reward_weight=1.0, num_candidates=5, max_new_tokens=4, stop=(1, 2)) | WAYS[way] | (wish or {})
    steps.join([Request(tuple(ids), user, **wish) for ids, user in zip(prompts([4, 6, 3]), USERS, strict=True)], 30)
    return steps


TOKENWISE = {"k = 5": dict(num_candidates=5), "all": dict(num_candidates=None), "both": dict(num_candidates=5)}
"""Candidates of rows that a TokenReward guides; of both kinds in one batch."""


def tokenwise(way="greedy", candidates="k = 5", *, layers=2) -> cuda_graph.Captured:
    """As `steps_of`, guided by a TokenReward."""
    pair = Pair(fake_lm("qwen2", layers), TokenReward(fake_lm("qwen2", layers), None), None, vocabulary=60, best_of=0)
    steps = backends.steps(backends.Backend("cuda-graph", ""), pair, 4, "before")
    wish = dict(reward_weight=1.0, max_new_tokens=4, stop=(1, 2)) | TOKENWISE[candidates] | WAYS[way]
    requests = [Request(tuple(ids), "", **wish) for ids in prompts([4, 6, 3])]
    if candidates == "both":
        requests[1] = replace(requests[1], num_candidates=None)
    steps.join(requests, 30)
    return steps


def beside_tokenwise(way="greedy", candidates="k = 5") -> int:
    """Operators of a step that are in no layer, guided by a TokenReward."""
    two, three = (operators(tokenwise(way, candidates, layers=layers)) for layers in (2, 3))
    return two - 2 * (three - two)


def operators(steps) -> int:
    """Of a step, recorded as on a GPU."""
    return steps._record(4).replay().count.total()


@functools.cache
def counted(weights: str, way="greedy", head="linear", layers=2) -> int:
    return operators(steps_of(weights, way, head, layers=layers))


def of_layer(weights: str) -> int:
    """Operators of one layer, of policy and reward model together."""
    return counted(weights, layers=3) - counted(weights)


def beside_layers(weights: str, way="greedy", head="linear") -> int:
    """Operators of a step that are in no layer."""
    return counted(weights, way, head) - 2 * of_layer(weights)


def main() -> None:
    """Prints docs/performance.md's tables."""
    with fake_gpu():
        print(f"| weights | in a layer | {' | '.join(WAYS)} |\n{'|---' * (len(WAYS) + 2)}|")
        for weights in WEIGHTS:
            print(
                "|",
                weights,
                *(f"| {count}" for count in (of_layer(weights), *(beside_layers(weights, way) for way in WAYS))),
                "|",
            )
        print(f"\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
        print(*(f"| {beside_layers('shared', head=head)}" for head in HEADS), "|")
        print(f"\n| candidates of a TokenReward | {' | '.join(WAYS)} |\n{'|---' * (len(WAYS) + 1)}|")
        for candidates in TOKENWISE:
            print("|", candidates, *(f"| {beside_tokenwise(way, candidates)}" for way in WAYS), "|")


if __name__ == "__main__":
    main()
