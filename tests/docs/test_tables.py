"""Tables of the pages: those with a name are what the committed results say."""

import re
import shlex

import pytest

from docs.cells import rounded
from docs.claims.sections import commands_of, header_of, wrapped
from docs.measured import committed_results
from docs.tables.pages import MARK, TABLES, pages, with_tables
from permafrost.config.sections import experiment_files
from tests.support.items import for_each
from tests.support.paths import ROOT

NAMED = [page for page in pages() if MARK.search(page.read_text())]


@for_each("page", NAMED)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text()

    assert with_tables(text) == text, "python -m docs.tables"


def test_a_table_without_a_row_is_refused(monkeypatch):
    page = "<!-- table: nothing -->\n\n| a |\n|---|\n\n<!-- end -->"
    monkeypatch.setitem(TABLES, "nothing", lambda: "| a | b |\n|---|---|\n")
    with pytest.raises(ValueError, match="table nothing is empty"):
        with_tables(page)

    monkeypatch.setitem(TABLES, "nothing", lambda: "| a | b |\n|---|---|\n| 1 | 2 |\n")
    assert "| 1 | 2 |" in with_tables(page)


def test_every_table_is_on_a_page():
    named = {name for page in NAMED for _, name, _, _ in MARK.findall(page.read_text())}

    assert named == set(TABLES)


@for_each("recipe", ["ked/digits_weights", "ked/digits", "unicam/assistant"])
def test_a_printed_command_has_the_words_of_the_header(recipe):
    typed = [line for line in commands_of(recipe) if not line.startswith("#")]

    printed = [wrapped(command) for command in typed]

    assert any("\n" in text for text in printed)
    printed = [text.replace("\\\n", "") for text in printed]  # as the shell continues a line
    assert [shlex.split(text) for text in printed] == [shlex.split(command) for command in typed]


RECIPES = sorted(experiment_files())


@for_each("recipe", RECIPES)
def test_every_line_among_the_commands_of_a_header_is_printed(recipe):
    blocks = re.findall(r"(?:^  .*\n)+", header_of(recipe) + "\n", re.MULTILINE)
    lines = [
        line.strip()
        for block in blocks
        if re.search("^  (permafrost|make) ", block, re.MULTILINE)
        for line in re.sub(r" \\\n +", " ", block).splitlines()
    ]

    printed = [command.removeprefix("# ") for command in commands_of(recipe)]

    assert [re.sub(" {2,}.*", "", line) for line in lines] == printed


def test_a_five_is_rounded_up():
    from decimal import Decimal

    assert [str(rounded(Decimal(text), 1)) for text in ("36.25", "52.349", "6.05")] == [
        "36.3",
        "52.3",
        "6.1",
    ]


def test_every_committed_result_has_a_table():
    source = "".join(path.read_text() for path in (ROOT / "docs" / "tables").glob("*.py"))
    for name in committed_results():
        assert re.search(rf'"{name}[" ]', source), name
