"""Links between pages and to files of the repository."""

import re

import pytest

from tests.support.pages import PAGES, anchors_of, without_code
from tests.support.paths import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)", re.S)


def problems_of(page):
    """Iterate over the links of a page that lead nowhere."""
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            yield f"{target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors_of(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    assert list(problems_of(page)) == []


def test_every_page_of_docs_is_reached_from_the_index():
    index = ROOT / "docs" / "index.md"
    found, waiting = set(), [index]
    while waiting:
        page = waiting.pop()
        if page in found:
            continue
        found.add(page)
        for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.is_relative_to(ROOT / "docs"):
                waiting.append(file)

    assert found == {page for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Other page\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#other-page) [b](gone.md) [c](other.md#gone) `[d](code.md)`\n")

    assert list(problems_of(page)) == ["gone.md: no such file", "other.md#gone: no such heading"]


def test_lines_of_the_readme_fit():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= 180
    assert max(map(len, lines)) <= 120
