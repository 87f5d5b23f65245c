"""A pass as files for others, without its images: tars of all fields, embeddings, or a Hugging Face data set.

    share.json                 what the pass is, and the SHA-256 of every file (share_format.py)
    records.parquet, targets/  form=webdataset
    img_emb/, metadata/        form=embeddings
    data/<split>-*.parquet     form=huggingface
    plugins/                   code of an explainer of the user's
    README.md                  a card: teacher, weights, outputs, views, fidelity, licenses

The files are written into a hidden folder inside of `to` and moved to their places once all are there, share.json last.
A repeat of the command first removes what an interrupted one has left. So a folder with share.json has no file of an
interrupted call, of another pass or of another form.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import packages_distributions, version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.config.explainers import EXPLAINERS
from permafrost.config.plugins import plugin_places
from permafrost.config.version import __version__
from permafrost.core.digests import SHORT, sha256_json
from permafrost.core.errors import ConfigError, FileError, require
from permafrost.core.json_entries import EntryError
from permafrost.core.progress import progress
from permafrost.core.records import NO_LABEL
from permafrost.storage.files import file_at
from permafrost.storage.lock import LOCK_NAME, folder_lock
from permafrost.storage.rooted_paths import names_in
from permafrost.storage.signed_files import DigestError, check_json, sign_json
from permafrost.store.codecs import decode_scaled, encode_npy
from permafrost.store.fields import Values
from permafrost.store.frames import ShardFrames
from permafrost.store.image_decoding import picture_suffix, png_of
from permafrost.store.manifest import PassManifest, check_files
from permafrost.store.projections import open_projection
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry
from permafrost.store.tars import ShardBytes, TarShard
from permafrost_exchange.options import ShareConfig
from permafrost_exchange.pass_card import card_of_pass, dataset_name
from permafrost_exchange.share_format import (
    EXPLAINER_PACKAGE,
    PLUGINS_FOLDER,
    SHARE_NAME,
    SHARE_SCHEMA,
    SHARED_RECORDS,
    SHARED_RECORDS_SCHEMA,
    TARGETS_FOLDER,
    Share,
)
from permafrost_exchange.target_reader import Item

logger = logging.getLogger("permafrost.share")

_PARTS_ROWS = 65_536
_STAGING = ".permafrost-share"
"""Folder inside of `to` in which files are written."""


@dataclass(frozen=True, kw_only=True)
class SharedPass:
    """A pass that was written for others."""

    folder: Path
    records: int
    bytes: int
    files: int
    plugin: str
    """Path of the code of its explainer in the folder, empty for an installed one."""


def open_shared_pass(config: ShareConfig) -> tuple[Store, TeacherPass]:
    """Open the pass that the options name, of stored views or not.

    Raises:
        StoreMismatchError: If the store has no such pass, or several.
    """
    store = Store(config.store.folder)
    names = config.store.teacher
    require(len(names) <= 1, f"pass={list(names)}: share writes one pass; name it")
    has_views = bool(names and store.passes_named(names[0], stored_views=True))
    has_views = has_views or (not names and not store.pass_folders())
    (opened,) = store.open_passes(names, stored_views=has_views)
    store = store.part(0, opened.num_generations)
    return store.known_to(store.manifest.classes_of(opened.num_classes)), opened


def share_pass(config: ShareConfig, store: Store, shared: TeacherPass, folder: Path) -> SharedPass:
    """Write a pass into a new folder.

    Raises:
        ConfigError: If the folder has other files, or the pass does not have what the form needs.
    """
    require(
        not config.images or store.form.has_places,
        "images=true: the store has rows of a table, and no images",
    )
    names = [spec.name for spec in shared.manifest.fields]
    require(
        config.form != "embeddings" or "pooled" in names,
        f"form=embeddings writes the field pooled, and {shared.name} has {', '.join(names)}; choose "
        "form=webdataset or huggingface",
    )
    require(
        config.form != "embeddings" or shared.num_views == 1,
        f"form=embeddings has one embedding per image, and {shared.name} has {shared.num_views} views",
    )
    _check_folder(folder, shared)
    if config.keys:
        logger.info(
            "the share names records by their keys, which are names of files, such as %s; keys=false writes numbers",
            unquote(store.index.keys(range(1))[0]),
        )
    write = {
        "webdataset": _write_tars,
        "embeddings": _write_embeddings,
        "huggingface": _write_tables,
    }[config.form]
    records = shared.shards.num_rows
    staging = folder / _STAGING
    is_new = not folder.exists()
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"to={folder} cannot be written ({error.strerror})") from error
    with folder_lock(staging, "to"):
        _remove_interrupted(staging, folder)
        try:
            plugin, package = _copy_explainer(shared, staging)
            with progress(f"share {shared.name}", total=records, unit="record") as display:
                write(config, store, shared, staging, display)
            text = card_of_pass(store, shared, config, plugin)
            file_at(staging / "README.md").write(text.encode())
            paths = sorted(
                path for path in staging.rglob("*") if path.is_file() and path.name != LOCK_NAME
            )
            files = {path.relative_to(staging).as_posix(): file_at(path).sha256() for path in paths}
            size = sum(path.stat().st_size for path in paths)
            described = _describe(config, store, shared, files)
            described["made_with"] |= package
            file_at(staging / SHARE_NAME).commit(sign_json(described, sort_keys=True))
        except Exception:
            _remove_interrupted(staging, folder)
            shutil.rmtree(staging)
            if is_new:
                folder.rmdir()
            raise
        _check_folder(folder, shared)
        _publish(staging, folder, [*files, SHARE_NAME])
        shutil.rmtree(staging)
    return SharedPass(
        folder=folder,
        records=records,
        bytes=size,
        files=len(files) + 1,
        plugin=plugin,
    )


def _copy_explainer(shared: TeacherPass, folder: Path) -> tuple[str, dict[str, str]]:
    """Copy the code of an explainer of the user's, or name the installed package that has it.

    Returns:
        Path of the code in the folder, empty for installed ones, and entries of `made_with`.

    Raises:
        ConfigError: If the explainer is not known here.
    """
    if (kind := shared.manifest.explainer.get("kind")) is None:
        return "", {}
    require(
        kind in EXPLAINERS,
        f"pass {shared.name} has maps of explainer {kind}; name its plug-in with plugins=, whose code is shared, too",
    )
    top = EXPLAINERS[kind].implementation.partition(":")[0].partition(".")[0]
    if (place := plugin_places().get(top)) is None or place.is_dir():
        names = [] if top.startswith("permafrost") else packages_distributions().get(top, [])
        return "", {EXPLAINER_PACKAGE: f"{names[0]} {version(names[0])}"} if names else {}
    file_at(folder / PLUGINS_FOLDER / place.name).write(file_at(place).read())
    return f"{PLUGINS_FOLDER}/{place.name}", {}


def _listed_files(folder: Path) -> list[str]:
    """Return the files that a folder's share.json lists; none if it has none that is sound."""
    try:
        files = check_json(file_at(folder / SHARE_NAME).read()).get("files", {})
        return [SHARE_NAME, *check_files(files)]
    except (DigestError, EntryError, FileNotFoundError, FileError):
        return []


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders in it that they leave empty."""
    for name in names:
        path = folder / name
        path.unlink(missing_ok=True)
        while (path := path.parent) != folder:
            with suppress(OSError):
                path.rmdir()


def _remove_interrupted(staging: Path, folder: Path) -> None:
    """Remove what an interrupted call has written, and what of it was moved to its place already."""
    if not (folder / SHARE_NAME).exists():
        _remove_files(folder, _listed_files(staging))
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def _publish(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Move written files to their places, share.json last, in place of an earlier share of the same pass."""
    _remove_files(folder, reversed(_listed_files(folder)))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == SHARE_NAME:
            file_at(folder / name).commit(file_at(staging / name).read())
        else:
            (staging / name).rename(folder / name)


def _check_folder(folder: Path, shared: TeacherPass) -> None:
    """Raise ConfigError unless a folder is new, empty, or an earlier share of the same pass and nothing else."""
    staging = folder / _STAGING
    for path in (folder, staging):
        is_folder = path.is_dir() or not (path.exists() or path.is_symlink())
        require(is_folder, f"to={path} is a file; name a new folder")
    require(
        not staging.is_symlink()
        and (not staging.is_dir() or (staging / LOCK_NAME).exists() or not any(staging.iterdir())),
        f"to={folder} has a {_STAGING} that permafrost share has not written; name a new folder",
    )
    names = _listed_files(folder)
    waiting = [] if names else _listed_files(staging)
    others = (
        name
        for path in (folder.rglob("*") if folder.is_dir() else ())
        if path.is_symlink() or not path.is_dir()
        if not (name := path.relative_to(folder).as_posix()).startswith(f"{_STAGING}/")
        and name not in (*names, *waiting)
    )
    first = next(others, None)
    require(first is None, f"to={folder} has other files, such as {first}; name a new folder")
    if names:
        before = check_json(file_at(folder / SHARE_NAME).read())
        require(
            before.get("fingerprint") == _fingerprint(shared),
            f"to={folder} is the share of another pass; name a new folder",
        )


def _describe(
    config: ShareConfig, store: Store, shared: TeacherPass, files: dict[str, str]
) -> dict[str, Any]:
    """Return the content of share.json."""
    manifest = shared.manifest
    known = {spec.name for spec in fields(Share)} & {spec.name for spec in fields(PassManifest)}
    of_pass = {name: getattr(manifest, name) for name in known - {"schema", "files"}}
    fingerprint, name = _fingerprint(shared), shared.name.rpartition("-")[0]
    of_pass |= {name: names_in(of_pass[name]) for name in ("teacher", "made_with")}
    of_pass["dataset_fingerprint"] = store.manifest.dataset.fingerprint
    of_pass["store_fingerprint"] = store.manifest.fingerprint
    share = Share(
        schema=SHARE_SCHEMA,
        form=config.form,
        name=f"{name}-{fingerprint[:SHORT]}",
        **{**of_pass, "fingerprint": fingerprint},
        classes=store.manifest.classes,
        dataset=dataset_name(store),
        frame=store.size,
        licenses=dict(config.licenses),
        made_by=f"permafrost {__version__}",
        projected=tuple(manifest.projections),
        files=files,
    )
    return asdict(share)


def _fingerprint(shared: TeacherPass) -> str:
    """Return the fingerprint of a pass, with those of the passes that follow it over further generations."""
    fingerprints = [part.manifest.fingerprint for part in getattr(shared, "parts", [shared])]
    return fingerprints[0] if len(fingerprints) == 1 else sha256_json(fingerprints)


# ---- records -------------------------------------------------------------------------------------


class _SharedShard(NamedTuple):
    """Records of one shard with targets, and their values."""

    entry: ShardEntry
    columns: dict[str, list[Any]]
    """Columns of SHARED_RECORDS_SCHEMA."""
    rows: NDArray[np.int64]
    """Rows of the shard, counted from its beginning."""
    values: Values


def _iter_shards(
    config: ShareConfig, store: Store, shared: TeacherPass, display: Any
) -> Iterator[_SharedShard]:
    for entry in store.shards:
        places = shared.rows_of(entry)
        rows = np.flatnonzero(places >= 0)
        if not len(rows):
            continue
        number = store.shards.number_of(entry.name)
        first = store.rows_of_shard(number).start
        values = {name: array[places[rows]] for name, array in shared.read_shard(entry).items()}
        digests = store.index.image_sha256(number)
        labels = (
            np.full(len(rows), NO_LABEL)
            if store.index.has_many_labels
            else store.index.values("label", first + rows)
        )
        pixels = pixel_digests(store, entry, rows) if config.pixels else [""] * len(rows)
        columns = {
            "key": store.index.keys(first + rows)
            if config.keys
            else [f"{row:08d}" for row in (first + rows).tolist()],
            "split": [entry.split] * len(rows),
            "label": labels.tolist(),
            "shard": [entry.name] * len(rows),
            "image_sha256": [digests[row] for row in rows.tolist()],
            "pixels_sha256": pixels,
        }
        yield _SharedShard(entry, columns, rows, values)
        display.update(len(rows))


def pixel_digests(store: Store, entry: ShardEntry, rows: NDArray[np.int64]) -> list[str]:
    """Return the SHA-256 of the decoded frames u8 [3, H, W] of rows of a shard, each after its shape."""
    frames = ShardFrames(store, entry, rows).read(0, len(rows)).frames
    return [
        hashlib.sha256(repr(tuple(frame.shape)).encode() + frame.numpy().tobytes()).hexdigest()
        for frame in frames
    ]


def _images(store: Store, shard: _SharedShard) -> Iterator[tuple[str, bytes]]:
    """Iterate over the suffix and the bytes of each image; frames that are stored raw are PNG files."""
    opened = ShardBytes(store.folder, shard.entry)
    first = store.rows_of_shard(store.shards.number_of(shard.entry.name)).start
    taken = store.index.take(("offset", "size", "image_crc32c"), first + shard.rows)
    places = zip(*(column.tolist() for column in taken.values()), shard.columns["key"], strict=True)
    for row, place in zip(shard.rows.tolist(), places, strict=True):
        data = opened.read(*place)
        if (suffix := picture_suffix(data[:16])) is None:
            from PIL import Image

            frame = ShardFrames(store, shard.entry, np.array([row])).read(0, 1).frames[0]
            suffix, data = "png", png_of(Image.fromarray(frame.permute(1, 2, 0).numpy()))
        yield suffix, data


# ---- forms ---------------------------------------------------------------------------------------


def _write_tars(
    config: ShareConfig, store: Store, shared: TeacherPass, folder: Path, display: Any
) -> None:
    """Write a tar of each shard, and the table of all records."""
    for name, entry in shared.manifest.projections.items():
        open_projection(shared.folder, shared.manifest, name)  # compares its bytes
        data = file_at(shared.folder / entry.file.path).read()
        file_at(folder / "projections" / f"{name}.npy").write(data)
    with (
        file_at(folder / SHARED_RECORDS).open_atomically() as table,
        pq.ParquetWriter(pa.PythonFile(table, "w"), SHARED_RECORDS_SCHEMA) as writer,
    ):
        for part in _in_parts(_written_tars(config, store, shared, folder, display), len):
            writer.write_table(pa.concat_tables(part))


def _written_tars(
    config: ShareConfig, store: Store, shared: TeacherPass, folder: Path, display: Any
) -> Iterator[pa.Table]:
    """Write the tar of each shard, and iterate over the tables of their records."""
    for shard in _iter_shards(config, store, shared, display):
        with (
            file_at(folder / TARGETS_FOLDER / f"{shard.entry.name}.tar").open_atomically() as file,
            TarShard(file) as tar,
        ):
            images = _images(store, shard) if config.images else iter(())
            for row, key in enumerate(shard.columns["key"]):
                for suffix, data in [next(images)] if config.images else []:
                    tar.add(key, suffix, data)
                for spec in shared.manifest.fields:
                    tar.add(key, f"{spec.name}.npy", encode_npy(shard.values[spec.name][row]))
        yield pa.Table.from_pydict(shard.columns, SHARED_RECORDS_SCHEMA)


def _in_parts(shards: Iterable[Item], rows_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Join shards, or what was made of them, to parts of _PARTS_ROWS rows or more; the last has the rest."""
    waiting: list[Item] = []
    for shard in shards:
        waiting.append(shard)
        if sum(map(rows_of, waiting)) >= _PARTS_ROWS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _write_embeddings(
    config: ShareConfig, store: Store, shared: TeacherPass, folder: Path, display: Any
) -> None:
    """Write parts of embeddings and of their metadata, in the form of clip-retrieval."""
    parts = _in_parts(_iter_shards(config, store, shared, display), lambda shard: len(shard.rows))
    for number, part in enumerate(parts):
        embeddings = np.concatenate([shard.values["pooled"][:, 0] for shard in part])
        file_at(folder / "img_emb" / f"img_emb_{number}.npy").write(encode_npy(embeddings))
        columns = {
            "image_path": [unquote(key) for shard in part for key in shard.columns["key"]],
            **{
                name: [value for shard in part for value in shard.columns[name]]
                for name in ("split", "label", "image_sha256")
            },
        }
        _write_parquet(folder / "metadata" / f"metadata_{number}.parquet", pa.table(columns))


def _write_parquet(path: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    file_at(path).write(buffer.getvalue())


def _write_tables(
    config: ShareConfig, store: Store, shared: TeacherPass, folder: Path, display: Any
) -> None:
    """Write Parquet files of each split, a column per field."""
    numbers: Counter[str] = Counter()
    shards = _iter_shards(config, store, shared, display)
    for split, of_split in groupby(shards, lambda shard: shard.entry.split):
        tables = (_table_of(config, store, shared, shard) for shard in of_split)
        for part in _in_parts(tables, len):
            path = folder / "data" / f"{split}-{numbers[split]:05d}.parquet"
            _write_parquet(path, pa.concat_tables(part))
            numbers[split] += 1


def _table_of(
    config: ShareConfig, store: Store, shared: TeacherPass, shard: _SharedShard
) -> pa.Table:
    """Return the rows of a shard: key, label, digest, image and a column of each field in the network's units."""
    text, classes = {"dtype": "string", "_type": "Value"}, list(store.manifest.classes)
    columns: dict[str, Any] = {
        "key": pa.array(shard.columns["key"]),
        "label": pa.array(shard.columns["label"], pa.int64()),
        "image_sha256": pa.array(shard.columns["image_sha256"]),
    }
    label = {"names": classes, "_type": "ClassLabel"} if classes else _value("int64")
    features: dict[str, Any] = {"key": text, "label": label, "image_sha256": text}
    if config.images:
        images = [{"bytes": data, "path": None} for _, data in _images(store, shard)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns["image"] = pa.array(images, kind)
        features["image"] = {"_type": "Image"}
    for spec in shared.manifest.fields:
        if not spec.name.endswith("_scale"):
            values = decode_scaled(shard.values[spec.name], shard.values.get(f"{spec.name}_scale"))
            flat = values.reshape(len(values), -1)
            columns[spec.name] = pa.FixedSizeListArray.from_arrays(
                pa.array(flat.ravel()), flat.shape[1]
            )
            features[spec.name] = {
                "feature": _value(flat.dtype.name),
                "length": flat.shape[1],
                "_type": "Sequence",
            }
    described = json.dumps({"info": {"features": features}})
    return pa.table(columns).replace_schema_metadata({"huggingface": described})


def _value(dtype: str) -> dict[str, str]:
    """Return the feature of numbers in the words of Hugging Face's `datasets`."""
    return {"dtype": dtype, "_type": "Value"}
