"""Tables of the papers (docs/papers/): every option and its test, and what the authors' code has and is here."""

import re
from dataclasses import fields

from permafrost.config.families import FAMILIES
from permafrost.config.points import knows_option
from permafrost.config.teaching import LabelTeachingConfig
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs" / "papers").glob("*.md"))


def rows_of(page, name):
    """Cells of each row of the tables of a name on a page."""
    parts = page.read_text().split(f"<!-- {name} -->")[1:]
    tables = [part.split(f"<!-- end of {name} -->")[0].strip().splitlines() for part in parts]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for lines in tables
        for line in lines[2:]
    ]


ROWS = [row for page in PAGES for row in rows_of(page, "options and tests")]
LINES = [(page, row) for page in PAGES for row in rows_of(page, "there and here")]
TEACHINGS = {
    "guided": ("teaching=guided",),
    "ked": ("teaching=ked", "teacher=additive", "black_box=cifar"),
}
"""Teachings of the papers, each with the words that make its options available."""
NOT_OF_A_PAPER = {
    *("kind", "label_smoothing", "distance", "teacher_stages", "terms"),
    *("lambda_features", "lambda_embedding", "lambda_distance", "lambda_angle"),
    *("lambda_target", "lambda_others", "map_distance", "explainer"),
    *("standardize", "balance", "drop_teachers"),
}


def options_in(cell):
    """Options that a cell names."""
    return re.findall(r"`([^`]+)`", cell)


OPTIONS = [option for row in ROWS for option in options_in(row[1])]


TEST = r"\[`(\w+\.py)::(\w+)`\]\(../../(tests/[^)]+)\)"
"""Link to a test."""
LINKS = [link for _, row in LINES for link in re.findall(TEST, "".join(row))]


@for_each("file,name,path", [*(re.fullmatch(TEST, row[2]).groups() for row in ROWS), *LINKS])
def test_a_row_names_a_test_that_is_there(file, name, path):
    assert path.endswith(f"/{file}")
    assert f"def {name}(" in (ROOT / path).read_text()


def test_each_paper_has_a_table_of_its_code_and_ours():
    assert {page.stem for page, _ in LINES} == {page.stem for page in PAGES} - {"own-images"}


@for_each("page,line", LINES)
def test_what_is_here_has_a_test_or_a_listed_option_and_what_is_not_a_reason(page, line):
    there, here, _ = line
    listed = {option for row in rows_of(page, "options and tests") for option in options_in(row[1])}

    assert there
    if here.startswith("not here"):
        assert len(here) > len("not here: ") + 20, here
    else:
        assert listed & set(options_in(here)) or re.search(TEST, here), here


@for_each("option", OPTIONS)
def test_a_row_names_an_option_that_is_there(option):
    name, _, value = option.partition("=")
    words = []
    if value and name in FAMILIES:
        words = list(TEACHINGS.get(value, [option]))
    elif name.startswith("method."):
        field = name.removeprefix("method.")
        words = [f"method={kind}" for kind, of in FAMILIES["method"].items() if _has(of, field)][:1]
    elif name.startswith("teaching."):
        field = name.removeprefix("teaching.")
        words = next(
            list(words)
            for kind, words in TEACHINGS.items()
            if _has(FAMILIES["teaching"][kind], field)
        )
    elif name.startswith("student."):
        field = name.removeprefix("student.")
        words = [f"student={kind}" for kind, of in FAMILIES["student"].items() if _has(of, field)][
            :1
        ]

    composed = composed_of("teach" if name.startswith("teaching") else "sweep", *words)

    assert knows_option(composed, name)


def missing_rows(written):
    """Options of each method and teaching that are from a paper, and of which no row is written."""
    members = [("method", kind, of, NOT_OF_A_PAPER) for kind, of in FAMILIES["method"].items()]
    of_all = {spec.name for spec in fields(LabelTeachingConfig)}
    members += [("teaching", kind, FAMILIES["teaching"][kind], of_all) for kind in TEACHINGS]
    return [
        f"{section}.{spec.name} of {section}={kind}"
        for section, kind, config, others in members
        for spec in fields(config)
        if spec.name not in others and f"{section}.{spec.name}" not in written
    ]


def test_every_option_of_a_method_and_of_a_papers_teaching_has_a_row():
    missing = missing_rows({option.partition("=")[0] for option in OPTIONS})

    assert not missing, (
        "add a row to the table of options and tests on the paper's page in docs/papers/, or, if the option is not "
        f"from a paper, its name to NOT_OF_A_PAPER in {__name__.replace('.', '/')}.py: {', '.join(missing)}"
    )


def test_an_option_without_a_row_is_named_with_its_method():
    written = {option.partition("=")[0] for option in OPTIONS} - {"method.lambda_review"}

    assert missing_rows(written) == ["method.lambda_review of method=review_kd"]


def _has(config: type, name: str) -> bool:
    return any(spec.name == name for spec in fields(config))
