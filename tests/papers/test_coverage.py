"""Tables of the papers' options and tests (docs/papers/): every entry exists, and every option is listed."""

import re
from dataclasses import fields

from permafrost.config.families import FAMILIES
from permafrost.config.points import knows_option
from permafrost.config.teaching import LabelTeachingConfig
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs" / "papers").glob("*.md"))
TABLES = [
    part.split("<!-- end of options and tests -->")[0]
    for page in PAGES
    for part in page.read_text().split("<!-- options and tests -->")[1:]
]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for table in TABLES
    for line in table.strip().splitlines()[2:]
]
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
OPTIONS = [option for row in ROWS for option in re.findall(r"`([^`]+)`", row[1])]


@for_each("row", ROWS)
def test_a_row_names_a_test_that_is_there(row):
    file, name, link = re.fullmatch(r"\[`(\w+\.py)::(\w+)`\]\((.+)\)", row[2]).groups()

    (path,) = ROOT.glob(f"tests/**/{file}")

    assert f"def {name}(" in path.read_text()
    assert link == f"../../{path.relative_to(ROOT).as_posix()}"


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
