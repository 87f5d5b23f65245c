"""The teacher's channels of a pass with annotate.features_channels, computed from their projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from permafrost.core.batches import Targets
from permafrost.losses.base import StoredTeacher


def restore_features(projected: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Compute mean + components' z at each position.

    Args:
        projected: Components z, f32 [B, C', h, w].
        mean: [C].
        components: Orthonormal rows [C', C].

    Returns:
        f32 [B, C, h, w].
    """
    return torch.einsum("kc,bkhw->bchw", components, projected) + mean[:, None, None]


class RestoredFeatures(nn.Module):
    """Conversion of projected targets to the teacher's channels, for methods that compare these.

    The projections are read from the passes, and are not part of a checkpoint.
    """

    def __init__(self, passes: Sequence[StoredTeacher]) -> None:
        super().__init__()
        self.fields: dict[str, Mapping[str, int]] = {}
        """Number of the projection of each field, by the name of its pass."""
        count = 0
        for teacher in passes:
            numbers: dict[str, int] = {}
            for field, projection in teacher.projections.items():
                for name in ("mean", "components"):
                    values = torch.from_numpy(getattr(projection, name).copy())
                    self.register_buffer(f"{name}_{count}", values, persistent=False)
                numbers[field] = count
                count += 1
            self.fields[teacher.name] = numbers

    def forward(self, targets: Targets) -> Targets:
        """Return targets whose projected fields have the teacher's channels."""
        restored = {
            field: restore_features(
                values,
                self.get_buffer(f"mean_{number}").to(values),
                self.get_buffer(f"components_{number}").to(values),
            )
            for field, number in self.fields.get(targets.teacher, {}).items()
            if (values := targets.intermediates.get(field)) is not None
        }
        return replace(targets, intermediates={**targets.intermediates, **restored})
