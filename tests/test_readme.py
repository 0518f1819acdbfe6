"""The README is a promise: its Python runs, its tree is true."""

from __future__ import annotations

import re
from pathlib import Path

from pyargs.data import synthetic

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(tmp_path, capsys):
    """With a tiny random model in place of SmolLM2, and one pass over the pairs."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    lm = str(synthetic.tiny_lm(tmp_path / "lm"))
    code = code.replace('"smollm2-135m"', repr(lm)).replace(
        "freeze_backbone=True", f"freeze_backbone=True, epochs=1, backbone={lm!r}"
    )
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("What do people like about old trains?") == 2  # unguided, then guided


def test_the_tree_is_true():
    tree = README.split("## What is here")[1].split("```")[1]
    folder = None
    for line in tree.strip().splitlines():
        names = re.findall(r"[\w.]+/|[\w]+\.(?:py|cpp|h)\b", line.split("  ", 1)[0] if not line.startswith(" ") else line[:22])
        for name in names:
            base = ROOT if not line.startswith(" ") else folder
            assert (base / name).exists(), f"README names {name}, which {base} does not hold"
            if not line.startswith(" ") and name.endswith("/"):
                folder = ROOT / name


def test_every_command_of_the_readme_exists():
    from pyargs.cli import verbs

    blocks = "".join(README.split("```")[1::2])
    found = re.findall(r"^pyargs (\w+) ", blocks, re.M)
    assert {"env", "train", "adapt", "tune", "decode", "evaluate"} <= set(found) <= set(verbs())
