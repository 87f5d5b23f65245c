"""Rows by hand of each method, evaluator and option of an evaluation: none is missing, and each names what exists."""

import re

from docs.links import PAGES
from permafrost.config.builder import flatten_options
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.families import FAMILIES
from permafrost.config.points import knows_option
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.papers import needs_papers
from tests.support.paths import ROOT
from tests.support.runs import evaluation_of

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
