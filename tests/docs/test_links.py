"""Links between pages and to files of the repository, and the site that is made of the pages."""

import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree

from docs import site
from docs.links import PAGES, anchors_of, file_of, links_of, problems_of
from tests.support.items import for_each
from tests.support.paths import ROOT

DOCS = ROOT / "docs"


@for_each("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    assert list(problems_of(page)) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Other page\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#other-page) [b](gone.md) [c](other.md#gone) `[d](code.md)`\n")

    assert list(problems_of(page, tmp_path)) == [
        "gone.md: no such file",
        "other.md#gone: no such heading",
    ]


def test_an_anchor_is_named_as_github_names_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The `store`'s files, 2\n## Two\n## Two\n```text\n# no heading\n```\n")

    assert anchors_of(page) == {"the-stores-files-2", "two", "two-1"}


def test_every_page_is_reached_from_the_index():
    found, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            linked = [file_of(page, target) for target in links_of(page)]
            waiting += [file for file in linked if file.suffix == ".md" and DOCS in file.parents]

    assert found == {page for page in PAGES if DOCS in page.parents}


def clicks_from_readme():
    """Number of links that lead from the README to each page."""
    clicks, waiting = {ROOT / "README.md": 0}, [ROOT / "README.md"]
    for page in waiting:
        for file in (file_of(page, target) for target in links_of(page)):
            if file.suffix == ".md" and file.is_file() and file not in clicks:
                clicks[file] = clicks[page] + 1
                waiting.append(file)
    return clicks


def test_a_linked_heading_has_the_same_anchor_on_github_and_on_the_site():
    """GitHub keeps two hyphens in a row, as of `A + B`, and the site's generator does not."""
    targets = [target for page in PAGES for target in links_of(page) if "://" not in target]

    assert len(targets) > 100
    assert [target for target in targets if "--" in target.partition("#")[2]] == []


def test_the_questions_of_newcomers_are_answered_where_the_page_of_questions_says():
    page = DOCS / "development" / "architecture.md"
    lines = page.read_text().partition("## Questions")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    clicks = clicks_from_readme()

    assert len(rows) > 10
    for question, link, number, answer in rows:
        (target,) = re.findall(r"\]\(([^)]*)\)", link)
        file = file_of(page, target)
        assert (question, clicks[file]) == (question, int(number))
        text = " ".join(file.read_text().split())
        assert all(quoted in text for quoted in re.findall(r'"([^"]*)"', answer)), question


def test_every_page_is_in_the_sites_navigation():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]

    assert sorted(site.pages_of(nav)) == sorted(
        page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents
    )


@for_each(
    "remote,address",
    [
        ("git@host.org:owner/name.git", "https://host.org/owner/name"),
        ("https://host.org/owner/name", "https://host.org/owner/name"),
        ("/a/folder", ""),
    ],
)
def test_a_remote_has_an_address_in_a_browser(remote, address):
    assert site.web_address(remote) == address


def test_links_out_of_the_pages_lead_into_the_repository():
    page = DOCS / "development" / "architecture.md"

    linked, plain = site.for_site(page, "https://host/name"), site.for_site(page, "")

    assert "(https://host/name/blob/HEAD/pipeline/permafrost/losses/e2kd.py)" in linked
    assert "(https://host/name/tree/HEAD/pipeline/permafrost/config)" in linked
    assert "](../../pipeline" not in plain
    assert "(../files/pipeline/permafrost/losses/e2kd.py.txt)" in plain
    assert "(../howto/extend.md#add-a-loss)" in plain


def test_llms_txt_has_a_line_for_each_page():
    lines = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\): (.+)$", site.listing(), re.MULTILINE)

    assert {DOCS / page for _, page, _ in lines} == {page for page in PAGES if DOCS in page.parents}
    assert all((DOCS / page).read_text().startswith(f"# {title}\n") for title, page, _ in lines)
    assert all(15 < len(sentence) < 400 and "](" not in sentence for _, _, sentence in lines)


def test_the_notebook_of_the_site_installs_from_the_address_of_the_repository():
    with_address = json.loads(site.notebook("https://host.org/owner/name"))["cells"]
    without = json.loads(site.notebook(""))["cells"]

    assert with_address[1:] == without
    assert with_address[0]["source"] == [
        '%pip install "permafrost-kd @ git+https://host.org/owner/name"'
    ]


def test_the_figure_is_an_image_with_a_title():
    figure = ElementTree.parse(DOCS / "figures" / "overview.svg").getroot()

    assert figure.tag.endswith("svg")
    assert figure.find("{http://www.w3.org/2000/svg}title").text


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()

    assert len(lines) <= 100
    assert max(len(line) for line in lines if not line.startswith(("|", "!["))) <= 120
