"""How much each pair of features depends on one another in a frozen network's logits (KED, Algorithm 1).

W_ij = sqrt(mean over records of sum_c (d^2 g_c / dP_i dP_j)^2), g_c a class-centered logit, P_i a probe
direction of one standard deviation's length. Of logits, never of probabilities or a loss: those mix
what the network keeps apart.

Shape letters: d features, K classes, R draws of signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.seeds import derive_seed
from pipeline.models.output import to_float32
from pipeline.training.superfeatures.curvature import (
    Network,
    refuse_piecewise_linear,
    squared_ablations,
    squared_curvature,
)
from pipeline.training.superfeatures.probes import Probes

ENOUGH = 0.9
"""Rank correlation of two halves of the records from which on there are enough of them."""

Derivative = Literal["fd", "hvp", "ablate"]

Batches = Iterable[tuple[Sequence[str], Tensor]]
"""Keys and inputs [B, *shape]."""


@dataclass(frozen=True, kw_only=True)
class DependencySums:
    """Over some records; sums over ranks or shards add up to the sum over all of them."""

    squares: Tensor
    """f64 [2, d, d]: of each half of the records, which a record's key decides."""
    records: Tensor
    """i64 [2]: their number in each half."""

    @classmethod
    def empty(cls, num_features: int) -> DependencySums:
        """Over no record."""
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
        """In both halves."""
        return int(self.records.sum())

    @property
    def matrix(self) -> Tensor:
        """W: f64 [d, d], as measured: row i is the direction that was moved."""
        if self.num_records == 0:
            raise ValueError("no record was measured")
        matrix = (self.squares.sum(dim=0) / self.num_records).sqrt()
        if not matrix.isfinite().all():
            raise ConfigError(
                "the dependency matrix is not finite: a logit overflows, or is not defined, a step away "
                "from some record; take a smaller step"
            )
        return matrix

    @property
    def split_half(self) -> float:
        """Spearman's correlation of the two halves' off-diagonals; nan where they cannot be compared."""
        first, second = (_off_diagonal(symmetric(half.sqrt())) for half in self.squares)
        if not self.records.all() or first.numel() < 2:
            return float("nan")
        ranks = torch.from_numpy(rankdata(torch.stack([first, second]), axis=1))
        return float(torch.corrcoef(ranks)[0, 1])

    @property
    def needs_more_records(self) -> bool:
        """Whether two halves of them do not agree yet: then double their number."""
        return not self.split_half >= ENOUGH


def measure_dependency(
    network: Network,
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
    """The sum over the records of all batches, each record by itself.

    A record's part depends on its key, its input and the seed alone, so neither order nor batches nor the
    number of processes change more than the last bits of a sum in float64.

    network     frozen, in eval mode; `lambda images: model(images).logits` for a network of images, `lambda
                features: model.forward_head(features, None)` for the cells of a trunk
    derivative  fd: central differences of gradients, for every activation; hvp: exact, for smooth networks;
                ablate: differences of logits a step back, without a gradient, d^2 / 2 passes a record
    step        of fd and ablate, in units of the probes'
    draws       of signs a record: more say more of one record, where records are few
    centered     False for logits that share no softmax (many labels a record)
    modules     what `network` calls, where it is no module itself; must be in eval mode
    """
    owner = network if modules is None and isinstance(network, nn.Module) else modules
    if owner is not None and any(module.training for module in owner.modules()):
        raise ConfigError("dependency is measured on a frozen network; call freeze(model) first")
    total, num_classes = DependencySums.empty(probes.num_features), 0
    for keys, inputs in batches:
        for key, record in zip(keys, to_float32(inputs), strict=True):
            # Half precision has too few digits for the difference of two gradients.
            with torch.autocast(record.device.type, enabled=False):
                if num_classes == 0:
                    num_classes = _num_classes(network, record, centered)
                    if derivative == "hvp":
                        refuse_piecewise_linear(network, record, modules)
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
    return total


def symmetric(dependency: Tensor) -> Tensor:
    """[d, d] the same in both directions, and without the features' own curvature."""
    both = (dependency + dependency.T) / 2
    return both - both.diag().diag()


def _num_classes(network: Network, record: Tensor, centered: bool) -> int:
    """K."""
    with torch.no_grad():
        num_classes = network(record[None]).shape[1]
    if centered and num_classes == 1:
        raise ConfigError("a single logit cannot be centered over classes; use centered=False")
    return num_classes


def _signs(shape: tuple[int, int], centered: bool, seed: int, key: str) -> Tensor:
    """+-1 for each class of a record, f64 [R, K]; minus their mean, which centers the logits."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "class projection", key))
    signs = 2.0 * torch.randint(0, 2, shape, generator=generator).double() - 1
    return signs - signs.mean(dim=1, keepdim=True) if centered else signs


def _off_diagonal(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[rows, columns]
