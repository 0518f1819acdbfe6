"""The policy's own answers to many prompts, kept in the cache so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence

from pyargs import files
from pyargs.decode.engine import Engine
from pyargs.files import short_hash
from pyargs.lm import hub
from pyargs.lm.loading import load_lm
from pyargs.models.user_policy import UserPolicy
from pyargs.progress import progress_bar
from pyargs.store import Store


def greedy_answers(
    policy: str,
    prompts: Sequence[str],
    *,
    dtype: str = "float32",
    max_new_tokens: int = 64,
    max_tokens: int = 512,
    batch_size: int = 8,
) -> list[str]:
    """The policy's own greedy answer to each prompt, kept in `$PYARGS_CACHE/answers`: a killed run continues.

    policy: embedded name, local folder or hub name; max_tokens: longest prompt, cut as `encode_prompt` does. Each backend and
    kind of device has its own answers, since it rounds in its own way.
    """
    model = UserPolicy(*load_lm(policy, dtype=dtype), about={"max_length": max_tokens})
    engine = Engine(None, model, max_rows=batch_size)
    settings = {"policy": hub.identity(policy), "dtype": dtype, "max_new_tokens": max_new_tokens, "max_tokens": max_tokens}
    settings |= {"backend": engine.backend, "device": model.device.type}
    with Store(files.cache_dir() / "answers" / f"{short_hash(settings)}.sqlite") as store:
        found = store.get(prompts)
        missing = sorted(set(prompts) - found.keys())
        asked = {engine.submit(prompt, max_new_tokens=max_new_tokens): prompt for prompt in missing}
        with progress_bar(total=len(missing), desc="answers", unit="prompt") as bar:
            while engine.busy:
                ended = [event.number for event in engine.step() if event.answer is not None or event.error is not None]
                new = {asked[number]: engine.answer(number).text.encode() for number in ended}
                store.put(new)
                found |= new
                bar.update(len(new))
    return [found[prompt].decode() for prompt in prompts]
