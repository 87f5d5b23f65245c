"""Claims of UniCAM (arXiv 2412.13943)."""

from __future__ import annotations

from docs.claims.sections import AGREEMENT, Claim, Difference, Quantity

_SMALL, _ASSISTANT = "unicam/cifar10_small", "cifar10_assistant"
_DATA = "the images and the ImageNet weights cannot be downloaded here."
_FSS = Quantity("fss_depth1")

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
                "FSS of KD - FSS of labels, CIFAR-10, 100 images a class, pooled features",
                _SMALL,
                "vanilla",
                "labels",
                _FSS,
            ),
            Difference("FSS of factor transfer - FSS of labels", _SMALL, "feature", "labels", _FSS),
            Difference("FSS of AT - FSS of labels", _SMALL, "attention", "labels", _FSS),
            "the numbers of the maps at each depth are in [UniCAM](../results/unicam.md)",
        ),
    ),
    Claim(
        title="A teacher assistant closes the gap in capacity",
        reported="assistants help (without numbers).",
        recipes=("unicam/assistant",),
        missing=_DATA,
        small=(_ASSISTANT,),
        here=(
            Difference(
                "student taught by the assistant - by the first teacher, agreement with the first teacher",
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                AGREEMENT,
            ),
            Difference("the same, accuracy", _ASSISTANT, "by_assistant", "by_teacher"),
            Difference(
                "the same, FSS to the first teacher",
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                Quantity("fss"),
            ),
        ),
    ),
    Claim(
        title="Networks of different kinds: ResNet-152 and VGG",
        reported="figures only.",
        recipes=("unicam/resnet152_to_vgg", "unicam/vgg_to_resnet152"),
        missing=_DATA
        + " Every arm is trained and every pair of given networks is compared at small size in the slow tests.",
    ),
)
