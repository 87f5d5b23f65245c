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

    if name.endswith("*"):
        assert any(_has(of, "lambda_at") for of in FAMILIES["method"].values())
    else:
        assert knows_option(composed, name)


def test_every_option_of_a_method_and_of_a_papers_teaching_has_a_row():
    written = {option.partition("=")[0] for option in OPTIONS}
    of_methods = {
        f"method.{spec.name}"
        for of in FAMILIES["method"].values()
        for spec in fields(of)
        # Options that are not from a paper.
        if spec.name
        not in ("kind", "teacher_weights", "label_smoothing", "distance", "teacher_stages", "terms")
    }
    own = {spec.name for kind in TEACHINGS for spec in fields(FAMILIES["teaching"][kind])}
    of_teaching = own - {spec.name for spec in fields(LabelTeachingConfig)}

    missing = of_methods | {f"teaching.{name}" for name in of_teaching}
    missing -= written
    if "method.lambda_*" in written:
        missing = {name for name in missing if not name.startswith("method.lambda_")}

    assert missing == set()


def _has(config: type, name: str) -> bool:
    return any(spec.name == name for spec in fields(config))
