"""Which cells a profile has to have: told by experiments/profiles.py of the source tree that pyargs is installed from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from experiments import results
from pyargs.errors import PyargsError

# The project's own: what stands beside other results is not executed.
PROFILES = Path(__file__).resolve().parent.parent.parent / "experiments/profiles.py"


def cells(profile: str) -> list[dict] | None:
    """{profile, set, policy, row, seed, stands_for} of every cell of a profile; None without a source tree to tell.

    Raises PyargsError if the source tree's file is broken.
    """
    return _told(PROFILES, profile) if PROFILES.is_file() else None


@cache
def _told(path: Path, profile: str) -> list[dict]:
    # In a process of its own: the scripts' modules have names that anything may have.
    asked = (
        f"import json, profiles; print(json.dumps([{{**c._asdict(), 'stands_for': c.settings()['stands_for']}} "
        f"for c in profiles.cells({profile!r})]))"
    )
    told = subprocess.run([sys.executable, "-c", asked], cwd=path.parent, capture_output=True, text=True)
    if told.returncode:
        raise PyargsError(f"{path} does not tell the profile's cells: {told.stderr.strip().splitlines()[-1:]}; mend it")
    return json.loads(told.stdout.splitlines()[-1])


def absent(profile: str, there: Iterable[dict]) -> list[dict] | None:
    """The cells that a profile has to have and that are not there; None without a source tree to tell."""
    told, found = cells(profile), {results.name(cell) for cell in there}
    return None if told is None else [one for one in told if results.name(one) not in found]


def seeds(missing: Iterable[dict]) -> dict[str, list[int]]:
    """Absent cells by row: the seeds that lack with some policy."""
    found: dict[str, set[int]] = {}
    for one in missing:
        found.setdefault(one["row"], set()).add(one["seed"])
    return {row: sorted(numbers) for row, numbers in found.items()}
