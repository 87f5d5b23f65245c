"""Damage in a store: a reader returns the same values, or raises one line that names the file.

Numbers of the index may be read as other possible ones, which `permafrost verify` alone notices.

`make test` runs a seeded sample. `make test-all` runs 400 corruptions of each kind of store and 1,200 bit flips in
commit markers.
"""

import errno
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from permafrost.config.store import StoreOptions
from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.store import manifest
from permafrost.store.arrow_files import write_rows
from permafrost.store.columns import COLUMNS
from permafrost.store.commit_markers import MARKER_SCHEMA, read_marker
from permafrost.store.entries import ManifestError
from permafrost.store.index_writer import remove_other_tables
from permafrost.store.manifest import read_pass_manifest, read_store_manifest, write_manifest
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import SHARDS_NAME, PassShardTable, shard_row
from permafrost.store.verification import verify_store
from permafrost.verbs import verify
from tests.support.exchange import make_photographs, run_precompute
from tests.support.index_table import index_table
from tests.support.runs import distill_config
from tests.support.signing import file_entry, load, sign
from tests.support.slow import slow
from tests.support.store_kinds import build_store, equal_tensors, read_everything
from tests.support.stores import keys_of_shard, precompute_config
from tests.support.trees import all_files, tree_bytes
from tests.support.verbs import distill, precompute


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


@pytest.fixture
def copy(frozen, tmp_path):
    return shutil.copytree(frozen.store.path, tmp_path / "copy")


def test_a_sound_store_has_no_problems(frozen):
    result = verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(frozen.store.path))))

    assert (result.verified_records, result.verified_passes) == (72, 1)


@pytest.mark.parametrize("backend", ["zarr", slow("webdataset")])
@pytest.mark.parametrize("places", [(0.5,), pytest.param((0, 0.5, 1), marks=pytest.mark.slow)])
def test_one_flipped_byte_in_any_file_is_found_and_the_file_is_named(
    tmp_path, tiny_teacher, backend, places
):
    store = tmp_path / "store"
    precompute.run(precompute_config(store, tiny_teacher, backend=backend))
    checked = 0

    for path in all_files(store):
        original = path.read_bytes()
        for offset in {int(place * (len(original) - 1)) for place in places}:
            damaged = bytearray(original)
            damaged[offset] ^= 0x01
            path.write_bytes(damaged)
            problems = list(verify_store(store))
            assert any(str(path) in problem for problem in problems), (path, offset, problems)
            checked += 1
        path.write_bytes(original)

    assert checked > 20 * len(places)
    assert list(verify_store(store)) == []


@pytest.mark.parametrize("suffix", ["tar", "parquet", "json", slow("0")])
def test_a_missing_or_cut_file_is_named(copy, suffix):
    for path in [p for p in all_files(copy) if p.name.split(".")[-1] == suffix]:
        original = path.read_bytes()
        path.unlink()
        assert any(
            str(path) in problem or str(path.parent) in problem for problem in verify_store(copy)
        )
        path.write_bytes(original[:-1])
        assert any(str(path) in problem for problem in verify_store(copy))
        path.write_bytes(original)
    assert list(verify_store(copy)) == []


def test_a_file_that_no_manifest_knows_is_named(copy):
    stray = copy / "images" / "stray.tar"
    stray.write_bytes(b"")

    assert list(verify_store(copy)) == [f"{stray} is not in any manifest"]


def test_values_out_of_range_name_field_record_and_shard(copy, frozen):
    """A chunk with an invalid class and correct digests, which only the range check can detect."""
    store = Store(copy)
    teacher = store.open_passes()[0]
    shard = store.manifest.shards[1]
    values = {name: array.copy() for name, array in teacher.read_shard(shard).items()}
    values["target_class"][3] = 10
    position = list(store.manifest.shards).index(shard)
    written = teacher.fields.write_shard(position, shard.name, keys_of_shard(store, shard), values)
    manifest = read_pass_manifest(teacher.folder)
    with write_rows(teacher.folder / SHARDS_NAME, PassShardTable.schema) as table:
        for number, own in enumerate(manifest.shards):
            files = written.files if own.name == shard.name else own.files
            digest = manifest.shards.marker_sha256(number)
            table.append(**shard_row(replace(own, files=files), digest))
    shards = PassShardTable(teacher.folder, table.file)
    manifest = replace(manifest, shards=shards)
    write_manifest(teacher.folder, manifest)
    remove_other_tables(teacher.folder, manifest)

    problems = list(verify_store(copy))

    key = keys_of_shard(store, shard)[3]
    assert problems == [
        f"{teacher.name}: field target_class of record {key} (shard {shard.name}) is out of range"
    ]


def test_a_published_pass_that_lost_its_manifest_is_a_problem(copy):
    teacher = Store(copy).open_passes()[0]
    file_at(teacher.folder / "manifest.json").remove()

    assert [str(teacher.folder) in problem for problem in verify_store(copy)] == [True]


def test_an_interrupted_pass_is_no_problem_and_both_ways_out_are_named(copy, caplog):
    folder = copy / "teachers" / "resnet20-0123abcd"
    (folder / "commits").mkdir(parents=True)
    (folder / "commits" / "train-000000.parquet").write_bytes(b"of a shard that is finished")

    with caplog.at_level("WARNING"):
        result = verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(copy))))

    assert (result.verified_passes, result.unfinished_passes) == (1, folder.name)
    (note,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert note.startswith(f"{folder} is an unfinished pass")
    assert f"permafrost precompute store.path={copy}" in note
    assert "delete its folder" in note


def test_a_pass_is_what_its_folder_says(copy, frozen):
    """Another teacher's whole pass in the place of one is whole in itself, and is never taken for that one."""
    config = precompute_config(copy, frozen.config.teacher)
    (own,) = Store(copy).pass_folders()
    precompute.run(replace(config, store=replace(config.store, backend="webdataset")))
    (other,) = set(Store(copy).pass_folders()) - {own}
    shutil.rmtree(str(own))
    shutil.copytree(str(other), str(own))
    named, found = own.name[-8:], other.name[-8:]
    message = f"{own} is named as the pass {named}, but its manifest.json is of the pass {found}"

    assert [message in problem for problem in verify_store(copy)] == [True]
    for read in (
        lambda: Store(copy).open_pass(own.name),
        lambda: Store(copy).open_passes(),
        lambda: TeacherPass(Store(copy), own),
        lambda: distill.run(replace(distill_config(frozen), store=StoreOptions(path=str(copy)))),
        lambda: precompute.run(config),
    ):
        with pytest.raises(ManifestError, match=message):
            read()
    assert tree_bytes(Path(str(own))) == tree_bytes(Path(str(other)))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_changed_byte_of_any_column_is_listed(copy, name):
    """Most of them are read as other values, which nothing else notices."""
    path = copy / "index" / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    (problem,) = verify_store(copy)

    assert problem.startswith(f"{path} has sha256")


def test_a_column_that_this_version_does_not_know_is_only_compared_with_its_digest(copy):
    folds = np.arange(Store(copy).index.num_rows, dtype="<i4")
    np.save(copy / "index" / "fold.npy", folds)
    values = load(copy)
    values["index"]["fold"] = file_entry(copy, "index/fold.npy")
    sign(copy, values)

    assert list(verify_store(copy)) == []
    read_everything(copy)
    np.save(copy / "index" / "fold.npy", folds + 1)
    assert ["index/fold.npy has sha256" in problem for problem in verify_store(copy)] == [True]


def test_the_stage_fails_with_every_problem_listed(copy):
    (copy / "index" / "group.npy").unlink()
    (copy / "images" / "train-000000.tar").unlink()

    with pytest.raises(verify.DamagedStoreError) as error:
        verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(copy))))

    assert "group.npy is missing" in str(error.value)
    assert "train-000000.tar is missing" in str(error.value)


def test_a_shard_without_its_marker_is_not_read(copy):
    teacher = Store(copy).open_passes()[0]
    file_at(teacher.folder / "commits" / "train-000000.parquet").remove()
    shard = next(s for s in teacher.store.manifest.shards if s.name == "train-000000")

    with pytest.raises(ManifestError, match=r"train-000000\.parquet is missing"):
        teacher.read_shard(shard)


@pytest.mark.parametrize("schema", [2, 3])
def test_a_manifest_of_another_schema_is_refused_with_the_way_out(copy, tiny_teacher, schema):
    taught = Store(copy).open_passes()[0].folder

    for folder, sound in (
        (taught, read_pass_manifest(taught)),
        (copy, read_store_manifest(copy)),
    ):
        write_manifest(folder, replace(sound, schema=schema))
        expected = (
            f"{folder}/manifest.json has schema {schema}, but this version reads schema 4; delete {folder} and run "
            "permafrost precompute again, or use the permafrost version that wrote it"
        )
        with pytest.raises(ManifestError) as error:
            Store(copy).open_passes()
        assert str(error.value) == expected
        assert expected in list(verify_store(copy))

    before = tree_bytes(copy)
    with pytest.raises(ManifestError, match=f"has schema {schema}, "):
        precompute.run(precompute_config(copy, tiny_teacher))
    assert tree_bytes(copy) == before


def test_a_file_that_may_not_be_read_is_not_called_damaged():
    denied = "images/a.tar: Permission denied"
    unreadable = verify.DamagedStoreError(Path("store"), [denied])
    both = verify.DamagedStoreError(Path("store"), [denied, "images/b.tar: has another SHA-256"])
    assert "does not mean that they are damaged" in unreadable.lines[-1]
    assert not any("delete it" in line for line in unreadable.lines)
    assert "delete it and run again" in both.lines[-1]


TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    photographs = make_photographs(tmp_path_factory.mktemp("passes"))
    run_precompute(photographs.store, "data=none", *TEACHER, "annotate.name=sound")
    run_precompute(
        photographs.store, "data=none", *TEACHER, "annotate.name=other", "annotate.outputs=[logits]"
    )
    return photographs


def of_manifest(change):
    def damage(folder):
        path = folder / "manifest.json"
        path.rename(folder.parent.parent / "elsewhere.json")
        change(path)

    return damage


def large(path):
    with path.open("wb") as file:
        file.truncate(2**24 + 1)


def linked(folder):
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


DAMAGES = {
    "a manifest that is a link": of_manifest(
        lambda p: p.symlink_to(p.parents[2] / "elsewhere.json")
    ),
    "a manifest that is a pipe": of_manifest(os.mkfifo),
    "a manifest that is a folder": of_manifest(Path.mkdir),
    "a manifest of 16 MiB": of_manifest(large),
    "a manifest of text": of_manifest(lambda p: p.write_text("x")),
    "a folder that is a link": linked,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_pass_that_is_not_meant_may_be_unreadable(photographs, tmp_path, damage, caplog):
    path = shutil.copytree(photographs.store, tmp_path / "store")
    damage(next((path / "teachers").glob("other-*")))

    store = Store(path)
    assert store.open_pass("sound").num_views == 1
    assert store.open_pass("sound").num_views == 1
    assert [folder.name.partition("-")[0] for folder in store.pass_folders()] == ["sound"]
    assert sum("is left out" in message for message in caplog.messages) <= 1
    with pytest.raises(UserError, match="other-"):
        store.open_pass("other")


def test_values_above_the_limit_are_refused_before_the_teacher_runs(
    photographs, tmp_path, monkeypatch
):
    path = shutil.copytree(photographs.store, tmp_path / "store")
    monkeypatch.setattr(manifest, "MAX_RECORD_BYTES", 100)

    with pytest.raises(
        UserError, match=r"cannot have values of this size: 1 views have .* more than 100"
    ):
        run_precompute(path, "data=none", *TEACHER, "annotate.outputs=[features]")


@pytest.mark.parametrize("name", ["{0} (copy)", "Copy of {0}", "{0} 2", "{0}.bak"])
def test_a_copy_of_a_pass_is_named_and_stops_nobody(photographs, tmp_path, name, caplog):
    """Folders as file managers name them."""
    path = shutil.copytree(photographs.store, tmp_path / "store")
    original = next((path / "teachers").glob("sound-*"))
    shutil.copytree(original, original.with_name(name.format(original.name)))
    for stray in (".DS_Store", "._sound", "Thumbs.db"):
        (path / "teachers" / stray).write_bytes(b"x")

    assert Store(path).open_pass("other").num_views == 1
    assert sum("is left out" in text for text in caplog.messages) <= 1
    assert all("delete the copy" in text for text in caplog.messages if "is left out" in text)
    assert {folder.name for folder in Store(path).pass_folders()} == {
        folder.name for folder in Store(photographs.store).pass_folders()
    } | ({name.format(original.name)} if name.startswith("Copy") else set())
