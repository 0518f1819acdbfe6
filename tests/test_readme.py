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
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    prompt, decoded = names["inputs"]["input_ids"][0], names["tokenizer"].decode
    answer = decoded(
        names["policy"].generate(**names["inputs"], max_new_tokens=40)[0][len(prompt) :], skip_special_tokens=True
    )
    printed = capsys.readouterr().out
    assert answer and printed.startswith(f"{answer}\n") and len(printed) > len(answer) + 2  # unguided, then guided
    assert "What do people like about old trains?" not in printed
    # The engine of the docs, with the same models.
    (code,) = re.findall(r"```python\n(engine = .*?)```", (ROOT / "docs/decoding.md").read_text(encoding="utf-8"), re.S)
    exec(compile(code, "docs/decoding.md", "exec"), names)
    assert capsys.readouterr().out.endswith(" cancelled\n")


def test_the_tree_is_true():
    tree = README.split("## What is here")[1].split("```")[1]
    folders = {0: ROOT}  # by indentation
    for line in tree.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        if indent not in folders:
            continue  # more about what stands above
        for name in re.findall(r"[\w./]+/|[\w]+\.(?:py|cpp|h)\b", line.strip().split("  ", 1)[0]):
            place = folders[indent] / name
            assert place.exists(), f"README names {name}, which {folders[indent]} does not hold"
            if name.endswith("/"):
                folders = {n: folder for n, folder in folders.items() if n <= indent} | {indent + 2: place}


def test_the_tree_names_every_file_of_lm():
    tree = README.split("## What is here")[1].split("```")[1]
    block = re.search(r"^  lm/ +(what runs a language model.*?)^  \w+/", tree, re.M | re.S)[1]
    for file in (ROOT / "pyargs/lm").glob("[!_]*.py"):
        assert re.search(rf"\b{file.stem}\b", block), f"README does not name pyargs/lm/{file.name}"


def test_every_command_of_the_readme_exists():
    from pyargs.cli import verbs

    blocks = "".join(README.split("```")[1::2])
    found = re.findall(r"^pyargs (\w+) ", blocks, re.M)
    assert {"env", "train", "adapt", "tune", "decode", "evaluate"} <= set(found) <= set(verbs())
