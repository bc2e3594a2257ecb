"""Frame of a report's page: one HTML file that makes no request, whatever a recipe, a data set or a model wrote.

`escape` escapes all such text. The content security policy allows inline styles, and the page's script by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.eval.report.formatting import plain

STYLE_SHEET = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The browser loads nothing and sends nothing."""


def escape(value: Any) -> str:
    """The value as text of an element or attribute."""
    return html.escape(plain(value), quote=True)


def breakable(name: str) -> str:
    """The name as text that may wrap after an underscore or a slash."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def policy_of(script: str, policy: str = POLICY) -> str:
    """The policy of a page with a script, which allows this script only."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"{policy}; script-src 'sha256-{digest}'" if script else policy


def page(title: str, body: Iterable[str], *, script: str = "", style: str = "", policy: str = POLICY) -> str:
    """The whole page. script: JavaScript that runs after the page is read. style: more rules for the style sheet."""
    parts = list(body)
    if script:
        parts.append(f"<script>{script}</script>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy_of(script, policy)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE_SHEET.read_text(encoding='utf-8')}{style}</style></head><body>",
            *parts,
            "</body></html>\n",
        ]
    )


def data_block(name: str, value: Any) -> str:
    """JSON that the page's script reads; no text in it can end the block."""
    content = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    content = content.encode("utf-8", "replace").decode("utf-8").replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{content}</script>'


def scrolling(label: str, content: str, style: str = "") -> str:
    """A box that scrolls sideways, also with the keyboard. label: what it holds, for a screen reader."""
    return f'<div class="scroll {style}" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'
