"""Manifests and tables of a store with changed entries and correct digests, as a stranger could write them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa

from permafrost.storage.files import sha256_file
from permafrost.store.arrow_files import read_table, write_rows
from permafrost.store.entries import FileEntry
from permafrost.store.index import CHECKED_COLUMNS, INDEX_NAME, INDEX_SCHEMA, checksum
from permafrost.store.reader import Store
from permafrost.store.shards import SHARDS_NAME, ShardTable


def load(folder: Path) -> dict:
    values = json.loads((folder / "manifest.json").read_text())
    del values["self_sha256"]
    return values


def sign(folder: Path, values) -> None:
    """Write a manifest with the correct digest of its text."""
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    opening, _, rest = text.partition("\n")
    (folder / "manifest.json").write_text(f'{opening}\n "self_sha256": "{digest}",\n{rest}')


def load_shards(folder: Path, schema: pa.Schema) -> list[dict]:
    """Rows of the table of shards."""
    return read_table(folder / load(folder)["shards"]["path"], schema).to_pylist()


def sign_shards(folder: Path, rows: list[dict], schema: pa.Schema, values=None) -> None:
    """Write a table of shards, and the manifest that names it, with correct digests."""
    values = values or load(folder)
    (folder / values["shards"]["path"]).unlink()
    with write_rows(folder / SHARDS_NAME, schema) as table:
        for row in rows:
            table.append(**row)
    sign(folder, values | {"shards": asdict(table.file)})


def pass_folder(store: Path) -> Path:
    (folder,) = (store / "teachers").iterdir()
    return folder


def file_entry(folder: Path, name: str) -> dict:
    """Entry of a manifest for a file as it is."""
    path = folder / name
    data = path.read_bytes()
    crc32c = google_crc32c.value(data)
    return asdict(FileEntry(path=name, bytes=len(data), sha256=sha256_file(path), crc32c=crc32c))


def index_columns(store: Path) -> dict[str, pa.Array]:
    """Columns of the index."""
    batch = pa.ipc.open_file(store / INDEX_NAME).get_batch(0)
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def write_index(store: Path, columns: dict[str, pa.Array], **options) -> None:
    """Write the index with other columns, and the manifest that names it. options  of pa.ipc.IpcWriteOptions"""
    batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=INDEX_SCHEMA)
    with pa.ipc.new_file(
        store / INDEX_NAME, batch.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        writer.write_batch(batch)
    sign(store, load(store) | {"index": file_entry(store, INDEX_NAME)})


def sign_index(store: Path, **numbers: np.ndarray) -> None:
    """Write the index with other numbers, with correct checksums in the table of shards."""
    starts = Store(store).shards.starts
    columns = index_columns(store)
    shards = load_shards(store, ShardTable.schema)
    for name, values in numbers.items():
        columns[name] = pa.array(values, columns[name].type)
        for number, shard in enumerate(shards):
            part = columns[name].to_numpy()[starts[number] : starts[number + 1]]
            shard["index_crc32c"][CHECKED_COLUMNS.index(name)] = checksum(iter([part]))
    write_index(store, columns)
    sign_shards(store, shards, ShardTable.schema)
