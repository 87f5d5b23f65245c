"""Explainers: which classes are explained, and how (`explainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.config.options import Options
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ExplainerOptions(Options):
    """Options of every explainer."""

    section: ClassVar[str] = "explainer"

    explained_classes: Literal["top1", "topk", "all_gt", "sample_gt"] = "top1"
    """Which classes the teacher explains: its highest logit (as in the papers), its highest few, all that the
    record has, or one of those, drawn for each record once and for all."""
    max_classes: int | None = None
    """E of a record: of topk the number of classes; of all_gt null takes as many as any record has, and where a
    record has more, those with the highest logits are explained."""
    seed: int = 0
    """Of sample_gt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several = self.explained_classes in ("topk", "all_gt")
        require(
            self.max_classes is None or (several and self.max_classes >= 1),
            f"explainer.max_classes={self.max_classes} with explained_classes={self.explained_classes}: set a number "
            ">= 1 with topk or all_gt, and null otherwise",
        )
        require(
            self.explained_classes != "topk" or self.max_classes is not None,
            "explainer.explained_classes=topk does not say how many; set explainer.max_classes, as in max_classes=3",
        )


@dataclass(frozen=True, kw_only=True)
class GradCamConfig(ExplainerOptions):
    """GradCAM at the model's last convolutional stage, on its own grid."""

    kind: Literal["gradcam"] = "gradcam"


@dataclass(frozen=True, kw_only=True)
class BcosWeightsConfig(ExplainerOptions):
    """A B-cos network's own explanation, the weights W of its input: six channels, at the input's resolution."""

    kind: Literal["bcos_weights"] = "bcos_weights"


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesConfig(ExplainerOptions):
    """What each superfeature of an additive network adds to a class, spread over its cells."""

    kind: Literal["superfeatures"] = "superfeatures"


ExplainerConfig = GradCamConfig | BcosWeightsConfig | SuperfeaturesConfig


EXPLAINERS: dict[str, type[ExplainerOptions]] = {
    cls.kind: cls for cls in (GradCamConfig, BcosWeightsConfig, SuperfeaturesConfig)
}
