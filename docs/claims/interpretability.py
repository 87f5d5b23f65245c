"""Claims of the study of Han et al. (ICML 2023)."""

from __future__ import annotations

from docs.claims.sections import Claim, Difference

_ARMS, _EVALUATORS, _CELLS = (
    "interpretability/cifar10_arms",
    "cifar10_evaluators",
    "cells",
)
_IMAGENET = "training on ImageNet takes days on a GPU, and the images of ImageNet and Broden cannot be downloaded here."


def _detectors(candidate: str, baseline: str, what: str) -> Difference:
    return Difference(
        what=what,
        candidate=(_ARMS, candidate),
        baseline=(_ARMS, baseline),
        metric="detectors",
        scale=1,
        unit="units",
    )


CLAIMS = (
    Claim(
        title="Concept detectors of fourteen arms (main figure)",
        reported="distillation raises the number of units that detect a concept, and label smoothing lowers it.",
        recipes=(
            "interpretability/imagenet_arms",
            "interpretability/imagenet_arms_frozen",
            "interpretability/imagenet_arms_ls_teacher",
            "interpretability/imagenet_arms_sskd",
        ),
        missing=_IMAGENET,
        small=(_ARMS, "interpretability/cifar10_arms_ls_teacher"),
        here=(
            _detectors(
                "scratch", "label_smoothing", "labels - smoothed labels, detectors of 64 units"
            ),
            _detectors("kd_tau4", "scratch", "KD at tau 4 - labels, detectors"),
            "means over arms, with intervals of the spread that all arms share, and the caveats of the drawn concepts "
            "are in [interpretability](../results/interpretability.md): with that spread smoothed labels have fewer "
            "detectors than labels, and logits beside features more than features alone",
        ),
    ),
    Claim(
        title="Five-band scores of cells",
        reported="KD's maps mark the part that determines the class better than those of networks trained on labels.",
        small=(_CELLS,),
        here=(
            Difference(
                what="KD - labels, recall",
                candidate=(_CELLS, "kd"),
                baseline=(_CELLS, "labels"),
                metric="five_band_recall",
            ),
            Difference(
                what="KD - labels, false positive rate (lower is better)",
                candidate=(_CELLS, "kd"),
                baseline=(_CELLS, "labels"),
                metric="five_band_fpr",
            ),
        ),
    ),
    Claim(
        title="DiffROAR, gradients of the loss, and the similarity of classes",
        reported="gradients of KD's students identify important pixels, and soft targets carry the similarity of "
        "classes, which smoothed labels do not.",
        small=(_EVALUATORS,),
        here=(
            Difference(
                what="KD - labels, correlation of class similarities with the teacher's",
                candidate=(_EVALUATORS, "kd"),
                baseline=(_EVALUATORS, "labels"),
                metric="class_similarity",
                scale=1,
                digits=2,
                unit="",
            ),
            Difference(
                what="smoothed labels - labels, the same",
                candidate=(_EVALUATORS, "smoothed"),
                baseline=(_EVALUATORS, "labels"),
                metric="class_similarity",
                scale=1,
                digits=2,
                unit="",
            ),
            "DiffROAR of seed 0 is at chance for every network ([features](../results/features.md))",
        ),
    ),
)
