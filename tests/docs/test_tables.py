"""Tables of the pages: named ones say what the committed results say, rows by hand name every member that exists."""

import re
import shlex

import pytest

from docs.cells import rounded
from docs.claims.sections import commands_of, header_of, wrapped
from docs.links import PAGES
from docs.measured import committed_results
from docs.tables.pages import MARK, TABLES, pages, with_tables
from permafrost.config.builder import flatten_options
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.families import FAMILIES
from permafrost.config.points import knows_option
from permafrost.config.sections import experiment_files
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.papers import needs_papers
from tests.support.paths import ROOT
from tests.support.runs import evaluation_of

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


EVALUATE = r"`(evaluate(?:\.[a-z]\w*)+)(?:=[^`]*)?`"
"""Option of an evaluation in a page; results in metrics.json have other names."""
ROWS = {
    "method": ("docs/howto/which-method.md", r"(?m)^\| ((?:`\w+`(?:, )?)+) \|"),
    "evaluators": ("docs/howto/evaluate.md", r"(?m)^\| ((?:`\w+`(?:, )?)+) \|"),
    "metrics": ("docs/reference/metrics.md", r"\bEvaluators? ((?:`\w+`(?: and |, )?)+)"),
}
"""By name: a page, and the pattern of its rows or paragraphs that name members."""


def members_in(name):
    page, pattern = ROWS[name]
    text = (ROOT / page).read_text()
    return {each for names in re.findall(pattern, text) for each in re.findall(r"\w+", names)}


@needs_papers
@for_each("name", ROWS)
def test_every_method_and_evaluator_has_a_row(name):
    family = FAMILIES["method"] if name == "method" else EVALUATORS

    missing = sorted(set(family) - members_in(name))

    assert not missing, f"add a row to {ROWS[name][0]} for: {', '.join(missing)}"


@needs_papers
@for_each("page", PAGES)
def test_every_option_of_an_evaluation_that_a_page_names_exists(page):
    composed = composed_of("evaluate")
    named = set(re.findall(EVALUATE, page.read_text()))

    unknown = sorted(name for name in named if not knows_option(composed, name))

    assert not unknown, (
        f"{page.relative_to(ROOT)} names options that do not exist: {', '.join(unknown)}"
    )


@needs_papers
def test_the_page_has_the_names_of_metrics_as_they_are_written(own):
    from permafrost.evaluation.evaluate import evaluate_student
    from permafrost_papers.interpretability.options import DiffroarOptions
    from permafrost_papers.unicam.options import DistanceCorrelationOptions, UnicamOptions

    sections = ("distance_correlation", "unicam", "gradient_alignment", "diffroar", "localization")
    probes = DiffroarOptions(
        keep=(0.5,), seeds=(0, 1), epochs=1, train_split="teacher", records_per_class=1, width=2
    )
    config = evaluation_of(
        own,
        sections,
        run="one",
        splits=("train",),
        distance_correlation=DistanceCorrelationOptions(baseline="two", biased=True),
        unicam=UnicamOptions(records=2, banks=2, depths=(1, 2), baseline="two"),
        diffroar=probes,
        teacher=own.config.teacher,
    )
    measured = evaluate_student(config).splits["train"]
    page = (ROOT / "docs/reference/metrics.md").read_text()

    for section in sections:
        part = page.partition(f"Evaluator `{section}`")[2].partition("\n## ")[0]
        cells = re.findall(r"(?m)^\| (`[^|]+`) \|", part)
        names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} - {"epg_pairs"}
        written = list(flatten_options(measured.get(section, measured)))
        for name in names:
            pattern = re.sub(r"<\w+>", "[^.]+", name.replace(".", r"\."))
            assert any(re.fullmatch(pattern, each) for each in written), (name, written)
