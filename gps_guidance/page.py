"""The frame of the HTML pages that commands write for people. No torch."""

from __future__ import annotations

import base64
import html

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #222 }
h1 { font-weight: 600 } table { border-collapse: collapse } td, th { padding: 2px 6px }
"""


def image_uri(kind: str, data: bytes) -> str:
    """A picture's file (``kind`` is png or jpeg) as an address within the page."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def html_page(title: str, body: str, style: str) -> str:
    """A whole page: ``title`` is plain text, ``body`` is HTML, ``style`` is CSS of its own."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
{STYLE}{style}</style></head><body>
{body}
</body></html>
"""
