"""The page at `/`: it asks this service alone, and no text of a model or a user can turn into code in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from pyargs.errors import extra

with extra("serve", "the service"):
    from fastapi import APIRouter, Response


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


STYLE, SCRIPT = _part("page.css"), _part("page.js")
HTML = (
    _part("page.html")
    .replace('<link rel="stylesheet" href="page.css">', f"<style>{STYLE}</style>")
    .replace('<script src="page.js"></script>', f"<script>{SCRIPT}</script>")
)
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.get("/")
def page() -> Response:
    return Response(HTML, media_type="text/html; charset=utf-8", headers=HEADERS)
