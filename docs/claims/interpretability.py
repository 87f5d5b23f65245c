"""Claims of the study of Han et al. (ICML 2023)."""

from __future__ import annotations

from docs.claims.sections import ACCURACY, Claim, Difference, Quantity

_VARIANTS, _EVALUATORS = "interpretability/cifar10_variants", "interpretability/cifar10_evaluators"
_CELLS, _CELLS_VARIANTS = "interpretability/cells", "interpretability/cells_variants"
_IMAGENET = "training on ImageNet takes days on a GPU, and the images of ImageNet and Broden cannot be downloaded here."
_DETECTORS = Quantity("detectors", 1, 1, " units")
_SIMILARITY = Quantity("class_similarity", 1, 2)

CLAIMS = (
    Claim(
        title="Concept detectors of fourteen variants (main figure)",
        reported="distillation raises the number of units that detect a concept, and label smoothing lowers it.",
        recipes=(
            "interpretability/imagenet_variants",
            "interpretability/imagenet_variants_frozen",
            "interpretability/imagenet_variants_ls_teacher",
            "interpretability/imagenet_variants_sskd",
        ),
        missing=_IMAGENET,
        small=(_VARIANTS, "interpretability/cifar10_variants_ls_teacher"),
        here=(
            Difference(
                "labels minus smoothed labels, CIFAR-10, 50 images per class, detectors of 64 units",
                _VARIANTS,
                "scratch",
                "label_smoothing",
                _DETECTORS,
                paper=1,
                differs=("method.label_smoothing",),
            ),
            Difference(
                "KD at tau 1, 2, 4 and 8 minus labels, mean over the temperatures, detectors",
                _VARIANTS,
                ("kd_tau1", "kd_tau2", "kd_tau4", "kd_tau8"),
                ("scratch",),
                _DETECTORS,
                paper=1,
            ),
            Difference(
                "features and logits minus features alone, mean over AT, FT, CRD and SSKD, detectors",
                _VARIANTS,
                ("at_logits", "ft_logits", "crd_logits", "sskd_logits"),
                ("at", "ft", "crd", "sskd"),
                _DETECTORS,
            ),
            "all variants and the caveats of the drawn concepts are in "
            "[interpretability](../papers/interpretability.md#variants-of-the-interpretability-study)",
        ),
    ),
    Claim(
        title="Accuracy of KD and of smoothed labels",
        reported="both are more accurate than training on labels.",
        here=(
            *(
                Difference(
                    f"KD at tau {tau} minus labels, CIFAR-10, 50 images per class, accuracy",
                    _VARIANTS,
                    f"kd_tau{tau}",
                    "scratch",
                    ACCURACY,
                    paper=1,
                    converged="no: KD gains more" if tau == 4 else Difference.converged,
                )
                for tau in (1, 2, 4, 8)
            ),
            Difference(
                "smoothed labels minus labels, the same",
                _VARIANTS,
                "label_smoothing",
                "scratch",
                ACCURACY,
                paper=1,
                differs=("method.label_smoothing",),
            ),
            "the commands are those of interpretability/cifar10_variants above",
        ),
    ),
    Claim(
        title="Activation maps lie more on the object",
        reported="the activation maps of KD's students are more object-centric.",
        missing="the images of CIFAR-10 have no boxes. The demo and the drawn cells have masks, in which the energy of "
        "GradCAM is measured.",
        here=(
            Difference(
                "KD minus labels, the demo after 30 epochs, EPG of the maps",
                "demo",
                "kd",
                "labels",
                Quantity("epg", 100, 1, " points"),
                paper=1,
                converged="no: KD",
            ),
            Difference(
                "KD at tau 4 minus labels, 200 drawn cells, EPG of the maps",
                _CELLS_VARIANTS,
                "kd_tau4",
                "scratch",
                Quantity("epg", 100, 1, " points"),
                paper=1,
            ),
        ),
    ),
    Claim(
        title="Five-band scores of cells",
        reported="KD's maps mark the part that determines the class better than those of networks trained on labels: "
        "higher accuracy and a lower false positive rate.",
        missing="its drawn cells have 512 pixels; ours are drawn in the same way at 40.",
        small=(_CELLS, _CELLS_VARIANTS),
        here=(
            *(
                Difference(
                    f"KD at tau 4 minus labels, 200 drawn cells, {name}",
                    _CELLS_VARIANTS,
                    "kd_tau4",
                    "scratch",
                    Quantity(metric, 100, 1, " points"),
                    paper=paper,
                )
                for name, metric, paper in (
                    ("recall", "five_band_recall", 1),
                    ("false positive rate (lower is better)", "five_band_fpr", -1),
                )
            ),
            "all variants are in "
            "[cells](../papers/interpretability.md#cells), and the accuracy of the five bands, which no committed file "
            "contains",
        ),
    ),
    Claim(
        title="DiffROAR, gradients of the loss, and the similarity of classes",
        reported="gradients of KD's students identify important pixels, and soft targets carry the similarity of "
        "classes, which smoothed labels do not.",
        missing=_IMAGENET
        + " Class similarities and gradients are among the evaluators of the ImageNet recipes above.",
        small=(_EVALUATORS,),
        further=(
            (
                "DiffROAR of every variant, on ImageNet and at small size. It trains 43 probes per student:",
                "permafrost sweep experiment=interpretability/imagenet_variants "
                "evaluators=[accuracy,class_similarity,gradient_alignment,dissection,diffroar] "
                "evaluate.diffroar.train_records=20000",
            ),
            (
                "",
                "permafrost sweep experiment=interpretability/cifar10_variants "
                "evaluators=[accuracy,class_similarity,gradient_alignment,dissection,diffroar]",
            ),
            (
                "The similarity of CIFAR-100's classes, by its twenty coarse classes, of the students of ked/cifar100:",
                "permafrost sweep experiment=ked/cifar100 "
                "evaluators=[accuracy,localization,superfeatures,class_similarity] "
                "evaluate.class_similarity.reference=cifar100_coarse",
            ),
        ),
        here=(
            Difference(
                "KD minus labels, CIFAR-10, 100 images per class, correlation of class similarities with the teacher's",
                _EVALUATORS,
                "kd",
                "labels",
                _SIMILARITY,
                paper=1,
            ),
            Difference(
                "smoothed labels minus labels, the same",
                _EVALUATORS,
                "smoothed",
                "labels",
                _SIMILARITY,
            ),
            *(
                Difference(
                    f"KD at tau {tau} minus labels, 50 images per class, cosine of loss gradient and teacher's map",
                    _VARIANTS,
                    f"kd_tau{tau}",
                    "scratch",
                    Quantity("gradient_cosine"),
                    paper=1,
                )
                for tau in (1, 2, 4, 8)
            ),
            "DiffROAR of seed 0 is at chance for every network "
            "([features](../results/features.md#what-students-learn-from-their-teachers))",
        ),
    ),
)
