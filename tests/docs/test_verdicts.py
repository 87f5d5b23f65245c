"""Verdicts on the claims of the papers: their rule, and their intervals computed again from the committed files."""

import json
import math
import re

import numpy as np
import pytest
from scipy.stats import t as student

from docs.claims import e2kd, interpretability, ked, unicam
from docs.claims.sections import (
    CONTRADICTS,
    NOT_TESTED,
    OPEN,
    SUPPORTS,
    Claim,
    Difference,
    claims_of,
    corrected_p_values,
    verdict_of,
    verdicts_of,
)
from docs.figures import write_figures
from docs.measured import ROOT, path_of
from docs.tables.pages import PAPERS, TABLES, VERDICTS

MODULES = (e2kd, ked, unicam, interpretability)


def seed_values(experiment, arms, metric, over_teachers):
    """Metric of each seed, averaged over arms, or of each teacher's arm, read without docs.measured."""
    runs = json.loads(path_of(experiment).read_text())["runs"]
    arms = (arms,) if isinstance(arms, str) else arms
    if over_teachers:
        of_arm = [[run[metric] for run in runs if run["method"] == arm] for arm in arms]
        return dict(enumerate(map(np.mean, of_arm)))
    values = {}
    for run in runs:
        if run["method"] in arms:
            values.setdefault(run["seed"], []).append(run[metric])
    return {seed: np.mean(of) for seed, of in values.items() if len(of) == len(arms)}


def interval_of(one):
    """Mean difference, bounds of its 95 % interval and p-value, by the formulas."""
    first, second = (
        seed_values(experiment, arms, one.of.name, one.over_teachers)
        for experiment, arms in zip(one.experiments, (one.candidate, one.baseline), strict=True)
    )
    values = np.array(
        [one.of.scale * (first[s] - second[s]) for s in sorted(first.keys() & second)]
    )
    count, error = len(values), values.std(ddof=1) / math.sqrt(len(values))
    half = student.ppf(0.975, count - 1) * error
    p_value = 2 * student.sf(abs(values.mean()) / error, count - 1)
    return values.mean(), values.mean() - half, values.mean() + half, p_value


@pytest.mark.parametrize("paper", MODULES, ids=lambda paper: paper.__name__)
def test_every_interval_of_a_page_follows_from_the_committed_files(paper):
    written = [one for claim in paper.CLAIMS for one in claim.measured]
    text = claims_of(paper.CLAIMS)

    assert len(written) > 5
    for one in written:
        mean, low, high, p_value = interval_of(one)
        numbers = [float(n) for n in re.findall(r"[+-][\d.]+", one.text)]
        assert numbers == pytest.approx([mean, low, high], abs=0.51 * 10**-one.of.digits)
        assert one.p_value == pytest.approx(p_value, rel=1e-6)
        assert f"| {one.what} | {one.text} |" in text


def results(monkeypatch, **arms):
    """Committed results of one experiment with these values of each arm by seed."""
    runs = [
        {"method": arm, "seed": seed, "accuracy": value}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    monkeypatch.setattr("docs.measured.results_of", lambda name: {"runs": runs})


@pytest.mark.parametrize(
    ("values", "paper", "verdict"),
    [
        ((0.50, 0.51, 0.52), 1, SUPPORTS),
        ((0.50, 0.51, 0.52), -1, CONTRADICTS),
        ((0.40, 0.44, 0.39), 1, OPEN),
        ((0.50, 0.51, 0.52), 0, NOT_TESTED),
    ],
)
def test_a_verdict_is_the_sign_of_a_significant_difference(monkeypatch, values, paper, verdict):
    results(monkeypatch, own=values, other=(0.40, 0.412, 0.419))
    claim = Claim(
        title="a", here=(Difference("own minus other", "demo", "own", "other", paper=paper),)
    )

    assert verdict_of(claim, verdicts_of([claim])) == verdict


def test_verdicts_are_corrected_for_the_number_of_comparisons(monkeypatch):
    results(monkeypatch, own=(0.50, 0.52, 0.55), other=(0.40, 0.412, 0.419))
    one, many = (
        [
            Claim(
                title="a",
                here=tuple(
                    Difference(f"number {n}", "demo", "own", "other", paper=1) for n in range(count)
                ),
            )
        ]
        for count in (1, 11)
    )

    (p_value,) = {p for _, p in verdicts_of(one).values()}
    assert 0.005 < p_value < 0.05
    assert {verdict for verdict, _ in verdicts_of(one).values()} == {SUPPORTS}
    assert verdicts_of(many) == {one: (OPEN, pytest.approx(11 * p_value)) for one in many[0].here}


def test_a_comparison_over_teachers_has_their_spread(monkeypatch):
    """Differences of the teachers are 1 and 3, those of the seeds 2 and 2."""
    results(monkeypatch, **{"own of=a": (0.1, 0.3), "own of=b": (0.5, 0.5), "b": (0, 0)})
    arms = ("own of=a", "own of=b")
    common = {"experiment": "demo", "candidate": arms, "baseline": ("b", "b"), "paper": 1}
    over_seeds = Difference("seeds", **common)
    over_teachers = Difference("teachers", **common, over_teachers=True)

    assert over_seeds.values == pytest.approx([30, 40])
    assert over_teachers.values == pytest.approx([20, 50])
    assert (over_seeds.units, over_teachers.units) == ("2", "2 teachers")


def test_the_pages_of_results_have_the_verdicts_of_the_papers():
    """Each tested comparison of the papers is in one of these tables, or its experiment has no page of them."""
    written = "".join(TABLES[f"verdicts_{name}"]() for name in VERDICTS)
    for page, claims in PAPERS.items():
        paper = (ROOT / f"docs/papers/{page}.md").read_text()
        for one, (verdict, _) in verdicts_of(claims).items():
            assert f"| {one.what} | {one.text} |" in paper
            if any(one.experiment in experiments for experiments in VERDICTS.values()):
                row = next(line for line in written.splitlines() if f": {one.what} | " in line)
                assert row.endswith(f"| {verdict} |")


def test_holms_correction_of_known_values():
    assert corrected_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert corrected_p_values([0.5, 0.9]) == [1.0, 1.0]
    assert corrected_p_values([]) == []


@pytest.mark.slow
def test_every_figure_is_drawn_from_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.figures.FIGURES", tmp_path)

    write_figures()

    committed = {path.name for path in ROOT.glob("docs/figures/*.svg")}
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == committed - {"overview.svg", "files.svg"}
    assert all(path.read_text().count("<path") > 5 for path in tmp_path.iterdir())
