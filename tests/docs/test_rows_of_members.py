"""Rows by hand of each method, evaluator and option of an evaluation: none is missing, and each names what exists."""

import re

from docs.links import PAGES
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.families import FAMILIES
from permafrost.config.points import knows_option
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.papers import needs_papers
from tests.support.paths import ROOT

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
