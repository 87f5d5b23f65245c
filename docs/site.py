"""Source of the site: the pages, with links to files of the repository that a reader of the site can follow.

python -m docs.site [repository address]       writes build/docs for Zensical

A link to a file that is not on the site becomes a link into the repository. Without an address it leads to a copy in
`files/`, and that of a folder becomes plain text. Also written are llms.txt, the list of all pages for programs that
read text, and the notebook, whose first cell installs the project from the repository's address.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from typing import TYPE_CHECKING, Any

from docs.links import FENCE, LINK, ROOT, file_of, links_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCS = ROOT / "docs"
TARGET = ROOT / "build" / "docs"
COPIED = (".md", ".svg", ".png", ".css")
"""Kinds of files on the site."""


def web_address(remote: str) -> str:
    """Address of a repository in a browser, from that of a git remote; empty if there is none."""
    found = re.fullmatch(r"(?:https://|ssh://git@|git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", remote)
    return f"https://{found[1]}/{found[2]}" if found else ""


def is_on_site(file: Path) -> bool:
    """True for a file of docs/ that the site has in the same place."""
    return file.is_relative_to(DOCS) and file.suffix in (*COPIED, ".ipynb")


def for_site(page: Path, repository: str) -> str:
    """Content of a page on the site."""

    def replaced(found: re.Match[str]) -> str:
        target = found["target"]
        file = file_of(page, target)
        if "://" in target or is_on_site(file):
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
        if file.is_file() and not is_on_site(file):
            copy = TARGET / "files" / f"{file.relative_to(ROOT).as_posix()}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


def pages_of(entries: list[str | dict[str, list[Any]]]) -> Iterator[str]:
    """Iterate over the pages of a part of the navigation, whose groups may have groups."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for group in entry.values():
                yield from pages_of(group)


def listing() -> str:
    """Return llms.txt: the pages of each part of the navigation with their first sentences."""
    project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    lines = [f"# {project['site_name']}", "", f"> {project['site_description']}"]
    for part in project["nav"]:
        for name, entries in part.items():
            lines += ["", f"## {name}", ""]
            for page in pages_of(entries):
                title, _, text = (DOCS / page).read_text().removeprefix("# ").partition("\n")
                blocks = [block.strip() for block in FENCE.sub("", text).split("\n\n")]
                paragraphs = [block for block in blocks if block and block[0] not in "#|<!-"]
                plain = LINK.sub(lambda found: found["text"][1:-1], " ".join(paragraphs[0].split()))
                sentence = re.split(r"(?<=[.?:]) (?=[A-Z])", plain.replace("*", ""))[0]
                lines.append(f"- [{title}]({page}): {sentence}")
    return "\n".join(lines) + "\n"


def notebook(repository: str) -> str:
    """Return the notebook, with a first cell that installs the project where its repository has an address."""
    content = json.loads((DOCS / "tour.ipynb").read_text())
    if repository:
        install = f'%pip install "permafrost-kd @ git+{repository}"'
        cell = {"cell_type": "code", "execution_count": None, "id": "install", "metadata": {}}
        content["cells"].insert(0, {**cell, "outputs": [], "source": [install]})
    return json.dumps(content, indent=1) + "\n"


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
    (TARGET / "llms.txt").write_text(listing())
    (TARGET / "tour.ipynb").write_text(notebook(repository))


if __name__ == "__main__":
    write(web_address(sys.argv[1]) if len(sys.argv) > 1 else "")
