"""Claims of UniCAM (arXiv 2412.13943)."""

from __future__ import annotations

from docs.claims.sections import Claim, Difference

_SMALL, _ASSISTANT = "unicam/cifar10_small", "cifar10_assistant"
_DATA = "the images and the ImageNet weights cannot be downloaded here."


def _of(experiment: str, candidate: str, baseline: str, what: str, metric: str) -> Difference:
    return Difference(
        what=what,
        candidate=(experiment, candidate),
        baseline=(experiment, baseline),
        metric=metric,
        scale=1,
        digits=3,
        unit="",
    )


CLAIMS = (
    Claim(
        title="Distilled and residual features and their maps, at five depths",
        reported="distilled features are parts and textures of the object, residual ones diffuse or background. The "
        "tables of FSS and RS are not public.",
        recipes=("unicam/cats_and_dogs", "unicam/plant_disease", "unicam/cifar10"),
        missing=_DATA,
        small=(_SMALL,),
        here=(
            _of(
                _SMALL,
                "vanilla",
                "labels",
                "FSS of KD - FSS of labels, pooled features",
                "fss_depth1",
            ),
            _of(
                _SMALL, "feature", "labels", "FSS of factor transfer - FSS of labels", "fss_depth1"
            ),
            _of(_SMALL, "attention", "labels", "FSS of AT - FSS of labels", "fss_depth1"),
            "the numbers of the maps at each depth are in [UniCAM](../results/unicam.md)",
        ),
    ),
    Claim(
        title="A teacher assistant closes the gap in capacity",
        recipes=("unicam/assistant",),
        missing=_DATA,
        small=(_ASSISTANT,),
        here=(
            Difference(
                what="student of the assistant - student of the first teacher, agreement with the first teacher",
                candidate=(_ASSISTANT, "by_assistant"),
                baseline=(_ASSISTANT, "by_teacher"),
                metric="agreement",
            ),
            Difference(
                what="the same, accuracy",
                candidate=(_ASSISTANT, "by_assistant"),
                baseline=(_ASSISTANT, "by_teacher"),
            ),
            _of(
                _ASSISTANT,
                "by_assistant",
                "by_teacher",
                "the same, FSS to the first teacher",
                "fss",
            ),
        ),
    ),
    Claim(
        title="Networks of different kinds: ResNet-152 and VGG",
        recipes=("unicam/resnet152_to_vgg", "unicam/vgg_to_resnet152"),
        missing=_DATA
        + " Every arm is trained and every pair of given networks is compared at small size in the slow tests.",
    ),
)
