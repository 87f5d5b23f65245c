"""Mean and covariance of a teacher's channels: over a sample as it is annotated, or of a stored field of a pass.

Those of a stored field are computed at first use and kept in <store>/artifacts/moments-<fp8>/ for later students.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.errors import FileError
from permafrost.store.artifacts import Artifact
from permafrost.store.codecs import decode_tensor
from permafrost.store.projections import Projection
from permafrost.store.reader import TeacherPass

MOMENT_RECORDS = 2048
"""Number of records whose stored values are read."""
_MOMENT_SHARDS = 64
"""Largest number of shards of which they are read."""


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues of a covariance, descending, and its eigenvectors as rows.

    Args:
        covariance: f64 [C, C].

    Returns:
        The eigenvalues [C], and the eigenvectors [C, C], each with its largest entry positive.
    """
    variances, columns = torch.linalg.eigh(covariance)
    vectors = columns.T.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return variances.flip(0), vectors * largest.sign()


class ChannelMoments:
    """Sums over the cells of one stage, for the mean and covariance of its channels."""

    def __init__(self, channels: int) -> None:
        self.cells = 0
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features [n, C, h, w]."""
        values = features.detach().transpose(0, 1).flatten(1).double()
        self.cells += values.shape[1]
        self.sums += values.sum(dim=1).cpu()
        self.products += (values @ values.T).cpu()

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean [C] and the covariance [C, C] of the channels, f64."""
        mean = self.sums / self.cells
        return mean, self.products / self.cells - torch.outer(mean, mean)

    def fit(self, components: int) -> Projection:
        """Return the projection on the components of the largest variances, each with its largest entry positive."""
        mean, covariance = self.mean_and_covariance()
        variances, vectors = principal_components(covariance)
        variances, vectors = variances[:components], vectors[:components]
        return Projection(
            mean=mean.numpy().astype(np.float32),
            components=vectors.numpy().astype(np.float32),
            variances=variances.clamp(min=0).numpy().astype(np.float32),
            total=float(covariance.diagonal().sum()),
        )

    def kept_share(self, projection: Projection) -> float:
        """Return the fraction of the variance about the projection's mean that is along its components."""
        center = self.sums / self.cells
        shift = center - torch.from_numpy(projection.mean).double()
        moments = (
            self.products / self.cells - torch.outer(center, center) + torch.outer(shift, shift)
        )
        components = torch.from_numpy(projection.components).double()
        return float((components @ moments * components).sum() / moments.diagonal().sum())


def stored_moments(teacher: object, field: str, split: str) -> tuple[Tensor, Tensor]:
    """Return the mean and the covariance of a stored field of a pass over positions, views and flips.

    They are of a fixed sample of the split: about 2,048 records at equal distances of at most 64 shards, one stored
    view of each. A store that cannot be written keeps none, and they are computed again by each student.

    Args:
        teacher: TeacherPass that stores the field; losses do not know its class.
        field: Name of the field, features_<stage> or pooled.
        split: Split that students are trained on.

    Returns:
        The mean f64 [C] and the covariance f64 [C, C] of the channels that are stored.

    Raises:
        ManifestError: If a file is missing or damaged.
    """
    assert isinstance(teacher, TeacherPass)
    made_from = {
        "pass": [teacher.manifest.fingerprint, teacher.num_generations],
        "store": teacher.store.manifest.fingerprint,
        "sample": [field, split, MOMENT_RECORDS, _MOMENT_SHARDS],
    }
    artifact = Artifact(teacher.store.folder, "moments", made_from, "permafrost distill")
    if not artifact.exists:
        mean, covariance = _measure(teacher, field, split).mean_and_covariance()
        try:
            artifact.save({"mean": mean, "covariance": covariance}, {"field": field}, wait=True)
        except (FileError, OSError):  # a store that cannot be written
            return mean, covariance
    tensors = artifact.load()[1]
    return tensors["mean"], tensors["covariance"]


def _measure(teacher: TeacherPass, field: str, split: str) -> ChannelMoments:
    (spec,) = (spec for spec in teacher.manifest.fields if spec.name == field)
    channels, *grid = spec.shape[int(spec.mirrored) :]
    moments, table = ChannelMoments(channels), teacher.store.shards
    shards = [
        shard
        for number in table.splits[split].tolist()
        if teacher.shards.number_of((shard := table[number]).name) >= 0
    ]
    chosen = [shards[place] for place in _evenly(len(shards), _MOMENT_SHARDS)]
    for shard in chosen:
        rows = teacher.rows_of(shard)
        covered = rows[rows >= 0]
        at = covered[_evenly(len(covered), -(-MOMENT_RECORDS // len(chosen)))]
        stored = {
            name: torch.from_numpy(values[at, at % teacher.num_views])
            for name, values in teacher.open_shard(shard, {field, f"{field}_scale"}).items()
        }
        values = decode_tensor(stored[field], stored.get(f"{field}_scale"))
        moments.add(values.reshape(-1, channels, *(grid or (1, 1))))
    return moments


def _evenly(length: int, count: int) -> NDArray[np.int64]:
    """Return up to `count` places among `length` at equal distances."""
    return np.linspace(0, length - 1, min(length, count)).astype(np.int64)
