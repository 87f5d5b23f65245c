"""Packing of planned records into a shard of images, or of a table's rows, and its commit marker.

A shard is a tar of the store's own, or an external tar that is indexed in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import google_crc32c

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import RecordError, require
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import count_records
from permafrost.core.records import NO_LABEL, NO_SIZE, Box, Content, Record, Source
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath, RootedPath, user_path
from permafrost.store.commit_markers import WEIGHT, marker_path, marker_table, write_marker
from permafrost.store.deaths import ShardDeaths
from permafrost.store.entries import StoreMismatchError
from permafrost.store.image_decoding import (
    ImageError,
    decode_pixels,
    encode_frame,
    inspect_image,
    orientation_of,
    to_8_bits,
    turn_box,
    turn_mask,
)
from permafrost.store.record_form import ImageForm, RecordForm, RowForm, resize_pixels
from permafrost.store.shard_plan import ShardPlan
from permafrost.store.shards import ShardEntry
from permafrost.store.tars import TarShard
from permafrost.store.thumbnails import write_thumbnails

IMAGES_FOLDER = "images"
_MAX_MASK_DISTORTION = 0.02
NAMED_REASONS = 50
"""Largest number of damaged records that an error names; the others are counted."""
_BOX_TOLERANCE = 2.0
"""Tolerance in pixels."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Conversion of records to members of a shard."""

    columns: tuple[str, ...] | None = None
    """Columns of a table, whose rows are stored as they are; None packs images with the other options."""
    form: Literal["original", "jpeg95", "raw"] = "original"
    size: tuple[int, int] | None = None
    """(height, width) of re-encoded frames."""
    on_error: Literal["stop", "skip"] = "stop"
    bit_range: tuple[int, ...] = ()
    """Values of images of 16 bits that are black and white; empty keeps such files."""
    boxes_of: Literal["upright", "stored"] = "upright"
    """Image whose pixels boxes and masks count."""

    def describe(self) -> dict[str, Any]:
        """Return the options that determine a shard's bytes, for its commit marker."""
        if self.columns is not None:
            return {"columns": list(self.columns)}
        size = None if self.form == "original" or self.size is None else list(self.size)
        described: dict[str, Any] = {"form": self.form, "size": size}
        if size is not None:
            described["resampling"] = "uint8"
        if self.bit_range:
            described["bit_range"] = list(self.bit_range)
        if self.boxes_of != "upright":
            described["boxes_of"] = self.boxes_of
        return described

    @property
    def record_form(self) -> type[RecordForm]:
        """Form of the packed records."""
        return ImageForm if self.columns is None else RowForm


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """Record that is ready to be written."""

    record: Record
    """Record with normalized boxes."""
    content: Content
    """Stored content: the source's bytes, or the re-encoded frame."""
    height: int
    """Height of the original, upright image, `width` likewise; NO_SIZE for a table's row."""
    width: int
    orientation: int = 1
    """EXIF orientation of the original pixels."""
    thumbnail: bytes = b""
    """As in UprightImage; empty for a table's row."""


def write_image_shard(
    store: RootedPath,
    plan: ShardPlan,
    source: Source,
    packing: Packing,
    dataset_fingerprint: str,
    committed: str | None = None,
) -> ShardEntry:
    """Write one shard's tar and then its commit marker; for a referenced tar only the commit marker.

    Args:
        store: Folder of the store.
        plan: Shard to write.
        source: Source of the records.
        packing: Form in which records are stored.
        dataset_fingerprint: Fingerprint of the dataset, for the commit marker.
        committed: SHA-256 of the shard's file in the committed store; None if the store was not committed.

    Raises:
        DamagedRecordsError: If records cannot be packed and `packing.on_error` is stop.
        PoisonRecordError: If a record ends the processes that work on it.
        StoreMismatchError: If the shard's file would differ from the committed one. Nothing is replaced then.
    """
    skipped: list[dict[str, str]] = []
    records = {record.key: record for record in plan.records}
    with ShardDeaths(store, plan.name) as deaths:
        deaths.find_cause(list(records), partial(_pack_alone, source, records, packing))
        images = _packed_images(records.values(), source, packing, skipped)
        index = _index_in_place if plan.reference is not None else _write_tar
        thumbnails: list[bytes] = []
        rows, file = index(store, plan, _with_thumbnails(images, thumbnails), committed)
        if packing.columns is None:
            write_thumbnails(store, plan.name, thumbnails)
        entry = ShardEntry(
            name=plan.name,
            split=plan.split,
            records=len(rows),
            keys_sha256=sha256_keys([row["key"] for row in rows]),
            referenced=plan.reference is not None,
            **file,
        )
        write_marker(
            marker_path(store, plan.name),
            marker_table(rows),
            {
                "entry": asdict(entry),
                "planned_keys_sha256": sha256_keys(list(records)),
                "packing": packing.describe(),
                "dataset_fingerprint": dataset_fingerprint,
                "skipped": skipped,
            },
        )
    return entry


def _pack_alone(
    source: Source, records: Mapping[str, Record], packing: Packing, key: str
) -> PackedImage:
    return pack_image(source, records[key], packing)


def pack_image(source: Source, record: Record, packing: Packing) -> PackedImage:
    """Read and check a record's bytes, an image's to its last pixel.

    Raises:
        ImageError: If an image, its mask or a box is damaged; RowError for a table. The message names the record and
            its file.
    """
    try:
        content = source.read(record)
        if packing.columns is not None:
            return PackedImage(record=record, content=content, height=NO_SIZE, width=NO_SIZE)
        height, width, orientation, thumbnail = inspect_image(content.image)
        record, content = upright_regions(record, content, packing.boxes_of, height, width)
        bit_range = packing.bit_range
        if bit_range and (image := to_8_bits(content.image, *bit_range)) is not None:
            content = replace(content, image=image, suffix="png", offset=-1)
    except (RecordError, OSError) as error:
        raise packing.record_form.failure(
            f"record {record.key} ({source.where(record)}): {error}"
        ) from error
    if packing.form != "original":
        content = _reencode(content, packing)
    return PackedImage(
        record=record,
        content=content,
        height=height,
        width=width,
        orientation=orientation,
        thumbnail=thumbnail,
    )


class RegionError(ImageError):
    """Box or mask that does not fit its image."""


def upright_regions(
    record: Record, content: Content, boxes_of: str, height: int, width: int
) -> tuple[Record, Content]:
    """Return a record and its content with boxes in [-1, 1] and a mask of the upright image.

    Args:
        record: The record.
        content: Its image and mask.
        boxes_of: Option data.boxes_of.
        height: Height of the upright image in pixels, `width` likewise.
        width: Width of the upright image in pixels.

    Raises:
        RegionError: If a box or the mask does not fit the image.
    """
    if boxes_of == "stored" and (record.boxes or content.mask is not None):
        record, content = _turn_regions(record, content, height, width)
    if content.mask is not None:
        _check_mask(content.mask, height, width)
    if record.boxes_in_pixels:
        boxes = tuple(_normalize(box, height, width) for box in record.boxes)
        record = replace(record, boxes=boxes, boxes_in_pixels=False)
    return record, content


def _turn_regions(
    record: Record, content: Content, height: int, width: int
) -> tuple[Record, Content]:
    """Turn boxes and the mask of the stored pixels as the EXIF orientation turns the image of this upright size."""
    if (orientation := orientation_of(content.image)) == 1:
        return record, content
    boxes = []
    for box in record.boxes:
        x0, y0, x1, y1 = turn_box((box.x0, box.y0, box.x1, box.y1), orientation, height, width)
        boxes.append(replace(box, x0=x0, y0=y0, x1=x1, y1=y1))
    mask = None if content.mask is None else turn_mask(content.mask, orientation)
    return replace(record, boxes=tuple(boxes)), replace(content, mask=mask, mask_offset=-1)


def _check_mask(mask: bytes, height: int, width: int) -> None:
    """Raise RegionError unless the mask decodes and has the proportions of its upright image."""
    try:
        mask_height, mask_width, *_ = inspect_image(mask)
    except ImageError as error:
        raise RegionError(f"its mask {error}") from error
    require(
        abs(mask_height * width - mask_width * height)
        <= _MAX_MASK_DISTORTION * height * mask_width,
        f"its mask has {mask_width}x{mask_height} pixels, which do not have the proportions of the upright "
        f"image of {width}x{height}",
        RegionError,
    )


class DamagedRecordsError(RecordError):
    """Records of one shard that cannot be packed, all of them."""

    def __init__(self, count: int, reasons: list[str]) -> None:
        super().__init__(f"{count} records: {'; '.join(reasons)}")
        self.count, self.reasons = count, reasons
        """Reasons of the first ones."""


def _packed_images(
    records: Iterable[Record],
    source: Source,
    packing: Packing,
    skipped: list[dict[str, str]],
) -> Iterator[PackedImage]:
    """Yield the records that can be packed.

    Raises:
        DamagedRecordsError: After the last record, for those that cannot be packed.
    """
    reasons: list[str] = []
    count = 0
    for record in records:
        check_interrupted()
        count_records(1)
        try:
            image = pack_image(source, record, packing)
        except RecordError as error:
            count += 1
            if packing.on_error == "skip":
                skipped.append({"key": record.key, "reason": str(error)})
            elif len(reasons) < NAMED_REASONS:
                reasons.append(str(error))
            continue
        if not reasons:
            yield image
    if reasons:
        raise DamagedRecordsError(count, reasons)


def _with_thumbnails(
    images: Iterator[PackedImage], thumbnails: list[bytes]
) -> Iterator[PackedImage]:
    for image in images:
        thumbnails.append(image.thumbnail)
        yield image


def _reencode(content: Content, packing: Packing) -> Content:
    import torch

    from permafrost.store.frames import decode_mask

    assert packing.size is not None
    pixels = resize_pixels(decode_pixels(content.image), packing.size)
    image, suffix = encode_frame(torch.from_numpy(pixels).permute(2, 0, 1), packing.form)
    if (mask := content.mask) is not None:
        from torchvision.io import encode_png

        mask = encode_png(decode_mask(mask, packing.size)).numpy().tobytes()
    return replace(content, image=image, suffix=suffix, mask=mask)


def _normalize(box: Box, height: int, width: int) -> Box:
    """Scale a box to [-1, 1]; coordinates beyond the edge by rounding are clipped."""
    for name, value, end in (
        ("x0", box.x0, width),
        ("x1", box.x1, width),
        ("y0", box.y0, height),
        ("y1", box.y1, height),
    ):
        require(
            -_BOX_TOLERANCE <= value <= end + _BOX_TOLERANCE,
            f"its box has {name}={value:g}, beyond the upright image of {width}x{height} pixels",
            RegionError,
        )
    x0, x1 = (min(max(2 * x / width - 1, -1), 1) for x in (box.x0, box.x1))
    y0, y1 = (min(max(2 * y / height - 1, -1), 1) for y in (box.y0, box.y1))
    return replace(box, x0=x0, y0=y0, x1=x1, y1=y1)


def require_same_shard(path: AnyPath, shard: str, actual: str, committed: str | None) -> None:
    """Check that a shard's file is the one that the store was committed with.

    Args:
        path: File of the shard, for the message.
        shard: Name of the shard.
        actual: SHA-256 of the file now.
        committed: Its SHA-256 at that time; None for a store that was never committed.

    Raises:
        StoreMismatchError: If it is another file.
    """
    require(
        committed in (None, actual),
        f"{path} (shard {shard}) would have other bytes than in the committed store, on which teacher "
        "passes depend: restore that file or the data, or choose another store.path",
        StoreMismatchError,
    )


def _write_tar(
    store: RootedPath, plan: ShardPlan, images: Iterator[PackedImage], committed: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    path = f"{IMAGES_FOLDER}/{plan.name}.tar"
    rows = []
    with file_at(store / path).open_atomically() as file, TarShard(file) as tar:
        for row, image in enumerate(images):
            key, content = image.record.key, image.content
            offset = tar.add(key, content.suffix, content.image)
            if image.record.label != NO_LABEL:
                tar.add(key, "cls", str(image.record.label).encode())
            mask_offset = tar.add(key, "mask.png", content.mask) if content.mask is not None else -1
            rows.append(_row(plan, row, image, offset, mask_offset))
        tar.close()
        require_same_shard(store / path, plan.name, file.sha256, committed)
    return rows, {"path": path, "bytes": file.bytes, "sha256": file.sha256}


def _index_in_place(
    store: RootedPath, plan: ShardPlan, images: Iterator[PackedImage], committed: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert plan.reference is not None
    path = user_path(plan.reference)
    rows = [
        _row(plan, row, image, image.content.offset, image.content.mask_offset)
        for row, image in enumerate(images)
    ]
    digest = file_at(path).sha256()
    require_same_shard(path, plan.name, digest, committed)
    return rows, {"path": plan.reference, "bytes": file_at(path).size(), "sha256": digest}


def _row(
    plan: ShardPlan, row: int, image: PackedImage, offset: int, mask_offset: int
) -> dict[str, Any]:
    """Return a record's row of the commit marker."""
    record, content = image.record, image.content
    return {
        "key": record.key,
        "split": record.split,
        "shard": plan.name,
        "row": row,
        "offset": offset,
        "size": len(content.image),
        "mask_offset": mask_offset,
        "mask_size": len(content.mask or b""),
        "height": image.height,
        "width": image.width,
        "orientation": image.orientation,
        "label": record.label,
        "labels": record.labels,
        "group": record.group,
        "boxes": [asdict(box) for box in record.boxes],
        "image_sha256": hashlib.sha256(content.image).hexdigest(),
        "image_crc32c": google_crc32c.value(content.image),
        "mask_crc32c": google_crc32c.value(content.mask or b""),
        **({} if record.weight is None else {WEIGHT.name: record.weight}),
    }
