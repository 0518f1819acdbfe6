"""`python -m experiments VERB ...`: each verb is a module of `experiments/commands`."""

from __future__ import annotations

import sys

from experiments import commands
from pyargs import cli


def main(argv: list[str] | None = None) -> int:
    return cli.main(argv, commands=commands, program="python -m experiments")


if __name__ == "__main__":
    sys.exit(main())
