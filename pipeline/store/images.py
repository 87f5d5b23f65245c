"""Image shards: plain tars that any WebDataset reader opens, read here by offset."""

from __future__ import annotations

import hashlib
import io
import mmap
import tarfile
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from PIL import Image

from pipeline.errors import UserError
from pipeline.records import NO_LABEL
from pipeline.store.files import HashingFile, open_atomically, sha256_keys
from pipeline.store.index import IndexRow, index_table, write_table
from pipeline.store.manifest import REPAIR, ManifestError, ShardEntry

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.records import Content, Record
    from pipeline.sources import Source
    from pipeline.store.plan import ShardPlan

IMAGES_FOLDER = "images"
RECEIPTS_FOLDER = "receipts"


class ImageError(UserError, ValueError):
    """An image that cannot be decoded."""


def write_image_shard(
    store: Path, plan: ShardPlan, source: Source, dataset_fingerprint: str
) -> ShardEntry:
    """Write one shard's tar and then, as its commit, its receipt."""
    path = f"{IMAGES_FOLDER}/{plan.name}.tar"
    with open_atomically(store / path) as file, TarShard(file) as tar:
        rows = [
            _add_record(tar, plan.name, row, record, source.read(record))
            for row, record in enumerate(plan.records)
        ]
    entry = ShardEntry(
        name=plan.name,
        split=plan.split,
        records=len(rows),
        path=path,
        bytes=file.bytes,
        sha256=file.sha256,
        keys_sha256=sha256_keys([record.key for record in plan.records]),
    )
    write_table(
        receipt_path(store, plan.name),
        index_table(rows),
        asdict(entry) | {"dataset_fingerprint": dataset_fingerprint},
    )
    return entry


def receipt_path(folder: Path, shard: str) -> Path:
    """Where a shard's receipt lies in a store or a pass."""
    return folder / RECEIPTS_FOLDER / f"{shard}.parquet"


def _add_record(tar: TarShard, shard: str, row: int, record: Record, content: Content) -> IndexRow:
    width, height = image_size(content.image, record.key)
    offset = tar.add(f"{record.key}.{content.suffix}", content.image)
    if record.label != NO_LABEL:
        tar.add(f"{record.key}.cls", str(record.label).encode())
    mask_offset = -1
    if content.mask is not None:
        mask_offset = tar.add(f"{record.key}.mask.png", content.mask)
    return IndexRow(
        record=record,
        shard=shard,
        row=row,
        offset=offset,
        size=len(content.image),
        mask_offset=mask_offset,
        mask_size=len(content.mask or b""),
        height=height,
        width=width,
        image_sha256=hashlib.sha256(content.image).hexdigest(),
    )


class TarShard:
    """A tar whose bytes depend on its members alone: no times, owners or modes of this machine."""

    def __init__(self, file: HashingFile) -> None:
        self._tar = tarfile.open(  # noqa: SIM115, closed by __exit__
            fileobj=cast("io.BytesIO", file), mode="w", format=tarfile.PAX_FORMAT
        )

    def __enter__(self) -> TarShard:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._tar.close()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its data in the file."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o444
        self._tar.addfile(member, io.BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return self._tar.offset - blocks * tarfile.BLOCKSIZE


# ---- reading -------------------------------------------------------------------------------------


class ShardBytes:
    """A shard's tar, mapped into memory: bytes by offset, without parsing."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing; {REPAIR}") from None
        self.path = path

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        data = self._map[offset : offset + size]
        if len(data) != size:
            raise ManifestError(f"{self.path} ends before byte {offset + size}; run stages.verify")
        return data


def image_size(data: bytes, key: str) -> tuple[int, int]:
    """(width, height) of an image that decodes to its last byte."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"record {key} cannot be decoded: {error}") from error
