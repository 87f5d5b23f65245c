"""Explainers and the choice of the classes that are explained (`explainer=`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.core.errors import require
from permafrost.core.yaml_text import read_values


@dataclass(frozen=True, kw_only=True)
class ExplainerConfig(Options):
    """Base class of the options of all explainers."""

    section: ClassVar[str] = "explainer"
    reads: ClassVar[Literal["output", "images"]] = "output"
    """Second argument of its function (network, ..., classes i64 [B, E]) -> maps [B, E, A, h, w]: the output of a
    forward pass, whose features it explains, or the images f32 [B, 3, H, W] in [0, 1], with which it runs passes of its
    own. The options that a class adds are further arguments by name."""
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

    @property
    def line(self) -> str:
        """Explainer and options in one line, as `explainer_line` writes them."""
        return explainer_line(asdict(self))

    @property
    def own_options(self) -> dict[str, Any]:
        """Values of the options that its class adds, by name."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_ALL}


_OF_ALL = {option.name for option in fields(ExplainerConfig)}


@dataclass(frozen=True, kw_only=True)
class GradCamConfig(ExplainerConfig):
    """GradCAM at the model's last convolutional stage, on that stage's grid."""

    implementation: ClassVar[str] = "permafrost.models.explanations:gradcam"

    kind: Literal["gradcam"] = "gradcam"
    sign: Annotated[Literal["rectified", "signed"], Role.IF_SET] = "rectified"
    """rectified: evidence against the class is 0 (the paper). signed: it is negative, and the cells sum to the logit
    minus its bias if the classifier is linear on the average of the features (CAM)."""


@dataclass(frozen=True, kw_only=True)
class OtherConfig(ExplainerConfig):
    """Maps that only the teacher can make, such as people's, SHAP, attention rollout or a segmentation.

    The pass's name says what they are. A student is explained by what method.explainer names.
    """

    implementation: ClassVar[str] = "permafrost.models.explanations:other"

    kind: Literal["other"] = "other"


EXPLAINERS: Family[type[ExplainerConfig]] = Family({"gradcam": GradCamConfig, "other": OtherConfig})
"""Explainers (`explainer=`) by name."""


# ---- one line --------------------------------------------------------------------------------------


def explainer_line(description: Mapping[str, Any]) -> str:
    """Write how maps were made in one line, of which classes apart: `integrated_gradients steps=8`.

    Args:
        description: The entry `explainer` of a pass, or the values of options, with `kind`.

    Returns:
        The kind, and the options that its class adds, without those at their defaults.
    """
    kind = str(description["kind"])
    defaults = EXPLAINERS.get(kind, ExplainerConfig)().own_options
    changed = {
        name: value
        for name, value in description.items()
        if name not in _OF_ALL and value != defaults.get(name)
    }
    words = [
        f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in changed.items()
    ]
    return " ".join([kind, *words])


def explainer_of_line(line: str) -> ExplainerConfig:
    """Return the options of what `explainer_line` has written, or a user (method.explainer).

    Raises:
        ConfigError: If the explainer or an option is unknown.
    """
    kind, *words = line.split()
    require(
        kind in EXPLAINERS,
        f"explainer={kind} is not among {', '.join(EXPLAINERS)}; name its plug-in with plugins=",
    )
    values = {
        name: read_values(value) for name, _, value in (word.partition("=") for word in words)
    }
    names = EXPLAINERS[kind]().own_options
    unknown = ", ".join(values.keys() - names.keys())
    require(
        not unknown,
        f"explainer={line}: {unknown} is not an option of {kind}, which has {', '.join(names) or 'none'}",
    )
    return EXPLAINERS[kind](**values)
