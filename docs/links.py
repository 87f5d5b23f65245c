"""Links of the pages, to other pages and to files of the repository.

python -m docs.links       prints the links that lead nowhere; exit code 1 if there are any
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
DETAILS = [*ROOT.glob("conf/experiment/*.md"), *ROOT.glob("pipeline/*/*/experiments/*.md")]
"""Details of results, next to the experiments."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *DETAILS])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S)
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)\s]+)\)", re.S)


def without_code(text: str) -> str:
    """Return a page without code blocks and inline code."""
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def links_of(page: Path) -> list[str]:
    """Targets of the links of a page, without addresses of other sites."""
    targets = [found["target"] for found in LINK.finditer(without_code(page.read_text()))]
    return [target for target in targets if "://" not in target]


def file_of(page: Path, target: str) -> Path:
    """File that a link of a page names; the page itself for an anchor alone."""
    path = target.partition("#")[0]
    return (page.parent / path).resolve() if path else page


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub names them."""
    found: dict[str, int] = {}
    anchors = set()
    text = FENCE.sub("", page.read_text())
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = found.get(name, 0)
        found[name] = number + 1
        anchors.add(f"{name}-{number}" if number else name)
    return anchors


def problems_of(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Iterate over the links of a page that lead nowhere."""
    for target in links_of(page):
        file, anchor = file_of(page, target), target.partition("#")[2]
        if not file.exists() or not file.is_relative_to(root):
            yield f"{target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors_of(file):
            yield f"{target}: no such heading"


if __name__ == "__main__":
    lines = [f"{page.relative_to(ROOT)}: {line}" for page in PAGES for line in problems_of(page)]
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(bool(lines))
