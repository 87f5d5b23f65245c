"""Evaluators `shift`, `equivariance`, `knn` and `linear_probe`: their options, and how they enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from permafrost.config.evaluation import EVALUATORS, EvaluatorOptions, FeatureProbeOptions
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(EvaluatorOptions):
    """Shift-equivariance curve of the student's explanation (e2KD, Figure 5)."""

    section: ClassVar[str] = "evaluate.shift"
    implementation: ClassVar[str] = "permafrost_evaluators.shift:EVALUATOR"
    order: ClassVar[int] = 30

    pixels: Annotated[int | None, Ge(1)] = None
    """Largest shift of the input in pixels (32 in the paper); null disables the curve. The frames must be
    larger than the student's input by that many pixels."""
    records: Annotated[int, Ge(1)] = 256
    """Records per split; every shift is one forward pass of each of them."""

    @property
    def is_requested(self) -> bool:
        return self.pixels is not None


@dataclass(frozen=True, kw_only=True)
class EquivarianceOptions(EvaluatorOptions):
    """Stored targets of views compared with the teacher's output, for each operation of `augment` and all together.

    Each kind of augment.mix is measured, too: the targets that its rules give to mixtures of whole images.
    """

    section: ClassVar[str] = "evaluate.equivariance"
    implementation: ClassVar[str] = "permafrost_evaluators.equivariance:EVALUATOR"
    order: ClassVar[int] = 40
    reads_augment: ClassVar[bool] = True

    records: Annotated[int, Ge(1)] = 256
    """Records per split; every operation is one forward pass of each of them. The spread of the mean probability needs
    1,000 or more to tell recipes apart."""


@dataclass(frozen=True, kw_only=True)
class KNNOptions(FeatureProbeOptions):
    """Accuracy of the nearest training records by the cosine of pooled features."""

    section: ClassVar[str] = "evaluate.knn"
    implementation: ClassVar[str] = "permafrost_evaluators.feature_probes:KNN"
    order: ClassVar[int] = 50

    k: tuple[int, ...] = (1, 20)
    """Numbers of neighbors; each gives one accuracy."""
    tau: Annotated[float, Gt(0)] = 0.07
    """Temperature of a neighbor's vote exp(cosine / tau)."""

    def _check_together(self) -> None:
        require(
            len(self.k) > 0 and min(self.k) >= 1 and len(set(self.k)) == len(self.k),
            f"evaluate.knn.k must list numbers of at least 1, each once, got {list(self.k)}",
        )


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions(FeatureProbeOptions):
    """Accuracy of a logistic regression on pooled features."""

    section: ClassVar[str] = "evaluate.linear_probe"
    implementation: ClassVar[str] = "permafrost_evaluators.feature_probes:LINEAR_PROBE"
    order: ClassVar[int] = 60

    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Weights of the squared norm, of which the best on a fifth of the training records is used. Features have
    variance 1."""

    def _check_together(self) -> None:
        require(
            len(self.l2) > 0 and min(self.l2) > 0,
            f"evaluate.linear_probe.l2 must list numbers above 0, got {list(self.l2)}",
        )


EVALUATORS["shift"] = ShiftOptions
EVALUATORS["equivariance"] = EquivarianceOptions
EVALUATORS["knn"] = KNNOptions
EVALUATORS["linear_probe"] = LinearProbeOptions
