"""Damage in a store: a reader returns the same values, or raises one line that names the file.

Numbers of the index may be read as other possible ones, which `permafrost verify` alone notices.

`make test` runs a seeded sample. `make test-all` runs 400 corruptions of each kind of store and 1,200 bit flips in
commit markers.
"""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from permafrost.core.errors import UserError
from permafrost.store.commit_markers import MARKER_SCHEMA, read_marker
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.index_table import index_table
from tests.support.slow import slow
from tests.support.store_kinds import build_store, equal_tensors, read_everything
from tests.support.stores import precompute_config
from tests.support.trees import all_files
from tests.support.verbs import precompute


@pytest.mark.parametrize("reader", ["tars.read_at", "index.map_file"])
def test_a_disk_that_fails_is_no_damage_and_nobody_is_told_to_delete_a_file(
    tmp_path, tiny_teacher, monkeypatch, reader
):
    """Its server may be away for a minute. The readers are those of a tar and of a column of the index."""
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(f"permafrost.store.{reader}", fail)
    with pytest.raises(UserError, match="look at the disk or its server") as caught:
        read_everything(tmp_path / "store")
    assert "damaged" not in str(caught.value)
    assert "delete" not in str(caught.value)


def damage(file: Path, others: list[Path], random: np.random.Generator) -> tuple[str, list[Path]]:
    """Damage a file in one of six ways, and return the name of the damage and the damaged files."""
    data = bytearray(file.read_bytes())
    kind = random.choice(["flip", "flip", "flip", "cut", "delete", "exchange", "zeros", "append"])
    if kind == "flip":
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    elif kind == "cut":
        del data[random.integers(len(data)) :]
    elif kind == "zeros":
        start = int(random.integers(len(data)))
        if not any(data[start : start + 512]):
            start = next(place for place, byte in enumerate(data) if byte)
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == "append":
        data += data[:512]
    wrong = [file]
    if kind == "delete":
        file.unlink()
    elif kind == "exchange":
        alike = [f for f in others if f.suffix == file.suffix and f.read_bytes() != bytes(data)]
        if not alike:
            data[0] ^= 1
            file.write_bytes(data)
            return "flip", wrong
        other = alike[random.integers(len(alike))]
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        wrong.append(other)
    else:
        file.write_bytes(data)
    return str(kind), wrong


KINDS = ("zarr", "webdataset", "jpeg95", "raw", "stored views", "inner chunks", "referenced tars")

ALIKE = ("jpeg95", "raw", "stored views", "inner chunks")
"""Kinds whose files are those of zarr, with other bytes in them."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_teacher):
    """Function from a kind to (folder, values of the undamaged store, files), which are made on first use."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("kind")
            path = build_store(kind, folder, tiny_teacher)
            made[kind] = folder, read_everything(path, kind), all_files(folder)
        return made[kind]

    return of


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ALIKE)) for kind in KINDS]
)
@pytest.mark.parametrize("contexts", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_no_corruption_is_read_as_data(kind, contexts, stores, monkeypatch, count_trials):
    if kind == "inner chunks":
        monkeypatch.setattr("permafrost.store.zarr_fields._MAX_CHUNK_BYTES", 64)
        monkeypatch.setattr("permafrost.store.zarr_fields._COMPRESSED_RECORD_BYTES", 64)
    folder, sound, files = stores(kind)
    random = np.random.default_rng(KINDS.index(kind))
    outcomes = Counter()
    for _ in range(contexts):
        file = files[random.integers(len(files))]
        before = {f: f.read_bytes() for f in files if f.suffix == file.suffix}
        how, wrong = damage(file, list(before), random)
        of_index = file.parent.name == "index"
        try:
            same = equal_tensors(read_everything(folder / "store", kind), sound)
            silent = "other number" if of_index else f"silent: {how} {file}"
            outcomes["same values" if same else silent] += 1
        except UserError as error:
            named = any(str(path) in str(error) for path in wrong) or (
                of_index and "permafrost verify" in str(error)
            )
            blamed = "learning rate" not in str(error) and "optimizer" not in str(error)
            outcomes["named" if named and blamed else f"unnamed: {how} {file}: {error}"] += 1
        except Exception as error:
            outcomes[f"raw: {how} {file}: {error!r}"] += 1
        problems = list(verify_store(folder / "store"))
        found = any(str(path) in problem for problem in problems for path in wrong)
        outcomes["verified" if found else f"not found: {how} {file}: {problems}"] += 1
        for path in wrong:
            path.write_bytes(before[path])

    read = {name: count for name, count in outcomes.items() if name != "verified"}
    count_trials(f"a file of a store: {kind}", read)
    assert set(outcomes) <= {"same values", "other number", "named", "verified"}, outcomes
    assert outcomes["verified"] == contexts
    # The rest hit commit markers, padding or headers that are not read.
    assert outcomes["named"] > contexts / 4
    assert equal_tensors(read_everything(folder / "store", kind), sound)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("of_pass", "contexts"), [slow(False, 4), (True, 4), slow(False, 600), slow(True, 600)]
)
def test_no_flip_of_a_marker_is_ever_published(of_pass, contexts, tmp_path, tiny_teacher):
    """Flip a bit in a commit marker of an unpublished store or pass, finish the store, and compare every value."""
    config = precompute_config(tmp_path / "store", tiny_teacher, shard_size=36)
    precompute.run(config)
    store = tmp_path / "store"
    sound = read_values(store)
    (folder,) = (store / "teachers").iterdir()
    unpublished = folder if of_pass else store
    shutil.copytree(store, tmp_path / "sound")
    random = np.random.default_rng(int(of_pass))
    noticed = 0
    for _ in range(contexts):
        markers = sorted((unpublished / "commits").glob("*.parquet"))
        marker = markers[random.integers(len(markers))]
        data = bytearray(marker.read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        marker.write_bytes(data)
        (unpublished / "manifest.json").unlink()
        done = precompute.run(config)
        noticed += (done.teacher_records if of_pass else done.packed_records) > 0

        assert list(verify_store(store)) == []
        values = read_values(store)
        assert values.keys() == sound.keys()
        assert all(values[name] == sound[name] for name in sound)
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "sound", store)
    # The others hit statistics and padding, which are not read.
    assert noticed >= contexts / 4


def read_values(store: Path) -> dict[str, object]:
    """Contents of a store's index, commit markers and pass, independent of the encoding of their files."""
    index = index_table(Store(store))
    values = {name: index[name].to_pylist() for name in index.column_names}
    for path in sorted((store / "commits").glob("*.parquet")):
        table, metadata = read_marker(path, MARKER_SCHEMA)
        values[path.name] = (table.to_pylist(), metadata)
    (teacher,) = Store(store).open_passes()
    for shard in teacher.store.manifest.shards:
        for name, array in teacher.read_shard(shard).items():
            values[f"{shard.name} {name}"] = array.tobytes()
    return values
