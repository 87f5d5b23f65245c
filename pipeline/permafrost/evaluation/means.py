"""Means over records, held as sums so that the parts of a split can be added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RunningMeans:
    """Running means of several quantities, each over the records where it is defined."""

    sums: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> RunningMeans:
        """Build from one tensor [B] per quantity, leaving out nan."""
        wide = {name: tensor.double() for name, tensor in values.items()}
        return cls(
            sums={name: float(tensor.nansum()) for name, tensor in wide.items()},
            counts={name: int((~tensor.isnan()).sum()) for name, tensor in wide.items()},
        )

    def __add__(self, other: RunningMeans) -> RunningMeans:
        names = [*self.sums, *(name for name in other.sums if name not in self.sums)]
        return RunningMeans(
            sums={name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names},
            counts={name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names},
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the quantities that are defined on at least one record, each with its <name>_records."""
        defined = [name for name, count in self.counts.items() if count]
        return {
            **{name: self.sums[name] / self.counts[name] for name in defined},
            **{f"{name}_records": self.counts[name] for name in defined},
        }
