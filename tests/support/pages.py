"""Markdown pages of the repository: their code blocks, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S)
_MARK = re.compile(r"<!-- needs: (.+?) -->\s*$")


@dataclass(frozen=True)
class Block:
    """Fenced code block of a page."""

    page: Path
    line: int
    language: str
    code: str
    needs: str | None
    """What is missing here, from a comment `<!-- needs: ... -->` right above the block."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, language: str | None = None) -> Iterator[Block]:
    """Iterate over the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
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


def without_code(text: str) -> str:
    """Return a page without code blocks and inline code."""
    return re.sub(r"`[^`]*`", "", _FENCE.sub("", text))


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub names them."""
    found: dict[str, int] = {}
    anchors = set()
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = found.get(name, 0)
        found[name] = number + 1
        anchors.add(f"{name}-{number}" if number else name)
    return anchors
