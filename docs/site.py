"""Source of the site: the pages, with links to files of the repository that a reader of the site can follow.

python -m docs.site [repository address]       writes build/docs for Zensical

A link to a file that is not on the site becomes a link into the repository. Without an address it leads to a copy in
`files/`, and that of a folder becomes plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

from docs.links import FENCE, LINK, ROOT, file_of, links_of

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
TARGET = ROOT / "build" / "docs"
COPIED = (".md", ".svg", ".css")
"""Kinds of files on the site."""


def web_address(remote: str) -> str:
    """Address of a repository in a browser, from that of a git remote; empty if there is none."""
    found = re.fullmatch(r"(?:https://|ssh://git@|git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", remote)
    return f"https://{found[1]}/{found[2]}" if found else ""


def for_site(page: Path, repository: str) -> str:
    """Content of a page on the site."""

    def replaced(found: re.Match[str]) -> str:
        target = found["target"]
        file = file_of(page, target)
        if "://" in target or (file.is_relative_to(DOCS) and file.suffix in COPIED):
            return found[0]
        if not repository and file.is_dir():
            return found["text"][1:-1]
        if not repository:
            up = "../" * len(page.relative_to(DOCS).parts[:-1])
            return f"{found['text']}({up}files/{file.relative_to(ROOT).as_posix()}.txt)"
        kind = "tree" if file.is_dir() else "blob"
        return f"{found['text']}({repository}/{kind}/HEAD/{file.relative_to(ROOT).as_posix()})"

    text = page.read_text()
    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [LINK.sub(replaced, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(replaced, text[end:])])


def copy_linked(page: Path) -> None:
    """Copy the repository's files that a page links to, as text that a browser shows."""
    for file in {file_of(page, target) for target in links_of(page)}:
        if file.is_file() and not (file.is_relative_to(DOCS) and file.suffix in COPIED):
            copy = TARGET / "files" / f"{file.relative_to(ROOT).as_posix()}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


def write(repository: str) -> None:
    """Write the source of the site."""
    shutil.rmtree(TARGET, ignore_errors=True)
    for path in DOCS.rglob("*"):
        if path.suffix == ".md" and not repository:
            copy_linked(path)
        target = TARGET / path.relative_to(DOCS)
        if path.suffix == ".md":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(for_site(path, repository))
        elif path.suffix in COPIED:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


if __name__ == "__main__":
    write(web_address(sys.argv[1]) if len(sys.argv) > 1 else "")
