"""Claims of the study of Han et al. (ICML 2023)."""

from __future__ import annotations

from docs.claims.sections import Claim, Difference, Quantity

_ARMS, _EVALUATORS, _CELLS = (
    "interpretability/cifar10_arms",
    "cifar10_evaluators",
    "cells",
)
_IMAGENET = "training on ImageNet takes days on a GPU, and the images of ImageNet and Broden cannot be downloaded here."
_DETECTORS = Quantity("detectors", 1, 1, " units")
_SIMILARITY = Quantity("class_similarity", 1, 2)

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
            Difference(
                "labels - smoothed labels, detectors of 64 units",
                _ARMS,
                "scratch",
                "label_smoothing",
                _DETECTORS,
            ),
            Difference("KD at tau 4 - labels, detectors", _ARMS, "kd_tau4", "scratch", _DETECTORS),
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
                "KD - labels, recall",
                _CELLS,
                "kd",
                "labels",
                Quantity("five_band_recall", 100, 1, " points"),
            ),
            Difference(
                "KD - labels, false positive rate (lower is better)",
                _CELLS,
                "kd",
                "labels",
                Quantity("five_band_fpr", 100, 1, " points"),
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
                "KD - labels, correlation of class similarities with the teacher's",
                _EVALUATORS,
                "kd",
                "labels",
                _SIMILARITY,
            ),
            Difference(
                "smoothed labels - labels, the same", _EVALUATORS, "smoothed", "labels", _SIMILARITY
            ),
            "DiffROAR of seed 0 is at chance for every network ([features](../results/features.md))",
        ),
    ),
)
