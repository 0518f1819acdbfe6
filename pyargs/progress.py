"""Progress bars: where somebody looks at them. In a file every step of a bar would be a line of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def watched() -> bool:
    """Whether standard error is a terminal, or a notebook's."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def progress_bar(iterable: Iterable | None = None, *, hide: bool = False, **more):
    """A bar of tqdm on standard error, which takes `more`; silent where it is hidden or nobody watches."""
    from tqdm.auto import tqdm

    return tqdm(iterable, **more, **({"disable": True} if hide or not watched() else {}))


def quiet_others() -> None:
    """For a program that has not imported tqdm yet: the bars of transformers, datasets and others follow the same rule."""
    if not watched():
        os.environ.setdefault("TQDM_DISABLE", "1")
