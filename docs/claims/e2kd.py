"""Claims of e2KD (arXiv 2402.03119)."""

from __future__ import annotations

from docs.claims.sections import ACCURACY, AGREEMENT, Claim, Difference, Quantity

_SHOTS, _LIVE, _REPLAY = "cifar10_50shots", "cifar10_live", "cifar10_replay"
_EQUAL, _FRESH = "cifar10_equal_terms", "cifar10_fresh"
_SEED_0 = "tau, weight: on seed 0, one of the three"
_TEN_EPOCHS = "tau, weight: held-out, ten epochs"
_GUIDANCE = "weight of the guidance, by teachers"
_EARLY = "no: KD"
"""Of the demo's 30 epochs (docs/results/training-length.md)."""
_BASELINES, _BCOS, _VIT = "cifar10_baselines", "cifar10_bcos", "cifar10_vit"
_500 = "500 images of CIFAR-10"
_IMAGENET = (
    "ImageNet needs a GPU for days, and its images cannot be downloaded without registration."
)

_ALIKE = "lr, tau, weight (up to its upper end)"
_WEIGHT = "weight alone"
_LABELS = (
    "explainer.target_classes", "explainer.max_classes", "method.kind", "method.lambda_ce", "method.lambda_kd",
)  # fmt: skip
"""Options of a baseline that is trained with labels, where e2KD is trained with logits, as in the paper. Its pass has
the maps of more classes, which it does not read."""
_AGAINST_BASELINES: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("AT", "at_labels", "frozen", "e2kd", ("method.tau",)),
    ("CAT-KD", "cat_kd_labels", "frozen", "e2kd", ("method.tau", "method.lambda_cat")),
    ("ReviewKD", "review_kd_labels", "live", "e2kd_live", ("method.tau",)),
)
"""Baselines with labels, without a temperature, and e2KD at its searched options, both with frozen targets or both
with a live teacher."""


def _fresh(
    what: str, ending: str = "", of: Quantity = ACCURACY, searched: str = _ALIKE
) -> Difference:
    variants = f"e2kd{ending}", f"kd{ending}"
    return Difference(what, _FRESH, *variants, of, paper=1, searched=searched)


def _equal(
    what: str, candidate: str, baseline: str, of: Quantity = ACCURACY, searched: str = _WEIGHT
) -> Difference:
    """Comparison of our own among the variants that have the same targets."""
    return Difference(what, _EQUAL, candidate, baseline, of, searched=searched)


_BASELINE_VARIANTS = {
    "AT": "at_labels",
    "CAT-KD": "cat_kd_labels",
    "ReviewKD (live)": "review_kd_labels",
}

CLAIMS = (
    Claim(
        title="Table 1: standard networks, with few and with all images",
        reported="e2KD agrees more with its teacher than every other method (caption). Its accuracy is called "
        "competitive with prior work: with few images it is the highest in this table, and CAT-KD is above it in "
        "Table 2. Baselines are trained with labels, e2KD with logits.",
        recipes=("e2kd/table1", "e2kd/table1_baselines"),
        missing=_IMAGENET,
        small=(_SHOTS, _FRESH, _BASELINES, _EQUAL),
        here=(
            _fresh(f"frozen e2KD minus frozen KD, {_500}, accuracy"),
            _fresh("the same, agreement with the teacher", of=AGREEMENT),
            _fresh(
                "live e2KD minus live KD, the same images, accuracy",
                "_live",
                searched=f"{_ALIKE}, for frozen targets",
            ),
            *(
                Difference(
                    f"{name} with labels minus {mode} e2KD with logits, {measure}",
                    _EQUAL,
                    variant,
                    other,
                    of,
                    baseline_experiment=_FRESH,
                    paper=-1,
                    differs=(*_LABELS, *further),
                    searched=f"weight of {name}; {_ALIKE} of e2KD",
                )
                for measure, of in (("accuracy", ACCURACY), ("agreement", AGREEMENT))
                for name, variant, mode, other, further in _AGAINST_BASELINES
            ),
            _fresh(
                "e2KD minus KD, both with labels and logits",
                "_both",
                searched=f"{_ALIKE}, without labels",
            ),
            *(
                Difference(
                    f"{name} (frozen) with labels minus live e2KD with logits, {measure}",
                    _EQUAL,
                    variant,
                    "e2kd_live",
                    of,
                    baseline_experiment=_FRESH,
                    searched=f"weight of {name}; {_ALIKE} of e2KD",
                )
                for measure, of in (("accuracy", ACCURACY), ("agreement", AGREEMENT))
                for name, variant in (("AT", "at_labels"), ("CAT-KD", "cat_kd_labels"))
            ),
            *(
                _equal(
                    f"{name} with labels minus frozen e2KD with logits at tau = 1, not searched, {measure}",
                    variant,
                    "e2kd_logits",
                    of,
                )
                for measure, of in (("accuracy", ACCURACY), ("agreement", AGREEMENT))
                for name, variant in _BASELINE_VARIANTS.items()
            ),
            _equal(
                "e2KD minus KD, both with logits at tau = 1, below the tau that a search chose",
                "e2kd_logits",
                "kd_logits",
            ),
            *(
                _equal(
                    f"{name} minus the map loss with labels and no logits (not in the paper), {measure}",
                    variant,
                    "e2kd_labels",
                    of,
                )
                for measure, of in (("accuracy", ACCURACY), ("agreement", AGREEMENT))
                for name, variant in _BASELINE_VARIANTS.items()
            ),
            *(
                _equal(
                    f"{name} minus e2KD, both with {targets}, {measure}",
                    f"{variant}_{ending}",
                    f"e2kd_{ending}",
                    of,
                )
                for measure, of, targets, ending in (
                    ("accuracy", ACCURACY, "logits", "logits"),
                    ("agreement", AGREEMENT, "logits", "logits"),
                    ("accuracy", ACCURACY, "labels and logits", "both"),
                )
                for name, variant in (("AT", "at"), ("CAT-KD", "cat_kd"))
            ),
            _equal("ReviewKD (live) minus e2KD, labels and logits", "review_kd_both", "e2kd_both"),
            _equal(
                "e2KD with the maps of 5 classes minus e2KD with the map of one",
                "e2kd_logits_top5",
                "e2kd_logits",
            ),
            _equal(
                "e2KD with the maps of all 10 classes minus e2KD with the map of one",
                "e2kd_logits_all",
                "e2kd_logits",
            ),
            _equal(
                "e2KD with the maps of CAT-KD in addition minus e2KD",
                "e2kd_cat_kd_logits",
                "e2kd_logits",
            ),
            _equal(
                "ReviewKD (live), labels and logits, minus e2KD with the maps of all 10 classes",
                "review_kd_both",
                "e2kd_logits_all",
            ),
        ),
    ),
    Claim(
        title="Table 2: B-cos networks",
        recipes=("e2kd/table2", "e2kd/table2_baselines"),
        missing=_IMAGENET,
        small=(_BCOS,),
        here=(
            Difference(
                f"live e2KD minus live KD, {_500}, accuracy",
                _BCOS,
                "e2kd_live",
                "kd_live",
                paper=1,
                searched=_SEED_0,
            ),
            Difference(
                "the same, agreement",
                _BCOS,
                "e2kd_live",
                "kd_live",
                AGREEMENT,
                paper=1,
                searched=_SEED_0,
            ),
        ),
    ),
    Claim(
        title="Table 3: frozen explanations",
        reported="with few images, frozen e2KD is better than even live KD (4.4). With all images it is not: frozen "
        "e2KD has 69.5 % and live KD 71.2 %.",
        recipes=("e2kd/table3", "e2kd/table3_frozen"),
        missing=_IMAGENET,
        small=(_LIVE, _REPLAY),
        here=(
            Difference(
                f"frozen e2KD minus frozen KD, B-cos networks, {_500}, accuracy",
                _BCOS,
                "e2kd",
                "kd",
                paper=1,
                searched=_SEED_0,
            ),
            Difference(
                "frozen e2KD minus live KD, B-cos networks, accuracy",
                _BCOS,
                "e2kd",
                "kd_live",
                paper=1,
                differs=("method.kind", "mode"),
                searched=_SEED_0,
            ),
            Difference(
                "frozen e2KD minus live KD, GradCAM, accuracy",
                _FRESH,
                "e2kd",
                "kd_live",
                paper=1,
                differs=("method.kind", "mode"),
                searched=f"{_ALIKE}, for frozen targets",
            ),
            Difference(
                "frozen e2KD minus live e2KD, B-cos networks, accuracy",
                _BCOS,
                "e2kd",
                "e2kd_live",
                paper=-1,
                differs=("mode",),
                searched=_SEED_0,
            ),
            Difference(
                "frozen e2KD minus live e2KD, GradCAM, accuracy",
                _FRESH,
                "e2kd",
                "e2kd_live",
                paper=-1,
                differs=("mode",),
                searched=f"{_ALIKE}, for frozen targets",
            ),
            Difference(
                "e2KD on sixteen stored views minus live e2KD, GradCAM, accuracy",
                _REPLAY,
                "e2kd_v16",
                "e2kd_live",
                baseline_experiment=_LIVE,
                searched="lr, weight: on seed 0, one of the three",
            ),
            Difference(
                "maps not warped with the image minus frozen e2KD",
                _SHOTS,
                "e2kd_unaugmented",
                "e2kd",
                searched=_ALIKE,
            ),
            Difference(
                "maps of other images minus frozen e2KD",
                _SHOTS,
                "e2kd_shuffled",
                "e2kd",
                searched="with the right maps",
            ),
            "the commands of the B-cos networks (cifar10_bcos) are those of Table 2",
        ),
    ),
    Claim(
        title="Table 4: students of guided teachers look where their teacher looks",
        reported="students under e2KD come close to their teacher in the EPG or IoU for which it was guided, and have "
        "a higher F1 than those under KD. Under KD, the teacher makes little difference (4.3.1).",
        recipes=("e2kd/table4_teacher", "e2kd/table4_epg", "e2kd/table4_iou"),
        missing="the B-cos ResNet-50 that its teachers start from cannot be downloaded here.",
        small=("demo_guided",),
        here=(
            Difference(
                "teacher guided by energy, e2KD minus KD, EPG of the students after 30 epochs",
                "demo_guided",
                "e2kd_epg",
                "kd_epg",
                Quantity("epg", 100, 1, " points"),
                paper=1,
                searched=_GUIDANCE,
                converged=_EARLY,
            ),
            Difference(
                "teacher guided by L1, e2KD minus KD, IoU of the students after 30 epochs",
                "demo_guided",
                "e2kd_iou",
                "kd_iou",
                Quantity("iou", 100, 1, " points"),
                paper=1,
                searched=_GUIDANCE,
                converged=_EARLY,
            ),
            *(
                Difference(
                    f"students under KD: {of} minus the plain teacher, EPG",
                    "demo_guided",
                    variant,
                    "kd",
                    Quantity("epg", 100, 1, " points"),
                    searched=_GUIDANCE,
                    converged=_EARLY,
                )
                for of, variant in (
                    ("teacher guided by energy", "kd_epg"),
                    ("teacher guided by L1", "kd_iou"),
                )
            ),
            *(
                Difference(
                    f"{of}, e2KD minus KD, accuracy of the students on photographs as in training, in place of F1",
                    "demo_guided",
                    f"e2kd_{variant}",
                    f"kd_{variant}",
                    Quantity("accuracy_in_distribution", 100, 1, " points"),
                    paper=1,
                    searched=_GUIDANCE,
                    converged=_EARLY,
                )
                for of, variant in (
                    ("teacher guided by energy", "epg"),
                    ("teacher guided by L1", "iou"),
                )
            ),
            "IoU does not follow each teacher: under e2KD, students of the teacher guided by energy exceed its IoU, "
            "and those of the teacher guided by L1 stay below it "
            "([guided teachers](../results/training-length.md#guided-teachers))",
        ),
    ),
    Claim(
        title="Waterbirds-100 (Figures 2, 4, A1, A2, B1 and B2): right for the right reason out of distribution",
        reported="mixup and a longer training (patient teaching) raise agreement (4.2). The variants are those whose "
        "names end in `_mixup` and `_patient`.",
        recipes=(
            "e2kd/waterbirds",
            "e2kd/waterbirds_baselines",
            "e2kd/waterbirds_bcos",
            "e2kd/waterbirds_bcos_baselines",
        ),
        missing="the images and the ImageNet weights cannot be downloaded here.",
        small=("demo", "demo_converged"),
        here=(
            Difference(
                "digits on swapped photographs, frozen e2KD minus frozen KD, after the demo's 30 epochs",
                "demo",
                "e2kd",
                "kd",
                Quantity("accuracy_swapped", 100, 1, " points"),
                converged=_EARLY,
            ),
            *(
                Difference(
                    f"the same after {epochs} epochs",
                    "demo_length",
                    f"e2kd epochs={epochs}",
                    f"kd epochs={epochs}",
                    Quantity("accuracy_swapped", 100, 1, " points"),
                    converged=_EARLY if epochs == 90 else Difference.converged,
                )
                for epochs in (90, 270)
            ),
            Difference(
                "e2KD minus KD on swapped photographs after 270 epochs, over five teachers",
                "demo_converged",
                tuple(f"e2kd teacher=teacher{number}" for number in range(5)),
                tuple(f"kd teacher=teacher{number}" for number in range(5)),
                Quantity("accuracy_swapped", 100, 1, " points"),
                paper=1,
                over_teachers=True,
            ),
            "so maps make a student learn faster; what remains after a long training is small "
            "([length of training](../results/training-length.md))",
            "mixup and patient teaching were not run",
        ),
    ),
    Claim(
        title="Table 5: distillation without the teacher's data",
        recipes=(
            "e2kd/table5_sun_teacher",
            "e2kd/table5_imagenet_to_sun",
            "e2kd/table5_sun_to_imagenet",
        ),
        missing=_IMAGENET,
        small=("cifar10_datafree",),
        here=(
            Difference(
                "frozen e2KD minus frozen KD, CIFAR-10's teacher on 5,760 images of digits, accuracy",
                "cifar10_datafree",
                "e2kd",
                "kd",
                paper=1,
            ),
        ),
    ),
    Claim(
        title="Figure 5: a ViT adopts how a CNN's explanation moves",
        recipes=("e2kd/figure5",),
        missing=_IMAGENET,
        small=(_VIT,),
        here=(
            Difference(
                "frozen e2KD minus frozen KD, 5,000 images of CIFAR-10, accuracy",
                _VIT,
                "e2kd",
                "kd",
                paper=1,
                searched=_TEN_EPOCHS,
            ),
            Difference(
                "the same, agreement with the teacher",
                _VIT,
                "e2kd",
                "kd",
                AGREEMENT,
                paper=1,
                searched=_TEN_EPOCHS,
            ),
            "the shift curves are in [other claims of e2KD](../results/cifar10-50shots.md#other-claims-of-e2kd): "
            "the patches are visible under KD, and hardly visible under e2KD",
            "only frozen students were run, so whether a live one has its teacher's period of 4 pixels (4.3.2) is not "
            "tested",
        ),
    ),
    Claim(
        title="Table B1: ResNet-34 to ResNet-18 with the usual recipe, and KD with cross-entropy",
        reported="the longer recipe of Table 1 raises KD from 70.6 to 71.8 % (B.1).",
        recipes=("e2kd/tableb1", "e2kd/tableb1_baselines"),
        missing=_IMAGENET,
    ),
)
