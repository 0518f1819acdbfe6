"""Tiny random models, built in the test process: no download, no files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

with contextlib.suppress(ImportError):  # before anything imports the standard distutils, which setuptools replaces
    import setuptools  # noqa: F401

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """What fixtures of a module compute is kept here: they are made before a test's own cache is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYARGS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("PYARGS_CACHE", str(tmp_path / "cache"))


FULL_ATTENTION = ("llama", "qwen2", "gpt2", "phi")
OTHER_LAYERS = ("mistral", "mamba")


def tiny_lm(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype=torch.float64,
    vocab: int = 61,
    attention: str = "sdpa",
    layers: int = 2,
):
    """A random causal language model. float64 makes rounding so small that decoders must agree on every token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": dict(n_embd=32, n_head=4, n_layer=layers, n_positions=128),
        "mamba": dict(hidden_size=32, num_hidden_layers=layers, state_size=4),
    }.get(
        family,
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
    )
    if family == "mistral":
        sizes["sliding_window"] = 4
    config = AutoConfig.for_model(family, vocab_size=vocab, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    torch.manual_seed(seed)
    keywords = {} if family == "mamba" else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, **keywords).to(dtype).eval()
    for parameter in model.parameters():  # the usual tiny start values make every token nearly equally likely
        if parameter.ndim > 1 and family != "mamba":
            parameter.data.normal_(std=0.2)
    return model


def reward_model(
    lm,
    *,
    head: str = "linear",
    users=("ann", "bob", "cid"),
    pool: str = "last",
    step_reward: str = "token",
    seed: int = 0,
):
    """A random reward model over a copy of the decoder of `lm`, without tokenizer."""
    import copy

    from pyargs.heads import linear, mlp
    from pyargs.models.reward_model import RewardModel
    from pyargs.types import Users

    torch.manual_seed(seed + 1)
    dim = lm.config.hidden_size
    if head == "linear":
        head = linear.Head(dim, 3, Users(users, mixture=torch.randn(len(users), 3) * 3), softmax=True, divisor=1.0)
    elif head == "mlp":
        head = mlp.Head(dim, 8, Users())
    else:
        head = mlp.Head(dim, 8, Users(users, bias=torch.randn(len(users), 8)), activation="gelu", second=6)
    return RewardModel(copy.deepcopy(lm.get_decoder()), None, head, pool=pool, step_reward=step_reward).eval()


CAPABILITIES = ("default", "avx2", "avx512")  # those of the ops


def take_capability(request, name: str) -> None:
    """Takes a code path of the ops for as long as the requesting test runs; skips it where this CPU lacks the path."""
    _C = pytest.importorskip("pyargs._C")
    before = _C.cpu_capability()
    try:
        _C.set_cpu_capability(name)
    except ValueError as error:
        pytest.skip(str(error))
    request.addfinalizer(lambda: _C.set_cpu_capability(before))


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Runs a test on each code path that this CPU has."""
    take_capability(request, request.param)
    return request.param


@pytest.fixture
def with_threads():
    """Calls a function with a number of threads."""
    before = torch.get_num_threads()

    def call(threads: int, function):
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call


@pytest.fixture
def encoder(tmp_path) -> str:
    """A sentence encoder of random weights: similar words, similar vectors."""
    from pyargs.data import synthetic

    return str(synthetic.tiny_lm(tmp_path / "encoder"))


@pytest.fixture
def server(tmp_path):
    """A web server over a folder; `server.cut` breaks the next answer off after so many bytes; `server.ranges` = False."""
    import http.server
    import threading

    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            content, asked = path.read_bytes(), self.headers.get("Range")
            start = int(asked[len("bytes=") :].rstrip("-")) if asked and web.ranges else 0
            web.asked.append(asked)
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: web.cut])
            web.cut = None

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.cut, web.ranges, web.asked, web.folder = None, True, [], folder
    web.address = f"http://127.0.0.1:{web.server_address[1]}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    from pyargs.data import synthetic

    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("models") / "lm"))


@pytest.fixture(scope="module")
def rows():
    from pyargs.data import synthetic

    return synthetic.load(users=4, pairs=24, new_users=3, support=8, query=8)


@pytest.fixture(scope="module")
def pairs():
    from pyargs.data import synthetic

    return synthetic.load(seed=0)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """The folder that the documents' examples run in, within seconds.

    Names of embedded models mean a tiny random one. The set `demo` and the file `pairs.jsonl` have three pairs of each split,
    of three trained users and two new ones.
    """
    from pyargs import data
    from pyargs.data import demo, synthetic
    from pyargs.lm import hub

    lm = synthetic.tiny_lm(tmp_path / "cache" / "tiny", layers=1, width=32, heads=2)
    monkeypatch.setattr(hub, "fetch", lambda name, **_: lm)
    few = demo.load(max_pairs=3).filter(lambda row: row["user_id"] in ("ada", "ben", "cora", "mia", "noah"))
    monkeypatch.setattr(demo, "load", lambda: few)
    folder = tmp_path / "here"
    folder.mkdir()
    data.load("demo").to_json(folder / "pairs.jsonl")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trap(tmp_path):
    """Python that leaves a mark when it is run, and whether it was."""
    mark = tmp_path / "mark"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    return code, mark


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> str:
    """The folder of a language model of one layer."""
    from pyargs.data import synthetic

    return str(synthetic.tiny_lm(tmp_path_factory.mktemp("damaged") / "lm", layers=1, width=32, heads=2))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The whole path on a tiny random model, through the commands."""
    from pyargs.data import synthetic

    folder = tmp_path_factory.mktemp("stages")
    os.environ["PYARGS_CACHE"] = str(folder / "cache")
    lm = str(synthetic.tiny_lm(folder / "lm"))
    data = ["--data", "synthetic"]
    both = ["--policy", lm, *data]
    steps = {
        "train": ["lore", *data, "--backbone", lm, "--freeze-backbone", "--rank", "4", "--out", folder / "seen"],
        "adapt": [folder / "seen", *data, "--out", folder / "model"],
        "tune": [folder / "model", *both, "--prompts", "4", "--max-new-tokens", "6", "--out", folder / "tune.json"],
        "decode": [folder / "model", *both, "--tuned", folder / "tune.json", "--limit", "5", "--max-new-tokens", "6",
                   "--out", folder / "answers.jsonl"],
        "zero": [folder / "model", *both, "--reward-weight", "0", "--limit", "5", "--max-new-tokens", "6",
                 "--out", folder / "zero.jsonl"],
        "evaluate": [folder / "model", *both, "--tuned", folder / "tune.json", "--generations", folder / "answers.jsonl",
                     "--bertscore", lm, "--zero-shot", folder / "zero.jsonl", "--out", folder / "result.json"],
    }  # fmt: skip
    return folder, {verb: ["decode" if verb == "zero" else verb, *map(str, words)] for verb, words in steps.items()}
