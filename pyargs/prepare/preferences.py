"""Any preference file (`pyargs.data.preferences`) as a built set; or its pairs labelled by simulated users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyargs.config import option
from pyargs.data import schema
from pyargs.data.preferences import read
from pyargs.errors import PyargsError
from pyargs.prepare.folder import Built
from pyargs.prepare.simulate import simulate

LICENCE = "that of the source"


@dataclass
class Config:
    train_test: float = option(0.2, "share of each train user's prompts to hold out, unless the source does (default)")
    by: str = option("prompt", "pair: hold out pairs instead, where a few prompts serve all", choices=["prompt", "pair"])
    simulated_users: int = option(0, "users with random tastes who label the source's train pairs (PReF: 1200)", least=0)
    simulated_new_users: int = option(0, "such users to adapt to, who label the pairs of support and query", least=0)
    labels_per_pair: int = option(50, "simulated users who label a pair; all of them where they are fewer (PReF)", least=1)
    simulated_pairs: int | None = option(None, "draw so many train pairs for them (PReF: 1809; default: all)", least=1)
    hybrid: bool = option(False, "keep the source's own users beside the simulated ones")
    seed: int = option(0, "of all draws")
    embedder: str = option("minilm", "sentence encoder of the cosine on the card; none leaves it out")


def build(source: str, config: Config) -> Built:
    """Any preference file as a built set; or its pairs labelled by simulated users, alone or beside its own (hybrid).

    Real users hardly ever judge the same pair, and methods that factor a matrix of users by pairs (PReF) need that: here
    `labels_per_pair` simulated users judge each pair (`prepare.simulate`). Simulated users are users of their own, named
    sim_... and new_sim_.... Raises PyargsError: bad rows, simulated new users for a source without support and query.
    """
    if source == "hub":
        raise PyargsError("preferences have no official place: give --source a file, or a built folder.")
    own = schema.checked(read(source), where=Path(source).name)
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    rows, counts, notes = own, {"rows of the source": len(own)}, []
    if config.simulated_users or config.simulated_new_users:
        made, more = simulate(
            own,
            users=config.simulated_users,
            new_users=config.simulated_new_users,
            labels_per_pair=config.labels_per_pair,
            max_pairs=config.simulated_pairs,
            seed=config.seed,
        )
        rows, counts = [*(own if config.hybrid else []), *made], counts | more
        notes.append(
            "Simulated users want a random mixture of measurable attributes (length, word length, first and second person, "
            "sentence length); their labels have no noise. PReF's own set was labelled by a language model with personas."
        )
    rows = schema.carve(rows, train_test=config.train_test, by=config.by, seed=config.seed)
    return Built(rows, counts, notes, files)
