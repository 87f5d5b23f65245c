"""Code blocks of the Markdown pages of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.links import FENCE, PAGES
from tests.support.paths import ROOT

__all__ = ["PAGES", "Block", "blocks_of"]
_MARK = re.compile(r"<!-- needs: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """Fenced code block of a page."""

    page: Path
    line: int
    language: str
    code: str
    needs: str | None
    """Missing data or hardware, from a comment `<!-- needs: ... -->` right above the block."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, language: str | None = None) -> Iterator[Block]:
    """Iterate over the code blocks of a page."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()])
        block = Block(
            page=page,
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            code=re.sub(f"^{found['indent']}", "", found["code"], flags=re.M),
            needs=mark[1] if mark else None,
        )
        if language in (None, block.language):
            yield block
