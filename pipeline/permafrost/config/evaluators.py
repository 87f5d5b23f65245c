"""Evaluators and their options; an evaluator with options has a section of `evaluate` named after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from permafrost.config.options import Options
from permafrost.config.plugins import Family


@dataclass(frozen=True, kw_only=True)
class EvaluatorOptions(Options):
    """Base class of the options of an evaluator, also used for evaluators without options."""

    is_flat: ClassVar[bool] = False
    """True if its metrics are stored next to `records` in metrics.json rather than below its name."""
    uses_teacher: ClassVar[bool] = False
    """True if it may run the teacher network itself; all other evaluators do not read `teacher`."""
    compares: ClassVar[bool] = False
    """True if it compares with another run, named by its option `baseline`."""
    reads_outputs: ClassVar[bool] = True
    """False if it reads features only, so that the network's classes may be others than those of the data."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(EvaluatorOptions):
    """Accuracy, overall and by group, and agreement with the teacher."""

    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.accuracy:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LocalizationOptions(EvaluatorOptions):
    """EPG and IoU of explanations, and their cosine with the teacher's stored maps."""

    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.localization:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(EvaluatorOptions):
    """Shift-equivariance curve of the student's explanation (e2KD, Figure 5)."""

    section: ClassVar[str] = "evaluate.shift"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.shift:EVALUATOR"

    pixels: Annotated[int | None, Ge(1)] = None
    """Largest shift of the input in pixels (32 in the paper); null disables the curve. The frames must be
    larger than the student's input by that many pixels."""
    records: Annotated[int, Ge(1)] = 256
    """Records per split; every shift is one forward pass of each of them."""


EVALUATORS: Family[type[EvaluatorOptions]] = Family(
    {
        "accuracy": AccuracyOptions,
        "localization": LocalizationOptions,
        "shift": ShiftOptions,
    }
)
"""Evaluators in the order in which the report shows them."""
