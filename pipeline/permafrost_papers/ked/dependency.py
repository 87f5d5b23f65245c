"""Dependency of each pair of features in the logits of a frozen network (KED, Algorithm 1).

W_ij = sqrt(mean over records of sum_c (d^2 g_c / dP_i dP_j)^2), where g_c is a class-centered logit and P_i a probe
direction with the length of one standard deviation. It uses logits, because probabilities and losses introduce
dependencies that the network does not have.

Shape letters: d features, K classes, R draws of signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.progress import count_records
from permafrost.models.classifier import to_float32
from permafrost.models.compute import exact_float32
from permafrost_papers.ked.curvature import (
    LogitFunction,
    Probes,
    refuse_piecewise_linear,
    squared_ablations,
    squared_curvature,
)

ENOUGH = 0.9
"""Rank correlation of two halves of the records above which the number of records is sufficient."""

Derivative = Literal["fd", "hvp", "ablate"]

Batches = Iterable[tuple[Sequence[str], Tensor]]
"""Batches of keys and inputs [B, *shape]."""


@dataclass(frozen=True, kw_only=True)
class DependencySums:
    """Sums over some records, which can be added over ranks or shards."""

    squares: Tensor
    """Sums f64 [2, d, d] over each half of the records. A record's key determines its half."""
    records: Tensor
    """Number of records in each half, i64 [2]."""

    @classmethod
    def empty(cls, num_features: int) -> DependencySums:
        """Return the sums over no records."""
        return cls(
            squares=torch.zeros(2, num_features, num_features, dtype=torch.float64),
            records=torch.zeros(2, dtype=torch.int64),
        )

    def __add__(self, other: DependencySums) -> DependencySums:
        return DependencySums(
            squares=self.squares + other.squares, records=self.records + other.records
        )

    @property
    def num_records(self) -> int:
        """Number of records in both halves."""
        return int(self.records.sum())

    @property
    def matrix(self) -> Tensor:
        """Measured matrix W, f64 [d, d]. Row i belongs to the direction of the displacement.

        Raises:
            ValueError: If no record was measured.
            ConfigError: If an entry is not finite.
        """
        require(self.num_records != 0, "no record was measured", ValueError)
        matrix = (self.squares.sum(dim=0) / self.num_records).sqrt()
        require(
            bool(matrix.isfinite().all()),
            "the dependency matrix is not finite, because a logit overflows or is undefined one step away "
            "from a record; lower teaching.step",
        )
        return matrix

    @property
    def split_half(self) -> float:
        """Spearman correlation of the off-diagonal entries of both halves, nan if they cannot be compared."""
        number = self.squares.shape[-1]
        rows, columns = torch.triu_indices(number, number, offset=1)
        first, second = (symmetric(half.sqrt())[rows, columns] for half in self.squares)
        if not self.records.all() or first.numel() < 2:
            return float("nan")
        ranks = torch.from_numpy(rankdata(torch.stack([first, second]), axis=1))
        return float(torch.corrcoef(ranks)[0, 1])

    @property
    def needs_more_records(self) -> bool:
        """True if the two halves do not agree, so that more records are needed."""
        return not self.split_half >= ENOUGH


def measure_dependency(
    network: LogitFunction,
    batches: Batches,
    probes: Probes,
    *,
    seed: int = 0,
    derivative: Derivative = "fd",
    step: float = 1.0,
    draws: int = 1,
    centered: bool = True,
    directions_per_pass: int = 64,
    modules: nn.Module | None = None,
) -> DependencySums:
    """Measure the dependency sums over the records of all batches, one record at a time.

    The contribution of a record depends only on its key, its input and the seed. Record order, batches and the number
    of processes therefore change at most the last bits of a float64 sum.

    Args:
        network: Frozen, in eval mode: `lambda images: model(images).logits` for a network on images, `lambda features:
            model.forward_head(features, None)` for the cells of a trunk.
        batches: Keys and inputs of the records.
        probes: Directions of the features.
        seed: Seed of the signs.
        derivative: "fd" takes central differences of gradients, for every activation; "hvp" is exact, for smooth
            networks; "ablate" takes differences of logits after steps back, without gradients, in d^2 / 2 passes per
            record.
        step: Step of fd and ablate, in units of the probes' steps.
        draws: Draws of signs per record, for a more precise estimate if there are few records.
        centered: False for logits that do not share a softmax (many labels per record).
        directions_per_pass: Number of inputs per forward pass, which limits the memory.
        modules: Module that `network` calls if it is not a module itself, in eval mode.

    Raises:
        ConfigError: If the network is not in eval mode, has a single logit that would be centered, or is piecewise
            linear with "hvp".
    """
    owner = network if modules is None and isinstance(network, nn.Module) else modules
    require(
        owner is None or not any(module.training for module in owner.modules()),
        "dependency must be measured on a frozen network; call freeze(model) first",
    )
    total, num_classes = DependencySums.empty(probes.num_features), 0
    for keys, inputs in batches:
        for key, record in zip(keys, to_float32(inputs), strict=True):
            # The difference of two gradients needs more digits than half precision has.
            with exact_float32(record.device):
                if num_classes == 0:
                    num_classes = _num_classes(network, record, centered)
                    if derivative == "hvp":
                        refuse_piecewise_linear(network, record, owner)
                if derivative == "ablate":
                    squares = squared_ablations(
                        network,
                        record,
                        probes,
                        step=step,
                        centered=centered,
                        directions_per_pass=directions_per_pass,
                    )
                else:
                    squares = squared_curvature(
                        network,
                        record,
                        probes,
                        _signs((draws, num_classes), centered, seed, key),
                        step=None if derivative == "hvp" else step,
                        directions_per_pass=directions_per_pass,
                    )
            half = derive_seed("half", key) % 2
            total.squares[half] += squares
            total.records[half] += 1
            count_records(1)
    return total


def inputs_of_a_record(derivative: Derivative, num_features: int, draws: int) -> int:
    """Return the number of inputs that `measure_dependency` gives the network for a record.

    fd and hvp take the gradient of each, and hvp a second one.
    """
    return {
        "fd": 2 * num_features * draws,
        "hvp": num_features * draws,
        "ablate": 1 + num_features * (num_features + 1) // 2,  # none, one or two are moved
    }[derivative]


def symmetric(dependency: Tensor) -> Tensor:
    """Symmetrize a dependency matrix [d, d] and set its diagonal, the features' own curvature, to 0."""
    both = (dependency + dependency.T) / 2
    return both - both.diag().diag()


def _num_classes(network: LogitFunction, record: Tensor, centered: bool) -> int:
    """Number K of classes."""
    with torch.no_grad():
        num_classes = network(record[None]).shape[1]
    require(
        not (centered and num_classes == 1),
        "a single logit cannot be centered over classes; set centered=False",
    )
    return num_classes


def _signs(shape: tuple[int, int], centered: bool, seed: int, key: str) -> Tensor:
    """Random signs +-1 for each class of a record, f64 [R, K], minus their mean to center the logits."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "class projection", key))
    signs = 2.0 * torch.randint(0, 2, shape, generator=generator).double() - 1
    return signs - signs.mean(dim=1, keepdim=True) if centered else signs
