"""The C++ package, installed and found by programs that have neither Python nor torch: examples/cxx, and one with threads.

`make sanitize` and `make sanitize-threads` build all of it with CXXFLAGS of their own.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import reward_model, take_capability, tiny_lm
from decoding import prompts

import pyargs
from pyargs.heads import linear
from pyargs.types import Users

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cxx"
if not (EXAMPLE / "guided.cpp").is_file() or not shutil.which("cmake") or not shutil.which("ninja"):
    pytest.skip("needs a source tree, cmake and ninja", allow_module_level=True)


def run(*words, **how) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=900, **how)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def compiled(folder: Path, best: str) -> Path:
    """Where the example and `threads` are, built against an installed package: their sources see nothing of the tree."""
    prefix, source = folder / "prefix", shutil.copytree(EXAMPLE, folder / "source")
    shutil.copy(Path(__file__).parent / "cxx" / "threads.cpp", source)
    with open(source / "CMakeLists.txt", "a") as lists:
        lists.write("add_executable(threads threads.cpp)\ntarget_link_libraries(threads PRIVATE pyargs::pyargs)\n")
    run("cmake", "-S", ROOT, "-B", folder / "pyargs", "-GNinja", f"-DPYARGS_BEST_CAPABILITY={best}")
    run("cmake", "--build", folder / "pyargs")
    run("cmake", "--install", folder / "pyargs", "--prefix", prefix)
    shutil.rmtree(folder / "pyargs")
    run("cmake", "-S", source, "-B", folder / "guided", "-GNinja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", folder / "guided")
    return folder / "guided"


def check_tokens(program: Path, folder: Path, lm, tokenizer, model, rows, weight: float, k: int, monkeypatch) -> None:
    """The program prints what the engine chooses: 20 tokens, or those before a stop token."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import export

    export.export_lm(lm, tokenizer, folder / "lm.safetensors", places=max(map(len, rows)) + 20 + k)
    users = export.export_users(model, folder / "users.safetensors")
    answers = pyargs.Engine(lm, model, tokenizer=tokenizer, backend="cpu").generate(
        rows, users[: len(rows)], reward_weight=weight, num_candidates=k, max_new_tokens=20
    )
    from pyargs._C import cpu_capability

    bare = {"PYARGS_CPU_CAPABILITY": cpu_capability()}
    files = folder / "lm.safetensors", folder / "users.safetensors"
    for user, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        assert run(program, *files, user, weight, k, 20, *row, env=bare).split() == [str(token) for token in answer.tokens]
    slots = [slot > 0 for answer in answers for slot in answer.slots]
    assert any(slots) and not all(slots), "the reward decides, and not alone"
    refused = subprocess.run([program, *files, "99", "1", "5", "20", "3"], capture_output=True, text=True)
    assert refused.returncode == 1 and "no such user" in refused.stderr


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("best"), "")


def check_threads(program: Path, paths: int) -> None:
    """Whoever else calls, and on however many threads: each caller is told the same bits, on all code paths."""
    assert run(program).count(": passed") >= paths


def test_programs_without_python_write_the_engine_s_tokens_and_share_threads(tmp_path, monkeypatch, request):
    take_capability(request, "default")
    folder = compiled(tmp_path, "default")
    check_threads(folder / "threads", paths=1)
    program = folder / "guided"
    linked = run("ldd", program)
    assert "libstdc++" in linked and not any(name in linked for name in ("torch", "python", "c10"))
    lm = tiny_lm(dtype=torch.float32)
    check_tokens(program, tmp_path, lm, None, reward_model(lm), prompts([7, 1, 12]), 2.0, 5, monkeypatch)


@pytest.mark.nightly
def test_threads_are_shared_on_every_code_path(best):
    check_threads(best / "threads", paths=2)


@pytest.mark.nightly
def test_twenty_guided_tokens_of_smollm2(tmp_path, monkeypatch, best):
    """All code paths are built, and the machine's best is used."""
    found = Path.home() / ".cache" / "pyargs" / "models" / "smollm2-135m"
    if not (found / "model.safetensors").is_file():
        pytest.skip(f"no SmolLM2 at {found}: pyargs demo fetches it")
    lm, tokenizer = pyargs.load_lm(str(found), device="cpu")
    torch.manual_seed(0)
    dim, users = lm.config.hidden_size, ["ann", "bob"]
    head = linear.Head(dim, 8, Users(users, mixture=torch.randn(2, 8) * 2), softmax=True, divisor=dim**0.5)
    pyargs.RewardModel(lm.get_decoder(), tokenizer, head).eval().save_pretrained(tmp_path / "model")
    model = pyargs.RewardModel.from_pretrained(tmp_path / "model", backbone=lm.get_decoder(), tokenizer=tokenizer)
    texts = ["The first thing to know about winter is that it", "My favourite book is"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    check_tokens(best / "guided", tmp_path, lm, tokenizer, model, rows, 1.8, 10, monkeypatch)
