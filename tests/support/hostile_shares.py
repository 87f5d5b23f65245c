"""Shared passes as a stranger could write them: every entry of another type, size or meaning, with correct digests."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from permafrost.storage.files import file_at
from permafrost.storage.signed_files import SIGNATURE, check_json, sign_json

Change = Callable[[Path, dict[str, Any]], None]
"""Change of a folder and of the content of its share.json."""
OF_OTHER_TYPES = (None, 5, -1, 1.5, True, "x", [], {}, [1, 2], [None], {"a": 1}, 10**30, "x" * 5000)
_RECORDS = "records.parquet"


def rewrite(folder: Path, change: Change) -> None:
    """Change a share, and write share.json with the digests of the files as they are."""
    path = folder / "share.json"
    values = check_json(path.read_bytes())
    values.pop(SIGNATURE, None)
    change(folder, values)
    path.write_bytes(sign_json(values, sort_keys=True))


def setting(entry: str, value: Any) -> Change:
    """Return the change of an entry, whose name may have dots."""

    def change(folder: Path, values: dict[str, Any]) -> None:
        *outer, name = entry.split(".")
        for key in outer:
            values = values[int(key)] if isinstance(values, list) else values[key]
        values[name] = value

    return change


def without(entry: str) -> Change:
    """Return the change that removes an entry."""
    return lambda folder, values: values.pop(entry)


def typed_changes() -> Iterator[tuple[str, Change]]:
    """Iterate over changes of each entry to a value of another type, and over its removal."""
    entries = (
        *("name", "backend", "fields", "fingerprint", "dataset_fingerprint", "store_fingerprint"),
        *("teacher", "views", "explainer", "temperatures", "selection", "fidelity", "added"),
        *("made_with", "agreement", "moved_features", "passport", "classes", "dataset", "frame"),
        *("licenses", "made_by", "files"),
    )
    for entry in entries:
        yield f"no {entry}", without(entry)
        for value in OF_OTHER_TYPES:
            yield f"{entry} = {str(value)[:12]!r}", setting(entry, value)


_FIELD = {"name": "logits", "shape": [4], "dtype": "float16", "codec": "raw", "when_moved": "keep"}
_FIELD |= {"frame": None, "crop_fraction": None, "margin": 0.0, "mirrored": False, "axes": []}
_FIELD |= {"before_relu": False}
PLANNED: dict[str, Change] = {
    "field of objects": setting("fields.0.dtype", "object"),
    "field of a negative shape": setting("fields.0.shape", [-1]),
    "field of a huge shape": setting("fields.0.shape", [2**40]),
    "field with a path as name": setting("fields.0.name", "../../x"),
    "a field twice": setting("fields", [_FIELD, _FIELD]),
    "an unknown codec": setting("fields.0.codec", "pickle"),
    "views without end": setting("views.count", 10**9),
    "no views": setting("views.count", 0),
    "views of a text": setting("views.count", "2"),
    "a seed of text": setting("views.seed", "x"),
    "operations of a number": setting("views.operations", 5),
    "operations of texts": setting("views.operations", ["crop"]),
    "a mixture of text": setting("views.mix", "mixup"),
    "a sampler with a path": setting("views.sampler", "../x"),
    "classes of the teacher": setting("teacher.classes", 10**12),
    "a frame of a number": setting("teacher.frame", 5),
    "an architecture of text": setting("teacher.architecture", "resnet"),
    "infinite fidelity": setting("fidelity", {"logits": float("inf")}),
    "fidelity of text": setting("fidelity", {"logits": "x"}),
    "fidelity of no field": setting("fidelity", {"nothing": 1.0}),
    "an unknown backend": setting("backend", "evil"),
    "classes of numbers": setting("classes", [1, 2, 3, 4]),
    "an explainer of nothing": setting("explainer", {}),
    "an explainer of a list": setting("explainer.kind", ["gradcam"]),
    "an explainer that nobody knows": setting("explainer.kind", "evil"),
    "half of a character": setting("explainer.note", "\ud800"),
    "a negative seed": setting("views.seed", -1),
    "a negative frame": setting("frame", [-1, 0]),
    "a teacher without a name": setting("teacher.name", [1]),
    "temperatures below 0": setting("temperatures", [-1.0]),
    "no file is listed": setting("files", {}),
    "a file outside": setting("files", {"../x": "0" * 64}),
    "a file of the root": setting("files", {"/etc/passwd": "0" * 64}),
    "a digest of text": setting("files", {"records.parquet": "x"}),
    "the schema of tomorrow": setting("schema", 99),
    "another form": setting("form", "embeddings"),
    "a name that is a path": setting("name", "../../evil-00000000"),
    "an unknown entry": setting("evil", 1),
    "a passport of text": setting("passport", {"teacher": 5}),
    "an agreement of a list": setting("agreement", [1]),
    "moved features below 0": setting("moved_features", {"records": 1, "lost": {"x": {"y": -1.0}}}),
    "a huge list": setting("classes", [{}] * 100_000),
}


def _table(folder: Path, change: Callable[[pa.Table], pa.Table], values: dict[str, Any]) -> None:
    path = folder / _RECORDS
    pq.write_table(change(pq.read_table(path)), path)
    values["files"][_RECORDS] = file_at(path).sha256()


def of_table(change: Callable[[pa.Table], pa.Table]) -> Change:
    """Return the change of the table of records."""
    return lambda folder, values: _table(folder, change, values)


def _null(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        cells = [None, *table[name].to_pylist()[1:]]
        index = table.column_names.index(name)
        kind = table.schema.field(name).type
        return table.set_column(index, pa.field(name, kind), pa.array(cells, kind))

    return change


def _text(name: str, text: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        return table.set_column(
            index, table.schema.field(name), pa.array([text] * len(table), pa.string())
        )

    return change


def _copies(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.zeros(3_000_000, np.int64)))


TABLES: dict[str, Change] = {
    **{f"a record without {name}": of_table(_null(name)) for name in ("key", "shard", "label")},
    **{
        f"no column {name}": of_table(lambda table, name=name: table.drop([name]))
        for name in ("key", "shard", "image_sha256")
    },
    "a shard that is a path": of_table(_text("shard", "../../../etc/x")),
    "a shard without a tar": of_table(_text("shard", "train-999999")),
    "three million equal records": of_table(_copies),
    "a table of numbers": of_table(lambda table: pa.table({"key": [1, 2]})),
}


def _as_link(name: str) -> Change:
    def change(folder: Path, values: dict[str, Any]) -> None:
        path = next(folder.glob(name))
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)

    return change


def _as_pipe(folder: Path, values: dict[str, Any]) -> None:
    path = folder / _RECORDS
    path.unlink()
    os.mkfifo(path)


def _linked_projection(folder: Path, values: dict[str, Any]) -> None:
    (folder / "projections").mkdir()
    (folder / "projections" / "x.npy").symlink_to("/etc/passwd")


def _listed_projection(data: bytes) -> Change:
    def change(folder: Path, values: dict[str, Any]) -> None:
        name = next(f["name"] for f in values["fields"] if f["name"].startswith("features_"))
        path = folder / "projections" / f"{name}.npy"
        path.parent.mkdir()
        path.write_bytes(data)
        values["files"][f"projections/{name}.npy"] = file_at(path).sha256()
        values["projected"] = [name]

    return change


def _large_projection(folder: Path, values: dict[str, Any]) -> None:
    _listed_projection(b"")(folder, values)
    path = next((folder / "projections").iterdir())
    with path.open("r+b") as file:
        file.truncate(2**27)
    values["files"][f"projections/{path.name}"] = file_at(path).sha256()


def _last_tar(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Return the change of the arrays of the last tar, so that the first shards are sound."""

    def rewrite_tar(folder: Path, values: dict[str, Any]) -> None:
        path = sorted((folder / "targets").iterdir())[-1]
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        arrays = {
            name: np.load(io.BytesIO(data))
            for name, data in members.items()
            if name.endswith("npy")
        }
        change(arrays)
        with tarfile.open(path, "w") as tar:
            for name in members:
                if name in arrays:
                    file = io.BytesIO()
                    np.save(file, arrays[name])
                    entry = tarfile.TarInfo(name)
                    entry.size = len(file.getvalue())
                    tar.addfile(entry, io.BytesIO(file.getvalue()))
        values["files"][f"targets/{path.name}"] = file_at(path).sha256()

    return rewrite_tar


def _fill(field: str, value: float) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        last = [name for name in arrays if name.endswith(f".{field}.npy")][-1]
        arrays[last] = np.full_like(arrays[last], value)

    return _last_tar(change)


def _other_shape(arrays: dict[str, np.ndarray]) -> None:
    name = next(name for name in arrays if name.endswith(".logits.npy"))
    arrays[name] = arrays[name][..., :-1]


def _projection_of_other_components(folder: Path, values: dict[str, Any]) -> None:
    file = io.BytesIO()
    np.save(file, np.ones((3, 5), np.float32))
    _listed_projection(file.getvalue())(folder, values)


def _projection_that_is_missing(folder: Path, values: dict[str, Any]) -> None:
    values["projected"] = [next(f["name"] for f in values["fields"])]


def _shard_in_a_folder(folder: Path, values: dict[str, Any]) -> None:
    of_table(_text("shard", "a/b"))(folder, values)
    (folder / "targets/a").mkdir()
    path = sorted((folder / "targets").glob("*.tar"))[0]
    shutil.copy(path, folder / "targets/a/b.tar")
    values["files"]["targets/a/b.tar"] = file_at(path).sha256()


def _cut_tar(folder: Path, values: dict[str, Any]) -> None:
    path = sorted((folder / "targets").iterdir())[0]
    path.write_bytes(path.read_bytes()[:700])
    values["files"][f"targets/{path.name}"] = file_at(path).sha256()


FILES: dict[str, Change] = {
    "records are a link": _as_link(_RECORDS),
    "share.json is a link": _as_link("share.json"),
    "a tar is a link": _as_link("targets/*.tar"),
    "the tars are a link": _as_link("targets"),
    "records are a pipe": _as_pipe,
    "a projection of text": _listed_projection(b"text"),
    "a projection of another shape": _listed_projection(b"\x93NUMPY\x01\x00"),
    "a large projection": _large_projection,
    "a cut tar": _cut_tar,
    "a last tar without a member": _last_tar(lambda arrays: arrays.popitem()),
    "a last tar of another shape": _last_tar(_other_shape),
    "logits that are no numbers": _fill("logits", np.nan),
    "maps without a bound": _fill("map", np.inf),
    "a class that the teacher lacks": _fill("target_class", 99),
    "a projection of other components": _projection_of_other_components,
    "a projection that is missing": _projection_that_is_missing,
    "a shard in a folder": _shard_in_a_folder,
}
HARMLESS: dict[str, Change] = {"a linked projection that nothing lists": _linked_projection}


def random_changes(seed: int, count: int) -> Iterator[tuple[str, Change]]:
    """Iterate over changes of entries at random depth to values of other types."""
    draw = random.Random(seed)

    def change_of(number: int) -> Change:
        value = draw.choice(OF_OTHER_TYPES)
        depth = draw.randint(1, 4)

        def change(folder: Path, values: dict[str, Any]) -> None:
            place: Any = values
            for _ in range(depth):
                keys = sorted(place) if isinstance(place, dict) else range(len(place))
                if not keys:
                    return
                key = draw.choice(list(keys))
                if not isinstance(place[key], (dict, list)) or not place[key]:
                    break
                inner = place[key]
                if draw.random() < 0.3:
                    break
                place = inner
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            if keys:
                place[draw.choice(list(keys))] = value

        return change

    for number in range(count):
        yield f"random {number}", change_of(number)
