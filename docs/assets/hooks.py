"""What mkdocs does besides: pages that live elsewhere, and the docstrings' habits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page that is a file of the root, its links as the site has them."""
    name = ELSEWHERE.get(page.file.src_uri)
    return (ROOT / name).read_text().replace("](docs/", "](") if name else markdown


def on_page_content(html: str, **_: Any) -> str:
    """A paragraph that ends in `::` announces the code below it, in reStructuredText."""
    return html.replace("::</p>", ":</p>")
