"""Manifests and tables of a store with changed entries and correct digests, as a stranger could write them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa

from permafrost.storage.files import file_at
from permafrost.store.arrow_files import read_table, write_rows
from permafrost.store.codecs import encode_npy
from permafrost.store.entries import FileEntry
from permafrost.store.shards import SHARDS_NAME


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
    return asdict(
        FileEntry(path=name, bytes=len(data), sha256=file_at(path).sha256(), crc32c=crc32c)
    )


def index_column(store: Path, name: str) -> np.ndarray:
    """Column of the index, which may be changed."""
    return np.load(store / load(store)["index"][name]["path"])


def sign_index(store: Path, **columns: np.ndarray | bytes) -> None:
    """Write columns of the index, or the bytes of their files, and the manifest that names them."""
    values = load(store)
    for name, column in columns.items():
        path = store / values["index"][name]["path"]
        path.unlink()  # a mapped file must not change
        path.write_bytes(column if isinstance(column, bytes) else encode_npy(column))
        values["index"][name] = file_entry(store, values["index"][name]["path"])
    sign(store, values)
