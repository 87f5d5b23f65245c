"""Explainers and the choice of the classes that are explained (`explainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from permafrost.config.options import Options
from permafrost.config.plugins import Family
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ExplainerConfig(Options):
    """Base class of the options of all explainers."""

    section: ClassVar[str] = "explainer"
    attribution: ClassVar[str] = ""
    """`module:name` of maps that are contributions for or against a class; empty if those of `implementation` are."""
    contribution: ClassVar[str] = ""
    """`module:name` of a function (maps [B, E, A, h, w], function that renders the images [B, 3, h, w] in [0, 1]) ->
    signed contributions of the positions to the class, [B, E, 1, h, w]; empty if they are the sum over channels."""
    picture: ClassVar[str] = ""
    """`module:name` of a function of the same arguments -> pictures RGBA in [0, 1], [B, E, h, w, 4]; empty for a
    heat map."""
    channels: ClassVar[int] = 1
    """Number A of channels of its maps, by which stored ones are told from those of others."""
    student_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments that choose a student with such maps, if the default one has none."""
    needs_graph: ClassVar[bool] = False
    """True if its maps are gradients through the whole network, which need the graph of its pass."""

    kind: str = ""
    target_classes: Literal["top1", "topk", "all_gt", "sample_gt"] = "top1"
    """Classes that the teacher explains. top1: the predicted class (as in the papers). topk: those with the
    highest logits. all_gt: all labels of the record. sample_gt: one of its labels, drawn once per record."""
    max_classes: int | None = None
    """Number E of target classes per record. topk: their number. all_gt: null takes the largest number of
    labels that any record has; with more labels than E, those with the highest logits are explained."""
    seed: int = 0
    """Seed of sample_gt."""

    def _check_together(self) -> None:
        several = self.target_classes in ("topk", "all_gt")
        require(
            self.max_classes is None or (several and self.max_classes >= 1),
            f"explainer.max_classes={self.max_classes} with target_classes={self.target_classes}: set a number "
            ">= 1 with topk or all_gt, and null otherwise",
        )
        require(
            self.target_classes != "topk" or self.max_classes is not None,
            "explainer.target_classes=topk needs their number; set explainer.max_classes, as in max_classes=3",
        )


@dataclass(frozen=True, kw_only=True)
class GradCamConfig(ExplainerConfig):
    """GradCAM at the model's last convolutional stage, on that stage's grid."""

    implementation: ClassVar[str] = "permafrost.models.explanations:gradcam"

    kind: Literal["gradcam"] = "gradcam"


@dataclass(frozen=True, kw_only=True)
class OtherConfig(ExplainerConfig):
    """Maps that only the teacher can make: people's maps, SHAP, attention rollout."""

    implementation: ClassVar[str] = "permafrost.models.explanations:other"

    kind: Literal["other"] = "other"


EXPLAINERS: Family[type[ExplainerConfig]] = Family({"gradcam": GradCamConfig, "other": OtherConfig})
"""Explainers (`explainer=`) by name."""
