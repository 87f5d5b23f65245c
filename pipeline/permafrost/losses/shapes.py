"""Shapes of the tensors that losses compare, as broadcasting would silently pair others."""

from __future__ import annotations

from torch import Tensor

from permafrost.core.errors import require


def require_same_shape(
    loss: str, student: Tensor, teacher: Tensor, dims: int, equal: int | None = None
) -> None:
    """Raise ConfigError unless two tensors have the same sizes.

    Args:
        loss: Name of the loss, for the message.
        student: Tensor of the student.
        teacher: Tensor of the teacher.
        dims: Number of axes of both.
        equal: Number of axes at the start whose sizes must be equal, None for all.
    """
    require(
        student.ndim == teacher.ndim == dims and student.shape[:equal] == teacher.shape[:equal],
        f"{loss} compares two tensors of {dims} axes, {'all' if equal is None else f'the first {equal}'} of the same "
        f"sizes, got {[*student.shape]} and {[*teacher.shape]}",
    )
