"""The simulated people's signs."""

from __future__ import annotations

from rows import SHARED, needs_shared

from pyargs import data
from pyargs.data.sets import persona_statements


@needs_shared
def test_signs_of_the_simulated_people():
    signs = persona_statements.signs(SHARED / "persona_statements")
    assert len(signs) == 80 and all(len(of) == 10 and set(of.values()) <= {1, -1} for of in signs.values())
    dataset = data.load("persona_statements", SHARED / "persona_statements")
    assert set(dataset["user_id"]) == set(signs) and set(dataset["attribute"]) == set(next(iter(signs.values())))
