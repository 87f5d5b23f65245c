"""Small files that claim to be enormous, and what reading them takes.

Each bomb changes a sound store, or is a source of records. Its digests are correct, as those of a stranger's store
would be. A process that has read the sound store forks, and its child reads the bomb.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.config.options import resolve_implementation
from permafrost.core.errors import UserError
from permafrost.sources.source import build_source
from permafrost.store.codecs import npy_header
from permafrost.store.image_shards import Packing, pack_image
from permafrost.store.shards import PassShardTable, ShardTable
from permafrost_exchange.format_options import ArraysConfig, EmbeddingsConfig, ListColumnsConfig
from permafrost_exchange.target_reader import ReadRequest, reading
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.signing import (
    file_entry,
    index_column,
    load,
    load_shards,
    pass_folder,
    sign,
    sign_index,
    sign_shards,
)
from tests.support.store_kinds import read_everything

GIGABYTE = 10**9
_BLOCK = 2**23
"""Boxes of a list in the index."""
_SIDE = 30_000
_JPEG_HEADER = b"\xff\xd8" + bytes.fromhex(
    f"ffc0 0011 08 {_SIDE:04x} {_SIDE:04x} 03 012200 021101 031101 ffda 000c 03 0100 0211 0311 003f00"
)
"""Header of a JPEG with three components, without tables and pixels."""


@dataclass(frozen=True)
class Bomb:
    """Case of the table."""

    name: str
    build: Callable[[Path], None]
    """Function that changes the sound store in a folder, or makes a source there."""
    reads: str
    """`store`, or the kind of the source."""
    message: str
    """Part of the error."""
    takes_seconds: bool = False
    """True if `make test` leaves it out."""


@dataclass(frozen=True)
class Outcome:
    """Error, time and memory of reading a bomb."""

    name: str
    error: str
    """Text of the UserError; the class and the text of any other; empty without an error."""
    seconds: float
    megabytes: float
    """Peak of the memory above that of the process that had read the sound store."""


# ---- the index -----------------------------------------------------------------------------------


def index_of_gigabytes(store: Path) -> None:
    header = npy_header("|u1", (6 * GIGABYTE,))
    sign_index(store, key=header + bytes(100))


def lists_of_gigabytes(store: Path) -> None:
    """Each second record has all boxes."""
    offsets = index_column(store, "boxes_offsets")
    offsets[1::2] = offsets[-1] = _BLOCK
    sign_index(store, boxes_offsets=offsets, boxes=np.zeros((_BLOCK, 5), np.float32))


def image_of_gigabytes(store: Path) -> None:
    shards = load_shards(store, ShardTable.schema)
    os.truncate(store / shards[0]["path"], 6 * GIGABYTE)
    shards[0]["bytes"] = 6 * GIGABYTE
    sign_shards(store, shards, ShardTable.schema)
    offsets, sizes = index_column(store, "offset"), index_column(store, "size")
    offsets[0], sizes[0] = 0, 6 * GIGABYTE
    sign_index(store, offset=offsets, size=sizes)


def jpeg_of_gigapixels(store: Path) -> None:
    """The first image of the store is the beginning of a JPEG with another size in its header."""
    import google_crc32c

    shards = load_shards(store, ShardTable.schema)
    offset, size = (int(index_column(store, name)[0]) for name in ("offset", "size"))
    with (store / shards[0]["path"]).open("r+b") as file:
        data = _JPEG_HEADER.ljust(size, b"\0")
        file.seek(offset)
        file.write(data)
    checksums = index_column(store, "image_crc32c")
    checksums[0] = google_crc32c.value(data)
    sign_index(store, image_crc32c=checksums)


def _with_size(jpeg: bytes) -> bytes:
    """Replace height and width in the header of a baseline JPEG."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + _SIDE.to_bytes(2, "big") * 2 + jpeg[at + 4 :]


# ---- tables and manifests ------------------------------------------------------------------------


def _write_shards(folder: Path, table: pa.Table, times: int) -> None:
    values = load(folder)
    path = folder / values["shards"]["path"]
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(times):
            writer.write_table(table)
    sign(folder, values | {"shards": file_entry(folder, path.name)})


def table_of_many_rows(store: Path) -> None:
    row = load_shards(store, ShardTable.schema)[0]
    _write_shards(store, pa.Table.from_pylist([row] * 5_000, ShardTable.schema), 100)


def table_of_repeated_names(store: Path) -> None:
    row = load_shards(store, ShardTable.schema)[0] | {"split": "x" * 10**6}
    _write_shards(store, pa.Table.from_pylist([row] * 40, ShardTable.schema), 3)


def table_of_repeated_paths(store: Path) -> None:
    folder = pass_folder(store)
    row = load_shards(folder, PassShardTable.schema)[0]
    row["files"] = [row["files"][0] | {"path": "x" * 10**6}]
    _write_shards(folder, pa.Table.from_pylist([row] * 40, PassShardTable.schema), 3)


def table_of_gigabytes(store: Path) -> None:
    values = load(store)
    os.truncate(store / values["shards"]["path"], 6 * GIGABYTE)
    sign(store, values | {"shards": values["shards"] | {"bytes": 6 * GIGABYTE}})


def manifest_of_gigabytes(store: Path) -> None:
    os.truncate(store / "manifest.json", 6 * GIGABYTE)


def manifest_of_brackets(store: Path) -> None:
    sign(store, load(store) | {"classes": [[]] * 200_000})


def manifest_of_a_large_frame(store: Path) -> None:
    values = load(store)
    sign(store, values | {"canonical": values["canonical"] | {"height": 9_000, "width": 9_000}})


def manifest_of_a_large_field(store: Path) -> None:
    folder = pass_folder(store)
    values = load(folder)
    fields = [
        f | {"shape": [3, 20_000, 20_000]} if f["name"] == "map" else f for f in values["fields"]
    ]
    sign(folder, values | {"fields": fields})


def chunk_of_gigabytes(store: Path) -> None:
    folder = pass_folder(store)
    shards = load_shards(folder, PassShardTable.schema)
    file = shards[0]["files"][0]
    os.truncate(folder / file["path"], 6 * GIGABYTE)
    file["bytes"] = 6 * GIGABYTE
    sign_shards(folder, shards, PassShardTable.schema)


# ---- sources -------------------------------------------------------------------------------------


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tar(folder: Path, *members: tuple[str, int | bytes]) -> None:
    """Write a tar whose members of a given size are holes."""
    folder.mkdir()
    with (folder / "train-000000.tar").open("wb") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            if name.startswith("pax"):
                info.type = tarfile.XHDTYPE
            file.write(
                info.tobuf(tarfile.USTAR_FORMAT if info.size < 8 * 2**30 else tarfile.GNU_FORMAT)
            )
            if isinstance(content, bytes):
                file.write(content)
                file.seek(-len(content) % tarfile.BLOCKSIZE, os.SEEK_CUR)
            else:
                file.seek(content + -content % tarfile.BLOCKSIZE, os.SEEK_CUR)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def tar_of_an_image_of_gigabytes(folder: Path) -> None:
    _tar(folder, ("a.jpg", 6 * GIGABYTE), ("a.cls", b"0"))


def tar_of_a_label_of_gigabytes(folder: Path) -> None:
    _tar(folder, ("a.jpg", _jpeg()), ("a.cls", 6 * GIGABYTE))


def tar_of_a_header_of_gigabytes(folder: Path) -> None:
    _tar(folder, ("pax", 3 * GIGABYTE), ("a.jpg", _jpeg()), ("a.cls", b"0"))


def folder_of_a_file_of_gigabytes(folder: Path) -> None:
    (folder / "cat").mkdir(parents=True)
    with (folder / "cat" / "a.jpg").open("wb") as file:
        file.truncate(6 * GIGABYTE)


def folder_of_gigapixels(folder: Path) -> None:
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.jpg").write_bytes(_with_size(_jpeg()))


# ---- targets -------------------------------------------------------------------------------------


def npz_of_zeros(folder: Path) -> None:
    folder.mkdir()
    rows = 2 * 10**7
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 10)}
    )
    with (
        zipfile.ZipFile(folder / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("logits.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(rows // 10**6):
            member.write(bytes(4 * 10**7))


def _write_groups(path: Path, table: pa.Table, times: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(times):
            writer.write_table(table)


def parquet_of_long_lists(folder: Path, column: str = "logits") -> None:
    zeros = pa.array(np.zeros(3 * 10**6))
    lists = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)
    _write_groups(folder / "t.parquet", pa.table({"key": ["a"], column: lists}), 72)


def _long_names(count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), ["x" * 100_000])


def parquet_of_long_names(folder: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20_000, np.float16)), 1)
    table = pa.table({"key": _long_names(20_000), "logits": lists})
    _write_groups(folder / "t.parquet", table, 1)


def parquet_of_long_plain_names(folder: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2000, np.float16)), 1)
    table = pa.table({"key": _long_names(2000).dictionary_decode(), "logits": lists})
    _write_groups(folder / "t.parquet", table, 8)


def parquet_of_equal_pictures(folder: Path) -> None:
    data = pa.array([bytes(10**7)], pa.binary())
    pictures = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10, np.int32)), data)
    table = pa.table({"image": pictures.dictionary_decode(), "label": ["a"] * 10})
    _write_groups(folder / "t.parquet", table, 30)


def _equal_names() -> pa.Array:
    indices = pa.array(np.zeros(10**6, np.int32))
    return pa.DictionaryArray.from_arrays(indices, ["a name of twenty-four"]).dictionary_decode()


def parquet_of_equal_names(folder: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(10**6, np.float16)), 1)
    _write_groups(folder / "t.parquet", pa.table({"key": _equal_names(), "logits": lists}), 30)


def embeddings_of_equal_names(folder: Path) -> None:
    table = pa.table({"image_path": _equal_names()})
    _write_groups(folder / "metadata" / "metadata_0.parquet", table, 30)
    (folder / "img_emb").mkdir()
    with (folder / "img_emb" / "img_emb_0.npy").open("wb") as file:
        shape = (3 * 10**7, 4)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        file.truncate(file.tell() + 4 * 4 * shape[0])


TARGETS: dict[str, tuple[type[Any], str]] = {
    "npz": (ArraysConfig, "t.npz"),
    "parquet": (ListColumnsConfig, "t.parquet"),
    "embeddings": (EmbeddingsConfig, ""),
}
"""Options of a format of targets, and the file of it that is read."""


def read_targets(kind: str, folder: Path) -> None:
    """List all targets of a folder, and read the first one."""
    cls, name = TARGETS[kind]
    options: dict[str, Any] = {}
    if kind == "parquet":
        dotted = "a.logits" in pq.read_schema(folder / name).names
        options = {"cache": str(folder / "copies")}
        options |= {"fields": {"logits": "a.logits"}} if dotted else {}
    if kind == "npz":
        options = {"join": "position"}
    reader = resolve_implementation(cls)(cls(frame="full", **options), folder / name)
    with reading(str(folder)):
        for _ in reader.listing():
            pass
        numbers = np.zeros(1, np.int64)
        reader.read(ReadRequest(numbers, ["a"], ["a"], numbers, numbers, numbers))


BOMBS = (
    Bomb("column of 6 GB in the index", index_of_gigabytes, "store", "read as npy"),
    Bomb("lists of many GB in the index", lists_of_gigabytes, "store", "contradict the manifest"),
    Bomb("image of 6 GB in a tar of the store", image_of_gigabytes, "store", "that a record can"),
    Bomb("JPEG of 30,000 x 30,000 in the store", jpeg_of_gigapixels, "store", "decompression bomb"),
    Bomb("table of 500,000 shards", table_of_many_rows, "store", "bytes in memory"),
    Bomb("one text of 1 MB in 120 rows", table_of_repeated_names, "store", "bytes in memory"),
    Bomb("one path of 1 MB in 120 files", table_of_repeated_paths, "store", "bytes in memory"),
    Bomb("table of shards of 6 GB", table_of_gigabytes, "store", "6,000,000,000 bytes, more"),
    Bomb("manifest of 6 GB", manifest_of_gigabytes, "store", "6,000,000,000 bytes, more"),
    Bomb("manifest of 200,000 lists", manifest_of_brackets, "store", "lists and mappings"),
    Bomb("frame of 9,000 x 9,000", manifest_of_a_large_frame, "store", "frame of 9000x9000"),
    Bomb("field of 2.4 GB per record", manifest_of_a_large_field, "store", "bytes per record"),
    Bomb("array's chunk of 6 GB", chunk_of_gigabytes, "store", "its fields have at most"),
    Bomb(
        "source: image of 6 GB in a tar",
        tar_of_an_image_of_gigabytes,
        "tar",
        "the image has 6,000,000",
    ),
    Bomb(
        "source: label of 6 GB in a tar", tar_of_a_label_of_gigabytes, "tar", "a.cls has 6,000,000"
    ),
    Bomb(
        "source: PAX header of 3 GB", tar_of_a_header_of_gigabytes, "tar", "a header has 3,000,000"
    ),
    Bomb(
        "source: image file of 6 GB", folder_of_a_file_of_gigabytes, "folder", "6,000,000,000 bytes"
    ),
    Bomb("source: JPEG of 30,000 x 30,000", folder_of_gigapixels, "folder", "decompression bomb"),
    Bomb(
        "targets: 800 MB of zeros in an .npz",
        npz_of_zeros,
        "npz",
        "without compression",
        takes_seconds=True,
    ),
    Bomb(
        "targets: 72 lists of 3,000,000",
        parquet_of_long_lists,
        "parquet",
        "without compression",
        takes_seconds=True,
    ),
    Bomb(
        "targets: 72 lists in a column with a dot",
        partial(parquet_of_long_lists, column="a.logits"),
        "parquet",
        "without compression",
    ),
    Bomb("targets: 20,000 names of 100 kB", parquet_of_long_names, "parquet", "would take"),
    Bomb("targets: 16,000 texts of 100 kB", parquet_of_long_plain_names, "parquet", "would take"),
    Bomb(
        "source: 300 pictures of 10 MB",
        parquet_of_equal_pictures,
        "table",
        "would take",
        takes_seconds=True,
    ),
    Bomb("targets: 30,000,000 names", parquet_of_equal_names, "parquet", "without compression"),
    Bomb(
        "targets: 30,000,000 names of embeddings",
        embeddings_of_equal_names,
        "embeddings",
        "would take",
    ),
)


# ---- reading -------------------------------------------------------------------------------------


def read(bomb: Bomb, path: Path) -> None:
    """Read all of a store, or list a source and pack its records."""
    if bomb.reads == "store":
        read_everything(path)
        return
    if bomb.reads in TARGETS:
        read_targets(bomb.reads, path)
        return
    kinds: dict[str, type[Any]] = {"tar": WebDatasetDataConfig, "folder": ImageFolderDataConfig}
    if bomb.reads == "table":
        config: Any = ImageTableDataConfig(
            path=str(path / "t.parquet"), image="image", cache=str(path / "copies")
        )
    else:
        config = kinds[bomb.reads](path=str(path))
    source = build_source(config)
    for record in source.records():
        pack_image(source, record, Packing())


def explode(bomb: Bomb, sound: Path, folder: Path) -> Outcome:
    """Build a bomb and read it, each in a process of its own."""
    path = folder / "bomb"
    if bomb.reads == "store":
        shutil.copytree(sound, path)

    def build() -> None:
        bomb.build(path)

    def measure() -> dict[str, Any]:
        error, before, started = "", _peak_megabytes(), time.monotonic()
        try:
            read(bomb, path)
        except UserError as raised:
            error = str(raised)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        seconds = time.monotonic() - started
        return {"error": error, "seconds": seconds, "megabytes": _peak_megabytes() - before}

    try:
        _forked(build)
        return Outcome(name=bomb.name, **_forked(measure))
    finally:
        shutil.rmtree(path)


def _forked(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(function()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123, a descriptor
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(text)


def _peak_megabytes() -> float:
    """Highest memory of this process so far; that of a new one is what it has in common with its parent."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 10**6


def read_sound(sound: Path, folder: Path) -> None:
    """Read the sound store and a sound source, so that what these import and take is not counted."""
    read_everything(sound)
    plain = folder / "photos" / "cat"
    plain.mkdir(parents=True)
    (plain / "a.jpg").write_bytes(_jpeg())
    read(Bomb("", folder_of_gigapixels, "folder", ""), plain.parent)
