"""Verdicts on the claims of the papers: their rule. `make lint` computes their intervals again (docs/prose)."""

import pytest

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
from docs.claims.variants import losses_in_words, options_of
from docs.figures import write_figures
from docs.measured import ROOT


def results(monkeypatch, **variants):
    """Committed results of one experiment with these values of each variant by seed."""
    runs = [
        {"method": variant, "seed": seed, "accuracy": value}
        for variant, values in variants.items()
        for seed, value in enumerate(values)
    ]
    monkeypatch.setattr("docs.measured.results_of", lambda name: {"runs": runs})
    monkeypatch.setattr("docs.claims.sections.options_of", lambda experiment, variant: {})


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
    variants = ("own of=a", "own of=b")
    common = {"experiment": "demo", "candidate": variants, "baseline": ("b", "b"), "paper": 1}
    over_seeds = Difference("seeds", **common)
    over_teachers = Difference("teachers", **common, over_teachers=True)

    assert over_seeds.text == "+35.0 (-28.5 to +98.5) points"  # 5 * 12.71 around it, Welch's
    assert over_teachers.text == "+35.0 (-155.6 to +225.6) points"  # 15 * 12.71
    assert (over_seeds.units, over_teachers.units) == ("2", "2 teachers")


@pytest.mark.parametrize(
    ("differs", "verdict"), [(("method.kind",), OPEN), (("method.kind", "optimizer.lr"), SUPPORTS)]
)
def test_a_difference_that_a_comparison_does_not_name_leaves_it_open(monkeypatch, differs, verdict):
    results(monkeypatch, own=(0.50, 0.51, 0.52), other=(0.40, 0.412, 0.419))
    common = {"method.lambda_ce": 0, "trainer.epochs": 30}
    variants = {
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
    monkeypatch.setattr("docs.claims.sections.options_of", lambda experiment, name: variants[name])
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
    assert ("the variants differ in optimizer.lr |" in text) == (verdict == OPEN)


def test_variants_are_composed_from_the_command_of_their_results():
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
