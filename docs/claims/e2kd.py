"""Claims of e2KD (arXiv 2402.03119)."""

from __future__ import annotations

from docs.claims.sections import AGREEMENT, Claim, Difference, Quantity

_SHOTS, _LIVE, _REPLAY = "cifar10_50shots", "cifar10_live", "cifar10_replay"
_EQUAL = "cifar10_equal_terms"
_BASELINES, _BCOS, _VIT = "cifar10_baselines", "cifar10_bcos", "cifar10_vit"
_500 = "500 images of CIFAR-10"
_IMAGENET = (
    "ImageNet needs a GPU for days, and its images cannot be downloaded without registration."
)

CLAIMS = (
    Claim(
        title="Table 1: standard networks, with few and with all images",
        recipes=("e2kd/table1", "e2kd/table1_baselines"),
        missing=_IMAGENET,
        small=(_SHOTS, _BASELINES, _EQUAL),
        here=(
            Difference(f"frozen e2KD - frozen KD, {_500}, accuracy", _SHOTS, "e2kd", "kd"),
            Difference("the same, agreement with the teacher", _SHOTS, "e2kd", "kd", AGREEMENT),
            Difference(
                "live e2KD - live KD, the same images, accuracy", _LIVE, "e2kd_live", "kd_live"
            ),
            Difference(
                "at equal terms: AT - e2KD, both with labels", _EQUAL, "at_labels", "e2kd_labels"
            ),
            Difference("CAT-KD - e2KD, both with labels", _EQUAL, "cat_kd_labels", "e2kd_labels"),
            Difference(
                "ReviewKD (live) - e2KD, both with labels",
                _EQUAL,
                "review_kd_labels",
                "e2kd_labels",
            ),
            Difference("e2KD - KD, both with logits", _EQUAL, "e2kd_logits", "kd_logits"),
            Difference("e2KD - KD, both with labels and logits", _EQUAL, "e2kd_both", "kd_both"),
            Difference("AT - e2KD, both with logits", _EQUAL, "at_logits", "e2kd_logits"),
            Difference("CAT-KD - e2KD, both with logits", _EQUAL, "cat_kd_logits", "e2kd_logits"),
            Difference("AT - e2KD, both with labels and logits", _EQUAL, "at_both", "e2kd_both"),
            Difference(
                "CAT-KD - e2KD, both with labels and logits", _EQUAL, "cat_kd_both", "e2kd_both"
            ),
            Difference(
                "ReviewKD (live) - e2KD, labels and logits", _EQUAL, "review_kd_both", "e2kd_both"
            ),
            Difference(
                "e2KD with maps of 5 classes - of one", _EQUAL, "e2kd_logits_top5", "e2kd_logits"
            ),
            Difference(
                "e2KD with maps of all 10 classes - of one",
                _EQUAL,
                "e2kd_logits_all",
                "e2kd_logits",
            ),
            Difference(
                "e2KD with CAT-KD's maps - e2KD", _EQUAL, "e2kd_cat_kd_logits", "e2kd_logits"
            ),
        ),
    ),
    Claim(
        title="Table 2: B-cos networks",
        recipes=("e2kd/table2", "e2kd/table2_baselines"),
        missing=_IMAGENET,
        small=(_BCOS,),
        here=(
            Difference(f"live e2KD - live KD, {_500}, accuracy", _BCOS, "e2kd_live", "kd_live"),
            Difference("the same, agreement", _BCOS, "e2kd_live", "kd_live", AGREEMENT),
        ),
    ),
    Claim(
        title="Table 3: frozen explanations",
        recipes=("e2kd/table3", "e2kd/table3_frozen"),
        missing=_IMAGENET,
        small=(_BCOS, _LIVE, _REPLAY),
        here=(
            Difference(
                f"frozen e2KD - frozen KD, B-cos networks, {_500}, accuracy", _BCOS, "e2kd", "kd"
            ),
            Difference(
                "frozen e2KD - live e2KD, B-cos networks, accuracy", _BCOS, "e2kd", "e2kd_live"
            ),
            Difference("frozen e2KD - live e2KD, GradCAM, accuracy", _LIVE, "e2kd", "e2kd_live"),
            Difference(
                "e2KD on sixteen stored views - live e2KD, GradCAM, accuracy",
                _REPLAY,
                "e2kd_v16",
                "e2kd_live",
                baseline_experiment=_LIVE,
            ),
            Difference(
                "maps not moved with the image - frozen e2KD", _SHOTS, "e2kd_unaugmented", "e2kd"
            ),
            Difference("maps of other images - frozen e2KD", _SHOTS, "e2kd_shuffled", "e2kd"),
        ),
    ),
    Claim(
        title="Table 4: students of guided teachers look where their teacher looks",
        recipes=("e2kd/table4_teacher", "e2kd/table4_epg", "e2kd/table4_iou"),
        missing="the B-cos ResNet-50 that its teachers start from cannot be downloaded here.",
        small=("demo_guided",),
        here=(
            Difference(
                "teacher guided by energy, e2KD - KD, EPG of the students after 30 epochs",
                "demo_guided",
                "e2kd_epg",
                "kd_epg",
                Quantity("epg", 100, 1, " points"),
            ),
            Difference(
                "teacher guided by L1, e2KD - KD, IoU of the students after 30 epochs",
                "demo_guided",
                "e2kd_iou",
                "kd_iou",
                Quantity("iou", 100, 1, " points"),
            ),
        ),
    ),
    Claim(
        title="Waterbirds-100 (figures): right for the right reason out of distribution",
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
                "digits on swapped photographs, frozen e2KD - frozen KD, after the demo's 30 epochs, in which KD has "
                "not converged",
                "demo",
                "e2kd",
                "kd",
                Quantity("accuracy_swapped", 100, 1, " points"),
            ),
            *(
                Difference(
                    f"the same after {epochs} epochs",
                    "demo_length",
                    f"e2kd epochs={epochs}",
                    f"kd epochs={epochs}",
                    Quantity("accuracy_swapped", 100, 1, " points"),
                )
                for epochs in (90, 270)
            ),
            "so maps make a student learn faster; what remains after a long training is small "
            "([length of training](../results/training-length.md))",
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
                "frozen e2KD - frozen KD, CIFAR-10's teacher on 5,760 images of digits, accuracy",
                "cifar10_datafree",
                "e2kd",
                "kd",
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
                "frozen e2KD - frozen KD, 5,000 images of CIFAR-10, accuracy", _VIT, "e2kd", "kd"
            ),
            "the shift curves are in [other claims of e2KD](../results/cifar10-other-claims.md): the patches are "
            "visible under KD, and hardly visible under e2KD",
        ),
    ),
    Claim(
        title="Table B1: ResNet-34 to ResNet-18 with the usual recipe, and KD with cross-entropy",
        recipes=("e2kd/tableb1", "e2kd/tableb1_baselines"),
        missing=_IMAGENET,
    ),
)
