"""How the page shows each judge: in what words, which of its quantities, and which way each is read."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.evaluation.metrics import Metric

PLAIN = Metric(higher_is_better=None, scale=1.0)
"""A number of which neither more nor less is better."""
MORE = Metric(scale=1.0)
LESS = Metric(higher_is_better=False, scale=1.0)
PER_CENT = Metric()
LESS_PER_CENT = Metric(higher_is_better=False)
COUNT = Metric(scale=1.0, digits=0)


class Quantity(NamedTuple):
    """One table: a quantity of a judge, and how its numbers are read."""

    name: str
    """<quantity>, or <quantity>.<part>, of the judge; a number, or numbers by name below it."""
    caption: str
    metric: Metric = PLAIN
    plot: str = ""
    """line: its numbers over their names, a curve an arm; bar: side by side; empty: none."""


class JudgePage(NamedTuple):
    """How one judge is shown."""

    short: str
    title: str
    lead: str
    quantities: tuple[Quantity, ...]
    looks_at_splits: bool = True
    """False of a judge that says the same of every split."""


PAGES: dict[str, JudgePage] = {
    "distance_correlation": JudgePage(
        "Distilled",
        "What was distilled, and what was left",
        "Bias-corrected squared distance correlation of features: 1 is the same up to rotation, shift and scale, "
        "and independent features lie around 0. FSS compares the student with its teacher; RS asks how much of "
        "what one network knows of the labels is left when the other's features are taken away (UniCAM, eq. B1).",
        (
            Quantity("fss", "FSS: teacher against student, by layer of the student", MORE, "line"),
            Quantity(
                "rs.teacher_given_student",
                "RS: left of the teacher, which the student does not have",
                LESS,
                "line",
            ),
            Quantity(
                "rs.student_given_teacher",
                "RS: of the student, not in the teacher",
                PLAIN,
                "line",
            ),
            Quantity(
                "rs.student_given_baseline",
                "RS: of the student beyond the baseline, so distilled",
                MORE,
                "line",
            ),
            Quantity(
                "rs.baseline_given_student",
                "RS: of the baseline, not in the student",
                PLAIN,
                "line",
            ),
            Quantity("relevance", "Relevance: features against labels", MORE, "line"),
            Quantity("progression", "Progression: each layer against the deepest"),
            Quantity("fss_p", "FSS: probability under independence"),
            Quantity(
                "fss_biased",
                "The released code's V-statistic, which goes to 1 whatever the networks are",
            ),
        ),
    ),
    "unicam": JudgePage(
        "UniCAM",
        "Where the distilled and the residual features lie",
        "Maps of relevance to the labels that one network has and another has not (UniCAM), each record against "
        "fixed banks of others; reliability is the cosine of the maps of two banks.",
        (
            Quantity("objective", "J: relevance left of the first network without the second"),
            Quantity("reliability", "Reliability: cosine between banks", MORE),
            Quantity("empty_fraction", "Share of maps in which nothing is positive", LESS),
        ),
    ),
    "gradient_alignment": JudgePage(
        "Gradients",
        "Do its gradients look like the object?",
        "Gradients of the loss with respect to the image (Han et al. 2023): their energy on the object above the "
        "object's share of the view (0 is chance), how far the margin's gradient lines up with the image, and the"
        " cosine of the gradient's magnitude with the teacher's stored map.",
        (
            Quantity("mask_energy", "Energy on the object, above its area", MORE),
            Quantity("margin_alignment", "Alignment of image and margin's gradient", MORE),
            Quantity("map_cosine", "Cosine with the teacher's map", MORE),
        ),
    ),
    "class_similarity": JudgePage(
        "Classes",
        "Does it know which classes are alike?",
        "Off the diagonal, class means of the softened answers say which classes a network takes for which: their"
        " rank correlation with the teacher's, and the mean entropy of an answer, in nats. Smoothed labels erase "
        "what soft targets teach here.",
        (
            Quantity("spearman", "Rank correlation of the class means", MORE),
            Quantity("entropy", "Entropy of an answer"),
            Quantity("teacher_entropy", "Entropy of the teacher's answer"),
        ),
    ),
    "dissection": JudgePage(
        "Concepts",
        "Concepts that single units detect",
        "Network dissection (Bau et al. 2017): a unit detects a concept where its highest activations, over all "
        "images, overlap the concept's pixels by IoU >= 0.05.",
        (
            Quantity("detectors", "Units that detect a concept", COUNT),
            Quantity("unique_concepts", "Different concepts among them", COUNT),
            Quantity("detectors_by_category", "Detectors by category", COUNT, "bar"),
            Quantity("mean_iou", "Mean IoU of each unit with its best concept", MORE),
        ),
        looks_at_splits=False,
    ),
    "five_band": JudgePage(
        "Five bands",
        "Does it mark the part that makes the class?",
        "Explanations in five bands against the truth (Tjoa and Guan): hard thresholds, the best of softer ones, "
        "and the mean over them. A map of zeros has the background's share as its accuracy, so read recall and "
        "FPR beside it.",
        (
            Quantity("accuracy", "Accuracy of pixels", PER_CENT, "bar"),
            Quantity("recall", "Recall", PER_CENT, "bar"),
            Quantity("precision", "Precision", PER_CENT),
            Quantity("fpr", "False positive rate", LESS_PER_CENT, "bar"),
        ),
    ),
    "diffroar": JudgePage(
        "DiffROAR",
        "Do its gradients name what matters?",
        "Predictive power of the pixels with the highest gradients minus that of those with the lowest, by the "
        "share that is kept (Shah et al. 2021): above 0 gradients name what a network trained anew can use. The "
        "mask alone should predict no class.",
        (
            Quantity(
                "difference",
                "DiffROAR by the share of pixels that is kept, in per cent",
                MORE,
                "line",
            ),
            Quantity("mean", "DiffROAR, mean over the shares", MORE),
            Quantity("mask_only", "Accuracy of a probe that sees the places alone"),
            Quantity("unmasked", "Accuracy of a probe that sees all"),
            Quantity("chance", "Share of the most frequent class"),
        ),
    ),
    "superfeatures": JudgePage(
        "Superfeatures",
        "What it says of each superfeature",
        "Mean KL of each superfeature's own answer to the teacher's, in nats, and how often both name the same class.",
        (
            Quantity("kl", "KL, mean over superfeatures", LESS),
            Quantity("agreement", "Agreement, mean over superfeatures", PER_CENT),
            Quantity("kl_by_superfeature", "KL by superfeature", LESS, "bar"),
        ),
    ),
}
"""By judge; those that have a section of their own elsewhere are not here."""
