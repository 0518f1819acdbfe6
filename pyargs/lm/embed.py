"""Texts to unit vectors with a sentence encoder, each text once: vectors are kept in the user's cache by content.

The encoder is "minilm" (embedded), a local folder, or a name on the hub that sentence-transformers knows how to pool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pyargs import files
from pyargs.errors import PyargsError, extra, first_line, no_memory
from pyargs.files import short_hash
from pyargs.lm import hub
from pyargs.lm.inert import check_inert
from pyargs.progress import progress_bar
from pyargs.store import Store

MAX_TOKENS = 512  # longer texts are cut: encoders that accept 32k tokens would read them all
CHUNK = 256  # texts between two writes: what a killed run loses


def embed(name: str, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """Unit vectors float32 [len(texts), d] of a sentence encoder; the inner product of two is their cosine.

    Vectors are kept in `$PYARGS_CACHE/embeddings` and read from there the next time; a killed run goes on after the last
    chunk. Raises PyargsError: an encoder that cannot be loaded, a text that is not a str.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise PyargsError(f"text {number} to embed is {type(text).__name__}, not a str")
    if not len(texts):
        return np.zeros((0, 0), dtype=np.float32)
    # Another model under the same name has another identity, and so another file.
    identity = _identity(name, _stamp(name))
    file = f"{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(name).name)}-{identity}.sqlite"
    path = files.cache_dir() / "embeddings" / file
    if not path.exists():
        _encoder(name, identity)  # one that cannot be loaded leaves no file
    with Store(path) as store:
        found = store.get(texts)
        # Longest first: texts of one batch are about as long, and a batch that does not fit fails at once.
        missing = sorted(set(texts) - found.keys(), key=lambda text: (-len(text), text))
        if missing:
            found |= _compute(_encoder(name, identity), missing, store, progress)
    return np.stack([np.frombuffer(found[text], dtype=np.float32) for text in texts])


def _stamp(name: str) -> tuple:
    """Changes with the files of a local folder; an embedded model or a name on the hub has none."""
    if name in hub.MODELS or not Path(name).is_dir():
        return ()
    return tuple(sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in Path(name).rglob("*")))


@lru_cache(maxsize=8)
def _identity(name: str, stamp: tuple) -> str:
    return short_hash([hub.identity(name), MAX_TOKENS])


def _compute(encoder, texts: list[str], store: Store, progress: bool) -> dict[str, bytes]:
    found = {}
    # Small batches: on a CPU they are as fast as large ones, and less of them is padding.
    size = 8 if encoder.device.type == "cpu" else 64
    with progress_bar(total=len(texts), desc="embedding", unit="text", hide=not progress) as bar:
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            vectors = encoder.encode(part, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
            new = {text: vector.astype(np.float32).tobytes() for text, vector in zip(part, vectors, strict=True)}
            store.put(new)
            found |= new
            bar.update(len(part))
    return found


@lru_cache(maxsize=1)
def _encoder(name: str, identity: str):
    from huggingface_hub import snapshot_download

    with extra("evaluate", f"the sentence encoder '{name}'"):
        from sentence_transformers import SentenceTransformer

    path = hub.resolve(name)
    try:
        # The hub first, since sentence-transformers tries for a minute where there is no network.
        folder = path if isinstance(path, Path) else snapshot_download(path)
        check_inert(Path(folder))
        encoder = SentenceTransformer(str(folder), trust_remote_code=False)
    except PyargsError:
        raise
    except Exception as error:  # whatever is wrong with the folder's files
        if no_memory(error):
            raise
        raise PyargsError(
            f"cannot load the embedding model '{name}': {first_line(error).rstrip('.')}. Fix: name a local folder, "
            "check the network, or take 'minilm', which needs no hub."
        ) from error
    encoder.max_seq_length = min(encoder.max_seq_length or MAX_TOKENS, MAX_TOKENS)
    return encoder
