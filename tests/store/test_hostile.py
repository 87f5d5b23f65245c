"""Stores with malicious, correctly signed manifests: no code runs, no reader hangs, and each error is one line."""

import copy
import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from permafrost.config.store import StoreOptions
from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.store.entries import ManifestError
from permafrost.store.reader import Store
from permafrost.store.shard_records import ShardRecords
from permafrost.store.shards import PassShardTable, ShardTable
from permafrost.store.verification import verify_store
from permafrost.verbs import verify
from tests.support.signing import (
    index_column,
    load,
    load_shards,
    pass_folder,
    sign,
    sign_index,
    sign_shards,
)
from tests.support.store_kinds import build_store, equal_tensors, read_everything


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_teacher):
    """Undamaged store and its values."""
    path = build_store("zarr", tmp_path_factory.mktemp("sound"), tiny_teacher)
    return path, read_everything(path)


@pytest.fixture
def store(sound, tmp_path):
    return shutil.copytree(sound[0], tmp_path / "store")


def assert_refused(store: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_everything(store)
    assert any(match in problem for problem in verify_store(store)) or list(verify_store(store))


# ---- code ----------------------------------------------------------------------------------------


class Payload:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_an_array_that_names_pickle_runs_nothing(store, tmp_path):
    """Zarr's second format lets metadata name the codec numcodecs.Pickle, which ran code up to numcodecs 0.16.5."""
    marker = tmp_path / "ran"
    folder = pass_folder(store)
    array = folder / "fields.zarr" / "logits"
    values = load(folder)
    shards = load_shards(folder, PassShardTable.schema)
    shutil.rmtree(array)
    array.mkdir()
    metadata = {
        **{
            "zarr_format": 2,
            "shape": [16 * len(shards), 1, 10],
            "chunks": [16, 1, 10],
            "dtype": "|O",
        },
        **{"compressor": None, "fill_value": 0, "order": "C"},
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
    }
    (array / ".zarray").write_text(json.dumps(metadata))
    payload = pickle.dumps(Payload(marker))
    for number in range(len(shards)):
        (array / f"{number}.0.0").write_bytes(payload)
    values["files"] = {n: d for n, d in values["files"].items() if "/logits/" not in n}
    values["files"]["fields.zarr/logits/.zarray"] = file_at(array / ".zarray").sha256()
    for number, shard in enumerate(shards):
        for entry in shard["files"]:
            if "/logits/" in entry["path"]:
                path = f"fields.zarr/logits/{number}.0.0"
                digest = bytes.fromhex(file_at(folder / path).sha256())
                entry |= {"path": path, "bytes": len(payload), "sha256": digest}
    sign_shards(folder, shards, PassShardTable.schema, values)

    assert_refused(store, "does not list the files of its fields")
    with pytest.raises(verify.DamagedStoreError):
        verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(store))))
    assert not marker.exists()
    pickle.loads(payload)  # noqa: S301, control: unpickling the payload runs its code
    assert marker.exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("codecs", [{"name": "numcodecs.pickle"}, {"name": "crc32c"}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
        ("shape", [8000, 1, 10]),
        ("data_type", "float32"),
        ("fill_value", 0.0),
        ("storage_transformers", [{"name": "anything"}]),
        ("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "/"}}),
        ("anything_else", 1),
    ],
)
def test_metadata_that_describe_another_array_are_refused(store, entry, value):
    folder = pass_folder(store)
    path = folder / "fields.zarr" / "logits" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    values = load(folder)
    values["files"]["fields.zarr/logits/zarr.json"] = file_at(path).sha256()
    sign(folder, values)

    assert_refused(store, entry)


def test_metadata_in_another_order_and_with_other_blanks_are_accepted(store, sound):
    folder = pass_folder(store)
    path = folder / "fields.zarr" / "logits" / "zarr.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values, sort_keys=True, indent=7))
    manifest = load(folder)
    manifest["files"]["fields.zarr/logits/zarr.json"] = file_at(path).sha256()
    sign(folder, manifest)

    assert equal_tensors(read_everything(store), sound[1])
    assert list(verify_store(store)) == []


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.tar", "images/../../outside.tar", ""])
def test_a_path_that_leaves_the_store_is_refused(store, path):
    shutil.copy(store / "images" / "train-000000.tar", store.parent / "outside.tar")
    shards = load_shards(store, ShardTable.schema)
    shards[2]["path"] = path
    sign_shards(store, shards, ShardTable.schema)

    assert_refused(store, "leaves the folder")


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(store, kind):
    path = store / "images" / "train-000000.tar"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)

    assert_refused(store, str(path))


@pytest.mark.timeout(60, func_only=True)
def test_a_manifest_that_is_a_pipe_is_refused(store):
    (store / "manifest.json").unlink()
    os.mkfifo(store / "manifest.json")

    assert_refused(store, "not a regular file")


def test_a_referenced_tar_may_be_anywhere_but_must_be_a_regular_file(store):
    shards = load_shards(store, ShardTable.schema)
    shards[2] |= {"path": "/dev/zero", "referenced": True}
    sign_shards(store, shards, ShardTable.schema)

    assert_refused(store, "/dev/zero")


# ---- values --------------------------------------------------------------------------------------

VALUES = (None, -1, 10**18, 1.5, True, "", "x" * 70, [], ["x"], {}, {"x": 1}, ...)
"""Replacements of an entry, where `...` removes it."""


def places(values, depth=4, before=()):
    """Iterate over the paths to the entries of nested JSON. Only the first entry of a list is included."""
    if depth and isinstance(values, (dict, list)) and values:
        for name in values if isinstance(values, dict) else (0,):
            yield (*before, name)
            yield from places(values[name], depth - 1, (*before, name))


def with_entry(values, place, value):
    changed = copy.deepcopy(values)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


@pytest.mark.parametrize("of_pass", [False, True])
@pytest.mark.parametrize("contexts", [12, pytest.param(600, marks=pytest.mark.slow)])
def test_no_value_of_a_signed_manifest_ends_in_a_traceback(of_pass, contexts, store, sound):
    folder = pass_folder(store) if of_pass else store
    values = load(folder)
    random = np.random.default_rng(int(of_pass))
    every = list(places(values))
    outcomes = Counter()
    for _ in range(contexts):
        place = every[random.integers(len(every))]
        value = VALUES[random.integers(len(VALUES))]
        sign(folder, with_entry(values, place, value))
        try:
            same = equal_tensors(read_everything(store), sound[1])
            if not same and (place, value) == (("multi_label",), True):
                same = True  # a record may have a label and list none, so this contradicts nothing
            outcomes["same values" if same else f"other values: {place} = {value!r}"] += 1
        except UserError as error:
            outcomes["refused" if "\n" not in str(error) else f"long: {error}"] += 1
        except Exception as error:
            outcomes[f"raw: {place} = {value!r}: {error!r}"] += 1
        problems = list(verify_store(store))
        outcomes["verify ends"] += 1
        assert all("\n" not in problem for problem in problems)

    assert set(outcomes) <= {"same values", "refused", "verify ends"}, outcomes
    assert outcomes["refused"] > contexts / 4


@pytest.mark.slow
@pytest.mark.parametrize("of_pass", [False, True])
def test_no_row_of_a_signed_table_of_shards_ends_in_a_traceback(of_pass, store, sound):
    folder = pass_folder(store) if of_pass else store
    schema = PassShardTable.schema if of_pass else ShardTable.schema
    shards = load_shards(folder, schema)
    files = [{"path": "../x", "bytes": -1, "sha256": bytes(32), "crc32c": 0}]
    replacements = {"files": [[], files, files * 2]}
    outcomes = Counter()
    for column in schema:
        texts = ["", "x" * 70, "../x", shards[1].get(column.name)]
        others = {pa.string(): texts, pa.int64(): [-1, 0, 3, 10**18], pa.bool_(): [True]} | {
            pa.binary(32): [bytes(32)]
        }
        for value in replacements.get(column.name) or others[column.type]:
            sign_shards(folder, [shards[0] | {column.name: value}, *shards[1:]], schema)
            try:
                same = equal_tensors(read_everything(store), sound[1])
                outcomes["same values" if same else f"other: {column.name} = {value!r}"] += 1
            except UserError as error:
                outcomes["refused" if "\n" not in str(error) else f"long: {error}"] += 1
            except Exception as error:
                outcomes[f"raw: {column.name} = {value!r}: {error!r}"] += 1
            assert all("\n" not in problem for problem in verify_store(store))

    assert set(outcomes) <= {"same values", "refused"}, outcomes
    assert outcomes["refused"] > 5


COLUMN_FAULTS = {
    "of another type": lambda column: column.astype(np.int16),
    "shorter": lambda column: column[:-1],
    "longer": lambda column: np.append(column, column[-1:]),
    "of two axes": lambda column: column[None],
}


@pytest.mark.parametrize("name", ["label", "key", "key_offsets", "boxes_offsets"])
@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_a_column_of_another_type_or_length_is_one_line_with_file_and_remedy(store, name, fault):
    sign_index(store, **{name: COLUMN_FAULTS[fault](index_column(store, name))})
    path = store / "index" / f"{name}.npy"

    with pytest.raises(ManifestError, match="; delete it and run permafrost precompute") as error:
        read_everything(store)

    message = str(error.value)
    assert str(path) in message
    assert " is damaged: it " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("label", 5, 10), ("label", 5, -2), ("boxes_offsets", 5, 2**40), ("boxes_offsets", 5, -1)],
)
def test_values_that_the_manifest_does_not_allow_are_refused(store, name, at, value):
    column = index_column(store, name)
    column[at] = value
    sign_index(store, **{name: column})

    with pytest.raises(ManifestError, match=rf"{name}\.npy is damaged: its values of shard t"):
        read_everything(store)
    assert any(f"{name}.npy is damaged" in problem for problem in verify_store(store))


@pytest.mark.parametrize("name", ["key", "key_offsets", "offset", "size", "image_crc32c"])
def test_no_flipped_bit_of_the_index_gives_another_record(store, name):
    def records():
        opened = Store(store)
        shards = [ShardRecords(opened, shard) for shard in opened.shards]
        return [content for shard in shards for content in shard.contents(range(len(shard)))]

    path = store / "index" / f"{name}.npy"
    sound, file = records(), path.read_bytes()
    random, messages = np.random.default_rng(0), []
    for place in random.integers(len(file), size=100):
        data = bytearray(file)
        data[place] ^= 1 << int(random.integers(8))
        path.unlink()  # a mapped file must not change
        path.write_bytes(data)
        try:
            assert records() == sound
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 50
    named = ("/index/key", f"/index/{name}", "run permafrost verify")
    assert all(any(part in message for part in named) for message in messages)


@pytest.mark.parametrize("text", ["[]", "7", "{}", '{"schema": 1}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_mapping_of_entries_is_refused(store, text):
    (store / "manifest.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ManifestError, match="manifest"):
        Store(store)


def test_signed_json_that_nests_too_deep_or_is_a_list_is_refused(store):
    for body in ("[" * 100_000, "{\n[]"):
        digest = hashlib.sha256(body.encode()).hexdigest()
        first, _, rest = body.partition("\n")
        text = f'{first}\n "self_sha256": "{digest}",' + (f"\n{rest}" if rest else "")
        (store / "manifest.json").write_text(text)
        with pytest.raises(ManifestError, match=r"not valid JSON|damaged"):
            Store(store)


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**4000], ids=["large", "low", "long"])
def test_an_integer_that_no_float_holds_is_refused(store, number):
    folder = pass_folder(store)
    values = load(folder)
    values["fidelity"] = dict.fromkeys(values["fidelity"], number)
    sign(folder, values)

    with pytest.raises(ManifestError, match=r"fidelity.* must be a number, got -?10000"):
        read_everything(store)
