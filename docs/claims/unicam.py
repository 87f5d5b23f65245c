"""Claims of UniCAM (arXiv 2412.13943)."""

from __future__ import annotations

from docs.claims.sections import AGREEMENT, Claim, Difference, Quantity

_SMALL, _ASSISTANT = "unicam/cifar10_small", "unicam/cifar10_assistant"
_DATA = "the images and the ImageNet weights cannot be downloaded here."
_FSS = Quantity("fss_depth1")
_RELEVANCE = Quantity("relevance_depth1")

CLAIMS = (
    Claim(
        title="Distilled and residual features and their maps, at five depths",
        reported="distilled features are parts and textures of the object, residual ones diffuse or background.",
        recipes=("unicam/cats_and_dogs", "unicam/plant_disease", "unicam/cifar10"),
        missing=_DATA,
        small=(_SMALL,),
        further=(
            (
                "With embeddings of the class names instead of one-hot labels "
                "([how to make the file](../howto/evaluate.md#distilled-and-residual-features)):",
                "permafrost sweep experiment=unicam/cifar10 "
                "evaluate.distance_correlation.embeddings=data/cifar10_names.npy "
                "evaluate.unicam.embeddings=data/cifar10_names.npy",
            ),
        ),
        here=(
            Difference(
                "FSS of KD minus FSS of labels, CIFAR-10, 100 images per class, pooled features",
                _SMALL,
                "vanilla",
                "labels",
                _FSS,
            ),
            Difference(
                "FSS of factor transfer minus FSS of labels", _SMALL, "feature", "labels", _FSS
            ),
            Difference("FSS of AT minus FSS of labels", _SMALL, "attention", "labels", _FSS),
            "the reproducibility of the maps at each depth is in "
            "[UniCAM](../papers/unicam.md#distilled-features-through-five-depths)",
            "not tested: whether distilled features are parts of the object and residual ones background. No measure "
            "here compares the maps with objects",
        ),
    ),
    Claim(
        title="Distilled students learn more relevant features",
        reported="with the teacher's guidance, a student learns more relevant features (abstract).",
        here=(
            *(
                Difference(
                    f"relevance of the features to the labels, {what} minus labels, CIFAR-10, pooled features",
                    _SMALL,
                    variant,
                    "labels",
                    _RELEVANCE,
                    paper=1,
                    differs=("method.kind", *live),
                )
                for what, variant, live in (
                    ("KD", "vanilla", ()),
                    ("factor transfer", "feature", ("mode",)),
                    ("AT", "attention", ()),
                )
            ),
            Difference(
                "the same, KD minus labels, the demo after 30 epochs",
                "demo",
                "kd",
                "labels",
                Quantity("relevance", 1, 2),
                paper=1,
                converged="no: KD",
            ),
            "the commands are those of unicam/cifar10_small above, and `make demo`",
        ),
    ),
    Claim(
        title="A teacher assistant closes the gap in capacity",
        reported="distillation fails where the gap in capacity is large, and assistants help (numbers not seen by us).",
        recipes=("unicam/assistant",),
        missing=_DATA,
        small=(_ASSISTANT,),
        here=(
            Difference(
                "student of the assistant minus student of the first teacher, agreement with the first teacher",
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                AGREEMENT,
                paper=1,
                differs=("store.teacher",),
            ),
            Difference(
                "the same, accuracy",
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                paper=1,
                differs=("store.teacher",),
            ),
            Difference(
                "the same, FSS to the first teacher",
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                Quantity("fss"),
            ),
            "not tested: failures by the gap in capacity. Only one pair of networks with a gap was run",
        ),
    ),
    Claim(
        title="Networks of different kinds: ResNet-152 and VGG",
        reported="the same comparison for these networks (values not seen by us).",
        recipes=("unicam/resnet152_to_vgg", "unicam/vgg_to_resnet152"),
        missing=_DATA
        + " Every variant is trained and every pair of given networks is compared at small size in the slow tests.",
    ),
)
