"""Of the site: a link to a test, `../tests/...` in the repository, leads to a copy of it beside the pages."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\.\./(tests/[\w/]+\.py)")


def on_files(files, config):
    linked = {name for page in files.documentation_pages() for name in LINK.findall(page.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    return LINK.sub(r"\1", markdown)
