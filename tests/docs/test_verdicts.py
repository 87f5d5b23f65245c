"""Verdicts on the claims of the papers: their rule, and their intervals computed again from the committed files."""

import json
import math
import re

import numpy as np
import pytest
from scipy.stats import t as student

from docs.claims import e2kd, interpretability, ked, unicam
from docs.claims.arms import losses_in_words, options_of
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
from tests.support.items import for_each

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
    """Mean difference, bounds of its 95 % interval and p-value, by the formulas: Welch's, or of pairs of teachers."""
    first, second = (
        one.of.scale
        * np.array(list(seed_values(experiment, arms, one.of.name, one.over_teachers).values()))
        for experiment, arms in zip(one.experiments, (one.candidate, one.baseline), strict=True)
    )
    if one.over_teachers:
        error, degrees = (first - second).std(ddof=1) / math.sqrt(len(first)), len(first) - 1
    else:
        a, b = (of.var(ddof=1) / len(of) for of in (first, second))
        error = math.sqrt(a + b)
        degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    mean = first.mean() - second.mean()
    half = student.ppf(0.975, degrees) * error
    return mean, mean - half, mean + half, 2 * student.sf(abs(mean) / error, degrees)


@for_each("paper", MODULES)
def test_every_interval_of_a_page_follows_from_the_committed_files(paper):
    written = [one for claim in paper.CLAIMS for one in claim.measured]
    text = claims_of(paper.CLAIMS)

    assert len(written) > 5
    for one in written:
        mean, low, high, p_value = interval_of(one)
        numbers = [float(n) for n in re.findall(r"[+-][\d.]+", one.text)]
        assert numbers == pytest.approx([mean, low, high], abs=0.51 * 10**-one.of.digits)
        assert one.mean_and_p_value[1] == pytest.approx(p_value, rel=1e-6)
        assert f"| {one.what} | {one.compared} | {one.terms} | " in text
        assert f" | {one.text} | " in text


def results(monkeypatch, **arms):
    """Committed results of one experiment with these values of each arm by seed."""
    runs = [
        {"method": arm, "seed": seed, "accuracy": value}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    monkeypatch.setattr("docs.measured.results_of", lambda name: {"runs": runs})
    monkeypatch.setattr("docs.claims.sections.options_of", lambda experiment, arm: {})


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

    assert over_seeds.text == "+35.0 (-28.5 to +98.5) points"  # 5 * 12.71 around it, Welch's
    assert over_teachers.text == "+35.0 (-155.6 to +225.6) points"  # 15 * 12.71
    assert (over_seeds.units, over_teachers.units) == ("2", "2 teachers")


def test_the_pages_of_results_have_the_verdicts_of_the_papers():
    """Each tested comparison of the papers is in one of these tables, or its experiment has no page of them."""
    written = "".join(TABLES[f"verdicts_{name}"]() for name in VERDICTS)
    for page, claims in PAPERS.items():
        paper = (ROOT / f"docs/papers/{page}.md").read_text()
        for one, (verdict, _) in verdicts_of(claims).items():
            assert f"| {one.what} | {one.compared} |" in paper
            if any(one.experiment in experiments for experiments in VERDICTS.values()):
                row = next(line for line in written.splitlines() if f": {one.what} | " in line)
                assert row.endswith(f"| {verdict} |")


TESTED = [one for paper in MODULES for one in verdicts_of(paper.CLAIMS)]


@for_each("one", TESTED)
def test_the_arms_of_a_tested_comparison_differ_in_the_options_that_it_names_and_in_no_others(one):
    assert set(one.differing) == set(one.differs)
    for options in (*one.arms[0], *one.arms[1]):
        if options["method.kind"] == "e2kd":  # the paper's method has a term on logits
            assert options["method.lambda_kd"] > 0
            assert options["method.lambda_map"] > 0


@pytest.mark.parametrize(
    ("differs", "verdict"),
    [(("method.kind",), OPEN), (("method.kind", "optimizer.lr"), SUPPORTS)],
)
def test_a_difference_that_a_comparison_does_not_name_leaves_it_open(monkeypatch, differs, verdict):
    results(monkeypatch, own=(0.50, 0.51, 0.52), other=(0.40, 0.412, 0.419))
    common = {"method.lambda_ce": 0, "trainer.epochs": 30}
    arms = {
        "own": {
            **common,
            "method.kind": "kd",
            "optimizer.lr": 0.1,
            "method.lambda_kd": 1,
            "method.tau": 1,
        },
        "other": {
            **common,
            "method.kind": "labels",
            "optimizer.lr": 0.2,
            "method.label_smoothing": 0,
        },
    }
    monkeypatch.setattr("docs.claims.sections.options_of", lambda experiment, arm: arms[arm])
    one = Difference(
        "own minus other", "demo", "own", "other", paper=1, differs=differs, searched="lr"
    )
    claim = Claim(title="a", here=(one,))

    assert verdict_of(claim, verdicts_of([claim])) == verdict
    text = claims_of([claim])
    assert (
        "| `demo`: `own` &minus; `other` | logits (tau 1); labels | 30 | not tested | lr | +10.0 ("
        in text
    )
    assert ("the arms differ in optimizer.lr |" in text) == (verdict == OPEN)


def test_arms_are_composed_from_the_command_of_their_results():
    point = options_of("demo_length", "e2kd epochs=270")
    teacher = options_of("demo_converged", "kd teacher=teacher3")

    assert (point["trainer.epochs"], point["method.lambda_map"], point["method.tau"]) == (270, 5, 4)
    assert teacher["store.teacher"] == "teacher3"
    assert losses_in_words(point) == "logits (tau 4) + map (5)"
    assert (
        losses_in_words(options_of("ked/cifar10", "ked_fitnet shots=25"))
        == "ked (0.9, tau 4, mu 0.5) + hint"
    )
    five = options_of("cifar10_equal_terms", "e2kd_logits_top5")
    assert losses_in_words(five) == "logits (tau 1) + maps of 5 classes (10)"
    with pytest.raises(KeyError):
        options_of("demo", "gone")


def test_every_comparison_says_which_options_were_searched():
    for paper in MODULES:
        assert all(one.search for claim in paper.CLAIMS for one in claim.measured)


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
