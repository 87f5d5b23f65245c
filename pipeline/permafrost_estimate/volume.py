"""Bytes of a whole store by part: bytes per record of the sample's files, times the records of the whole.

An empty index and an empty commit marker take kilobytes, which a sample of few records would multiply, so
they are counted apart. The tables of shards and the manifests are taken as they are, because they hardly grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from permafrost.storage.files import file_at, scratch_folder
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import marker_path
from permafrost.store.facts import FACTS_NAME
from permafrost.store.index_writer import IndexWriter
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import TeacherPass
from permafrost.store.thumbnails import THUMBNAIL_BYTES
from permafrost_estimate.sample import CurvePoint, RecordSample, Whole


@dataclass(frozen=True)
class VolumePart:
    """Bytes of one part of the store."""

    name: str
    form: str
    """Format of the images, or dtype and shape of a field."""
    bytes: int
    bytes_per_record: float
    lowest: float
    """Bytes per record of the shard with the fewest; `highest` likewise."""
    highest: float


def image_part(sample: RecordSample) -> VolumePart:
    """Return the bytes of the images, those of external tars if they stay where they are, or of a table's rows."""
    frame = sample.store.manifest.canonical
    form: str = "rows of a table" if frame is None else frame.format
    if sample.in_place:
        form += ", in tars of their own"
    return _part("rows" if frame is None else "images", form, sample.images, sample.whole.records)


def index_part(sample: RecordSample) -> VolumePart:
    """Return the bytes of the index, the commit markers and the manifest of the images."""
    store, whole = sample.finished or sample.store, sample.whole
    manifest = store.manifest
    shards = [(shard.name, shard.records) for shard in store.shards]
    names = (MANIFEST_NAME, FACTS_NAME, manifest.shards.path.name)
    rest = _rest_bytes(store.folder, names, shards, whole.records, whole.shards)
    rest += THUMBNAIL_BYTES * whole.records if store.form.has_places else 0
    with scratch_folder() as folder, IndexWriter(folder) as writer:
        empty = sum(file.bytes for file in writer.finish().values())
    index = (store.num_records(), sum(file.bytes for file in manifest.index.values()) - empty)
    form = "index, thumbnails, commit markers, manifest"
    return _part("index", form, [index], whole.records, rest + empty)


def pass_parts(teacher: TeacherPass, numbers: Whole) -> list[VolumePart]:
    """Return the bytes of a pass: those of its fields, and those of its commit markers and manifest.

    Args:
        teacher: Pass of the sample.
        numbers: Numbers of the whole store.
    """
    manifest, views = teacher.manifest, teacher.num_views
    records, num_shards, prefix = numbers.records, numbers.shards, ""
    used = records / (
        num_shards * numbers.rows_per_shard
    )  # fraction of the rows that have a record
    if manifest.selection is not None:
        records, prefix, used = numbers.trained, "views.", 1.0
        num_shards = ceil(numbers.shards * records / numbers.records)
    shards = [(shard.name, shard.rows) for shard in manifest.shards]
    parts = []
    for number, spec in enumerate(manifest.fields):
        files: list[CurvePoint] = [(1, views * prod(spec.shape) * np.dtype(spec.dtype).itemsize)]
        if manifest.backend == "zarr":
            files = [(shard.rows, shard.files[number].bytes) for shard in manifest.shards]
            if len({size for _, size in files}) == 1:  # not compressed, with all rows
                files = [(used * teacher.fields.rows_per_shard, files[0][1])]
        form = f"{spec.dtype} {[*([views] if views > 1 else []), *spec.shape]}"
        parts.append(_part(f"{prefix}{spec.name}", form, files[1:] or files, records))
    if manifest.backend == "webdataset":
        tars = [(shard.rows, shard.files[0].bytes) for shard in manifest.shards]
        headers = _part("", "", tars[1:] or tars, records).bytes - sum(part.bytes for part in parts)
        parts.append(_part(f"{prefix}tars", "headers of the tars", [], records, headers))
    names = (MANIFEST_NAME, FACTS_NAME, manifest.shards.path.name, *manifest.files)
    rest = _rest_bytes(teacher.folder, names, shards, records, num_shards)
    return [*parts, _part(f"{prefix}commits", "commit markers, manifest", [], records, rest)]


# ---- files ---------------------------------------------------------------------------------------


def _part(
    name: str, form: str, points: Sequence[CurvePoint], records: int, fixed: float = 0.0
) -> VolumePart:
    """Return a part with the bytes per record of some files, and with fixed bytes that do not depend on the sample."""
    fixed_each = fixed / max(1, records)
    by_file = [size / count + fixed_each for count, size in points if count] or [fixed_each]
    each = fixed_each + sum(size for _, size in points) / max(1, sum(count for count, _ in points))
    return VolumePart(name, form, round(each * records), each, min(by_file), max(by_file))


def _rest_bytes(
    folder: RootedPath,
    names: Sequence[str],
    shards: Sequence[tuple[str, int]],
    records: int,
    num_shards: int,
) -> float:
    """Return the bytes of some files, which do not grow, and of all commit markers.

    A commit marker has a fixed size plus some bytes per record, as the commit markers of the given shards show.
    """
    counts = [[count, 1] for _, count in shards]
    sizes = [file_at(marker_path(folder, name)).size() or 0 for name, _ in shards]
    each, per_shard = np.linalg.lstsq(counts, sizes, rcond=None)[0].tolist()
    fixed = sum(file_at(folder / name).size() or 0 for name in names)
    return float(fixed + each * records + per_shard * num_shards)
