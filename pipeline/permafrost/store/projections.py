"""Projections of a pass's features: the mean and the principal components of each projected field, as npy files.

    teachers/<name>-<fp8>/projections/features_3.npy   float32 [1 + C', C + 1]

Row 0 has the mean over cells of each of the C channels, and the total variance at its end. Each further row has a
component of length 1, and the variance along it at its end. Features x become z = components (x - mean), and are
rebuilt as mean + components' z. The files are written before the first shard of the pass.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.storage.untrusted import FormatError, parse_npy
from permafrost.store.codecs import encode_npy
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError
from permafrost.store.manifest import PassManifest, ProjectionEntry

PROJECTIONS_FOLDER = "projections"
"""Folder of the projections of a pass."""
_SUFFIX = ".npy"
_MAX_BYTES = 2**26
"""Largest size of a file: 4,096 components of 4,096 channels."""


class Projection(NamedTuple):
    """Affine map from C channels to C' components."""

    mean: NDArray[np.float32]
    """[C]."""
    components: NDArray[np.float32]
    """Orthonormal rows [C', C], in the order of their variances."""
    variances: NDArray[np.float32]
    """Variance along each component, [C']."""
    total: float
    """Variance over all channels."""

    @property
    def kept_share(self) -> float:
        """Fraction of the variance along the components, on the records of the fit."""
        return float(self.variances.sum(dtype=np.float64)) / max(self.total, 1e-30)


def write_projection(folder: RootedPath, field: str, projection: Projection) -> None:
    """Write the projection of a field of a pass.

    Args:
        folder: Folder of the pass.
        field: Name of the field.
        projection: The projection.
    """
    rows = np.concatenate([projection.mean[None], projection.components])
    ends = np.concatenate([[projection.total], projection.variances])
    data = encode_npy(np.concatenate([rows, ends[:, None]], axis=1).astype("<f4"))
    file_at(folder / PROJECTIONS_FOLDER / f"{field}{_SUFFIX}").write(data)


def read_projections(folder: RootedPath) -> dict[str, Projection]:
    """Read the projections of a pass that may be unfinished, by field."""
    return {
        path.name.removesuffix(_SUFFIX): read_projection(path)
        for path in file_at(folder / PROJECTIONS_FOLDER).paths(f"*{_SUFFIX}")
    }


def read_projection(path: RootedPath) -> Projection:
    """Read the projection of a file.

    Raises:
        ManifestError: If it is not a projection.
        FileError: If it cannot be read, or is larger than any projection.
    """
    return _parse(path, file_at(path).read(_MAX_BYTES), (None, None))


def open_projection(folder: RootedPath, manifest: PassManifest, field: str) -> Projection:
    """Read the projection of a field.

    Args:
        folder: Folder of the pass.
        manifest: Manifest of the pass, which says the digest of the file.
        field: Name of the field.

    Raises:
        ManifestError: If the file is missing, a byte has changed, or it does not fit the field.
    """
    entry = manifest.projections[field]
    path = folder / entry.file.path
    spec = next((spec for spec in manifest.fields if spec.name == field), None)
    if spec is None or len(spec.shape) != 3 + spec.mirrored:
        raise ManifestError(
            f"{path} is the projection of {field}, which is not a field of cells; {REWRITE}"
        )
    components = spec.shape[int(spec.mirrored)]
    try:
        data = file_at(path).read(_MAX_BYTES)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    require(
        hashlib.sha256(data).hexdigest() == entry.file.sha256,
        f"{path} is damaged: it is not the file that its manifest lists; {REWRITE}",
        ManifestError,
    )
    return _parse(path, data, (1 + components, 1 + entry.channels))


def describe_projections(folder: RootedPath) -> dict[str, ProjectionEntry]:
    """Return the entries of a manifest for the projections that were written."""
    entries = {}
    for field, projection in read_projections(folder).items():
        path = f"{PROJECTIONS_FOLDER}/{field}{_SUFFIX}"
        data = file_at(folder / path).read(_MAX_BYTES)
        entries[field] = ProjectionEntry(
            file=FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
            channels=projection.components.shape[1],
            kept=round(min(projection.kept_share, 1.0), 6),
        )
    return entries


def _parse(path: RootedPath, data: bytes, shape: tuple[int | None, int | None]) -> Projection:
    """Return the projection of a file of a shape, in which None is any length.

    Raises:
        ManifestError: If the file is not such a projection.
    """
    try:
        values = parse_npy(data, "f", shape).copy()
    except FormatError as error:
        raise ManifestError(
            f"{path} is not a projection of its field: {error}; {REWRITE}"
        ) from error
    require(
        values.dtype == np.float32 and min(values.shape) >= 2,
        f"{path} is not a projection of its field: it is {values.dtype} {values.shape}; {REWRITE}",
        ManifestError,
    )
    return Projection(values[0, :-1], values[1:, :-1], values[1:, -1], float(values[0, -1]))
