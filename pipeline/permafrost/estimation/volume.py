"""Bytes of a whole store by part, from the files of a sample.

The first shard of the sample has fewer records than the others, so the files of both determine the bytes of a record
and those of a shard. Uncompressed fields of a pass have the same bytes in every shard, with unused rows at the end.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from permafrost.config.options import options_of
from permafrost.config.store import PAYLOADS, PassOptions
from permafrost.core.files import open_regular, open_size, scratch_folder
from permafrost.store.index import CHECKED_COLUMNS
from permafrost.store.index_writer import IndexWriter
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.receipts import RECEIPT_SCHEMA, read_receipt, receipt_path
from permafrost.store.zarr_fields import FIELDS_FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from permafrost.core.files import AnyPath, RootedPath
    from permafrost.core.records import FieldSpec
    from permafrost.estimation.sample import Point, Sample, Whole
    from permafrost.store.reader import Store, TeacherPass
    from permafrost.store.shards import TableFile


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one part of the store."""

    name: str
    form: str
    """Format of the images, or dtype and shape of a field."""
    bytes: int
    bytes_per_record: float
    lowest: float
    """Bytes a record of the shard with the fewest; `highest` likewise."""
    highest: float


def image_part(sample: Sample) -> Part:
    """Return the bytes of the images, those of external tars if they stay where they are, or of a table's rows."""
    manifest = sample.store.manifest
    name, form = "rows", "rows of a table"
    if manifest.canonical is not None:
        name, form = "images", str(manifest.canonical.format)
    if sample.in_place:
        form += ", in tars of their own"
    if sample.images:
        return _scaled_part(name, form, sample.images, sample)
    points = [
        (shard.records, _tar_content(shard.file(sample.store.folder))) for shard in sample.shards
    ]
    return _growing_part(name, form, points, sample.whole.records, sample.whole.shards)


def index_part(sample: Sample) -> Part:
    """Return the bytes of the index, the receipts and the manifest of the images."""
    name, form, whole = "index", "index, receipts, manifest", sample.whole
    if sample.finished is not None:
        held = _held_by_index(sample.finished)
        return _scaled_part(name, form, [(sample.finished.num_records(), held)], sample)
    store = sample.store
    receipts = [
        (shard.records, _bytes_of(receipt_path(store.folder, shard.name))) for shard in store.shards
    ]
    index = [_index_point(store, 1), _index_point(store, len(store.shards))]
    per_shard, constant = _table_bytes(store.folder, store.manifest.shards, _SHARD_BYTES)
    total = (
        _on_a_line(receipts, whole.records, whole.shards)
        + _on_a_line(index, whole.records, 1)
        + per_shard * whole.shards
        + constant
    )
    return _even_part(name, form, total, whole.records)


def pass_parts(teacher: TeacherPass, numbers: Whole) -> list[Part]:
    """Return the bytes of a pass: those of its fields, and those of its receipts and manifest."""
    manifest = teacher.manifest
    covered, shards, prefix = numbers.records, numbers.shards, ""
    if manifest.selection is not None:
        covered, prefix = numbers.trained, "views."
        shards = ceil(numbers.shards * covered / numbers.records)
    if manifest.backend == "zarr":
        parts = [
            _field_part(teacher, number, spec, prefix, covered, shards)
            for number, spec in enumerate(manifest.fields)
        ]
    else:
        parts = _tar_parts(teacher, prefix, covered, shards)
    receipts = [
        (shard.rows, _bytes_of(receipt_path(teacher.folder, shard.name)))
        for shard in manifest.shards
    ]
    fields_bytes = len(manifest.shards[0].files) * _FILE_BYTES + _PASS_SHARD_BYTES
    per_shard, constant = _table_bytes(teacher.folder, manifest.shards, fields_bytes)
    constant += sum(_bytes_of(teacher.folder / name) for name in manifest.files)
    total = _on_a_line(receipts, covered, shards) + per_shard * shards + constant
    rest = _even_part(f"{prefix}receipts", "receipts, manifest", total, covered)
    return [*parts, rest]


def other_forms(sample: Sample, passes: Sequence[TeacherPass]) -> dict[str, float]:
    """Return the bytes a record of other options, as far as the shapes alone determine them, before compression."""
    forms = {}
    canonical = sample.store.manifest.canonical
    if canonical is not None and canonical.format != "raw" and not sample.in_place:
        forms["store.format=raw"] = float(canonical.height * canonical.width * 3)
    dtypes = {each.name: get_args(each.hint) for each in options_of(PassOptions)}
    for spec in (spec for teacher in passes[:1] for spec in teacher.manifest.fields):
        read = PAYLOADS[spec.name].read_options if spec.name in PAYLOADS else ()
        for option in (name for name in read if name.endswith("_dtype")):
            for dtype in dtypes[option]:
                if dtype != spec.dtype:
                    forms[f"annotate.{option}={dtype}"] = float(_values_bytes(spec, dtype))
    return forms


# ---- fields --------------------------------------------------------------------------------------


def _field_part(
    teacher: TeacherPass, number: int, spec: FieldSpec, prefix: str, covered: int, shards: int
) -> Part:
    """Return the bytes of a field in files of its own."""
    manifest = teacher.manifest
    points = [(shard.rows, shard.files[number].bytes) for shard in manifest.shards]
    assert all(
        shard.files[number].path.startswith(f"{FIELDS_FOLDER}/{spec.name}/")
        for shard in manifest.shards
    )
    form = _form(spec, teacher.num_views)
    name = f"{prefix}{spec.name}"
    if manifest.selection is not None:  # its chunks are as large as the sample's largest shard
        return _growing_part(name, form, [max(points)], covered, shards, in_tars=False)
    total = _on_a_line(points, covered, shards)
    in_a_shard = covered / shards
    by_shard = [
        _on_a_line([points[0], point], in_a_shard, 1) / in_a_shard for point in points[1:] or points
    ]
    return Part(
        name=name,
        form=form,
        bytes=round(total),
        bytes_per_record=total / covered,
        lowest=min(*by_shard, total / covered),
        highest=max(*by_shard, total / covered),
    )


def _tar_parts(teacher: TeacherPass, prefix: str, covered: int, shards: int) -> list[Part]:
    """Return the bytes of fields that share one tar per shard: those of their values, and the remainder."""
    points = [
        (shard.rows, sum(_tar_content(teacher.folder / file.path) for file in shard.files))
        for shard in teacher.manifest.shards[1:]
    ]
    whole = _growing_part(f"{prefix}tars", "headers of the tars", points, covered, shards)
    values = [
        _even_part(
            f"{prefix}{spec.name}",
            _form(spec, teacher.num_views),
            covered * teacher.num_views * _values_bytes(spec, spec.dtype),
            covered,
        )
        for spec in teacher.manifest.fields
    ]
    rest = whole.bytes - sum(part.bytes for part in values)
    return [*values, _even_part(whole.name, whole.form, rest, covered)]


def _form(spec: FieldSpec, views: int) -> str:
    shape = list(spec.shape) if views == 1 else [views, *spec.shape]
    return f"{spec.dtype} {shape}"


def _values_bytes(spec: FieldSpec, dtype: str) -> int:
    """Return the bytes of one view of one record in a dtype."""
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(dtype).itemsize


# ---- files ---------------------------------------------------------------------------------------


def _bytes_of(path: AnyPath) -> int:
    """Bytes of a file of a finished store."""
    with open_regular(path) as file:
        return open_size(file)


def _tar_content(path: AnyPath) -> int:
    """Bytes of a tar's members and their headers, without the end of the file."""
    with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _with_end(content: float) -> float:
    """Size of a tar with that content: two empty blocks, then a multiple of tar's record."""
    return ceil((content + 2 * tarfile.BLOCKSIZE) / tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _growing_part(
    name: str,
    form: str,
    points: Sequence[Point],
    records: int,
    shards: int,
    *,
    in_tars: bool = True,
) -> Part:
    """Return a part that grows with the records alone, but for the end of each shard's tar."""
    mean = sum(size for _, size in points) / max(1, sum(count for count, _ in points))
    by_shard = [size / count for count, size in points if count]
    in_a_shard = records / shards
    full = _with_end(mean * in_a_shard) / in_a_shard if in_tars else mean
    return Part(
        name=name,
        form=form,
        bytes=round(full * records),
        bytes_per_record=full,
        lowest=min(by_shard) + full - mean,
        highest=max(by_shard) + full - mean,
    )


def _held_by_index(store: Store) -> int:
    """Bytes of a finished store's index, receipts and manifest with its tables."""
    manifest = store.manifest
    tables = (manifest.index, manifest.keys, manifest.shards.file, manifest.skipped.file)
    receipts = (_bytes_of(receipt_path(store.folder, shard.name)) for shard in store.shards)
    own = _bytes_of(store.folder / MANIFEST_NAME)
    return own + sum(table.bytes for table in tables if table is not None) + sum(receipts)


def _index_point(store: Store, num_shards: int) -> Point:
    """Records and bytes of an index of the first shards."""
    with scratch_folder() as folder, IndexWriter(folder, 1) as writer:
        for shard in store.shards[:num_shards]:
            receipt, _ = read_receipt(receipt_path(store.folder, shard.name), RECEIPT_SCHEMA)
            writer.append(shard.name, shard.split, receipt)
        index, keys = writer.finish()
    return writer.num_records, index.bytes + keys.bytes


_SHARD_BYTES = 3 * 32 + 4 * len(CHECKED_COLUMNS)
"""Bytes of a row of a store's table of shards that do not compress: digests and checksums."""
_PASS_SHARD_BYTES = 2 * 32
_FILE_BYTES = 32 + 4
"""The same for a row of a pass's table, and for each of its files."""


def _table_bytes(folder: RootedPath, table: TableFile[Any], per_shard: int) -> tuple[float, float]:
    """Bytes of a table of shards for each shard, and those of the remainder with the manifest."""
    assert table.file is not None
    size = table.file.bytes + _bytes_of(folder / MANIFEST_NAME)
    return per_shard, max(0, size - per_shard * len(table))


# ---- arithmetic ----------------------------------------------------------------------------------


def _on_a_line(points: Sequence[Point], records: float, files: float) -> float:
    """Return the bytes of `files` files with `records` records in all, by a line through the smallest and the others.

    A line has at least no bytes a record and none a file. Files with equally many records are taken as they are.
    """
    few, few_bytes = points[0]
    others = points[1:] or points
    many = sum(count for count, _ in others) / len(others)
    many_bytes = sum(size for _, size in others) / len(others)
    slope = max(0.0, (many_bytes - few_bytes) / (many - few)) if many > few else 0.0
    slope = min(slope, many_bytes / many)
    return slope * records + (many_bytes - slope * many) * files


def _scaled_part(name: str, form: str, num_bytes: Sequence[Point], sample: Sample) -> Part:
    """Return a part of the data, whose bytes are known, in proportion to the records."""
    records = sum(count for count, _ in num_bytes)
    mean = sum(size for _, size in num_bytes) / records
    by_shard = [size / count for count, size in num_bytes if count]
    return Part(
        name=name,
        form=form,
        bytes=round(mean * sample.whole.records),
        bytes_per_record=mean,
        lowest=min(by_shard),
        highest=max(by_shard),
    )


def _even_part(name: str, form: str, total: float, records: int) -> Part:
    """Return a part whose bytes a record do not vary."""
    each = total / max(1, records)
    return Part(
        name=name,
        form=form,
        bytes=round(total),
        bytes_per_record=each,
        lowest=each,
        highest=each,
    )
