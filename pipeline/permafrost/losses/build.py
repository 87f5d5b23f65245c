"""Construction of the loss that options name, imported when it is first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost.config.options import resolve_implementation

if TYPE_CHECKING:
    from permafrost.config.methods import MethodConfig
    from permafrost.config.teaching import LabelTeachingConfig
    from permafrost.losses.base import DistillationLoss


def build_loss(config: MethodConfig | LabelTeachingConfig) -> DistillationLoss:
    """Build the loss of a student (`method=`) or of a teacher (`teaching=`)."""
    loss: DistillationLoss = resolve_implementation(type(config))(config)
    return loss
