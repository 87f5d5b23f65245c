"""Lines of a text that is searched without its line breaks or its blocks."""

from __future__ import annotations

import re
from bisect import bisect_right

from docs.links import ROOT

TABLES_AND_CODE = re.compile(r"(?s)<!-- table.*?<!-- end -->|```.*?```")


class JoinedText:
    """Text whose line breaks, with what a pattern takes around them, are spaces, and which knows its lines.

    Attributes:
        text: The text in one line.
    """

    def __init__(self, text: str, breaks: str = r"\s*\n\s*") -> None:
        self._starts, self._lines = [0], [1]
        parts, end, line, length = [], 0, 1, 0
        for found in re.finditer(breaks, text):
            part = text[end : found.start()] + " "
            parts.append(part)
            length += len(part)
            line += found[0].count("\n")
            self._starts.append(length)
            self._lines.append(line)
            end = found.end()
        self.text = "".join([*parts, text[end:]])

    def line_of(self, position: int) -> int:
        """Return the line of a position in the joined text."""
        return self._lines[bisect_right(self._starts, position) - 1]


def without_blocks(text: str, blocks: re.Pattern[str] = TABLES_AND_CODE) -> str:
    """Remove blocks from a page, and keep the number of its lines."""
    return blocks.sub(lambda found: " " + "\n" * found[0].count("\n"), text)


def place(page: str, line: int | None = None) -> str:
    """Return the prefix of a message about a page: its name, and a line if it is known."""
    return f"{page}:{line}:" if line else f"{page}:"


def read(page: str) -> str:
    """Return the text of a page by its path in the repository."""
    return (ROOT / page).read_text()
