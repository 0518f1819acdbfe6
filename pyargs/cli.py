"""`pyargs VERB ...`: each verb is a module of `pyargs/commands`, found by its name and imported only when asked for.

The same front serves any other package of verbs: `main(commands=PACKAGE, program=NAME)`.

JSON goes to stdout, progress to stderr. Exit code 1: an error that names its fix. Exit code 2: wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from pyargs import commands as own_commands
from pyargs.errors import PyargsError, did_you_mean, refusal
from pyargs.progress import quiet_others


def verbs(commands: ModuleType = own_commands) -> dict[str, str]:
    """Every verb of a package with the first line of its module's docstring, read without importing the module."""
    found = {}
    for module in pkgutil.iter_modules(commands.__path__):
        source = Path(commands.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
        found[module.name] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return found


def parse(
    verb: str, argv: list[str], *, commands: ModuleType = own_commands, program: str = "pyargs"
) -> tuple[Callable[[argparse.Namespace], dict | None], argparse.Namespace]:
    """The function of a verb, and the arguments behind it, parsed."""
    module = importlib.import_module(f"{commands.__name__}.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"{program} {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser, argv)  # argv, since the flags of `train` depend on the method
    return module.run, parser.parse_args(argv)


def main(argv: list[str] | None = None, *, commands: ModuleType = own_commands, program: str = "pyargs") -> int:
    """Runs one verb of a package of them; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # bytes that Python could not decode
            encoding = sys.getfilesystemencoding()
            print(
                f"{program}: {word!a} cannot be read as {encoding}, this locale's encoding. Fix: set PYTHONUTF8=1",
                file=sys.stderr,
            )
            return 1
    quiet_others()
    known = verbs(commands)
    width = max(map(len, known))
    parser = argparse.ArgumentParser(
        prog=program,
        description=(commands.__doc__ or "").strip(),
        epilog="verbs:\n" + "\n".join(f"  {verb:<{width}}  {line}" for verb, line in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("verb", nargs="?", help="what to do; `%(prog)s VERB --help` explains one")
    own = parser.parse_args(argv[:1])
    if own.version:
        from pyargs import __version__

        print(__version__)
        return 0
    if own.verb is None:
        parser.print_help()
        return 2
    if own.verb not in known:
        parser.error(f"unknown verb '{own.verb}'.{did_you_mean(own.verb, known)}")

    try:
        run, args = parse(own.verb, argv[1:], commands=commands, program=program)
        result = run(args)
    except PyargsError as error:
        print(f"{program} {own.verb}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if (why := refusal(error)) is None:
            raise
        print(f"{program} {own.verb}: {why}", file=sys.stderr)
        return 1
    if result is not None:
        try:
            print(json.dumps(result, indent=1), flush=True)
        except BrokenPipeError:  # `pyargs ... | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
