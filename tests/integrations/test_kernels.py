"""The ops in the layout of the `kernels` library, as its `get_local_kernel` loads them, beside those of pyargs itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import take_capability

from pyargs import ops

ROOT = Path(__file__).parents[2]
kernels = pytest.importorskip("kernels", reason="needs `pip install kernels`")
if not (ROOT / "setup.py").is_file() or not shutil.which("cmake") or not shutil.which("ninja"):
    pytest.skip("needs a source tree, cmake and ninja", allow_module_level=True)


def step(ops, name: str) -> list[torch.Tensor]:
    """What an op of `ops` makes of its inputs; of those that write, what it wrote."""
    torch.manual_seed(0)
    logits, rewards = torch.randn(3, 9000), torch.randn(3, 9000)
    hidden, bank, user = torch.randn(3, 5, 33), torch.randn(4, 6, 33), torch.tensor([3, 0, 9])
    weight, finished = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([False, False, True])
    ids = torch.randint(0, 9000, (3, 5))
    logprobs = torch.randn(3, 5)
    if name == "topk_logprobs":
        return list(ops.topk_logprobs(logits, 5))
    if name == "user_mlp":
        return [ops.user_mlp(hidden, bank, user)]
    if name == "score_select":
        directions = torch.randn(4, 33)
        return list(ops.score_select(hidden, directions, user, weight, logprobs, ids, finished, stop=ids[0, :1]))
    if name == "tokenwise_select":
        return list(ops.tokenwise_select(logits, rewards, weight, finished, 5))
    assert name == "commit"
    states = [torch.randn(3, 2, 8, 4) for _ in range(2)]
    ops.commit(states, torch.tensor([2, 0, -1]), torch.tensor([3, 4, 5]))
    return states


def test_ops_loaded_as_a_kernel_give_what_the_installed_ones_give(tmp_path, request):
    take_capability(request, "default")
    words = ["setup.py", "-q", "kernels", "--out", str(tmp_path), "--best-capability", "default"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kernel = kernels.get_local_kernel(tmp_path, backend="cpu")
    (variant,) = (tmp_path / "build").iterdir()
    name = json.loads((variant / "metadata.json").read_text())["id"]
    assert kernel.__name__ == name and set(kernel.__all__) == set(ops.__all__) and kernel.native == ops.native
    for op in ("topk_logprobs", "user_mlp", "score_select", "tokenwise_select", "commit"):
        for one, other in zip(step(kernel, op), step(ops, op), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert getattr(torch.ops, name) is not torch.ops.pyargs and hasattr(getattr(torch.ops, name), op)
    with pytest.raises(ValueError, match="k must be"):
        kernel.topk_logprobs(torch.randn(2, 9), 65)
    compiled = torch.compile(lambda logits: kernel.topk_logprobs(logits, 3)[1], backend="eager", fullgraph=True)
    logits = torch.randn(2, 9)
    assert torch.equal(compiled(logits), logits.topk(3).indices)
    sources = [file.read_text() for file in variant.glob("*.py")]
    assert not any("from pyargs" in text or "import pyargs" in text for text in sources), "it stands by itself"
