"""Migration of a store that an earlier version wrote with schema 1, with a canonical pass, stored views and tars."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from permafrost.config.store import StoreOptions
from permafrost.config.verbs import MigrateConfig
from permafrost.core.errors import ConfigError
from permafrost.store import migration
from permafrost.store.file_entry import ManifestError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from stages import migrate
from tests.support.trees import tree_bytes

TAR = Path(__file__).with_name("schema1_store.tar.xz")
REPLACED = ("manifest.json", "index.parquet", "index.arrow", "keys.arrow", ".lock")


@pytest.fixture
def old(tmp_path):
    with tarfile.open(TAR) as tar:
        tar.extractall(tmp_path / "store", filter="data")
    return tmp_path / "store"


def run(store):
    return migrate.run(MigrateConfig(store=StoreOptions(path=str(store)))).migrated


def untouched(store):
    """Files other than manifests, tables and the index."""
    return {
        path: data
        for path, data in tree_bytes(store).items()
        if Path(path).name not in REPLACED and not Path(path).name.startswith("shards-")
    }


def test_an_old_store_is_refused_with_the_command_that_migrates_it(old):
    with pytest.raises(ManifestError, match=rf"schema 1, .*permafrost migrate store.path={old}"):
        Store(old)


def test_a_migrated_store_is_sound_and_keeps_images_arrays_receipts_and_fingerprints(old):
    before = untouched(old)
    manifests = {path: json.loads(path.read_text()) for path in old.rglob("manifest.json")}

    migrated = run(old)

    assert migrated.split(", ") == [
        "teachers/resnet20-19bf3aee",
        "teachers/resnet20-6e4f76f0",
        "teachers/tars-69dbb2a2",
        "store",
    ]
    assert untouched(old) == before
    assert len(before) > 40
    assert list(verify_store(old)) == []
    assert not (old / "index.parquet").exists()
    store = Store(old)
    for teacher in [*map(store.open_pass, ("resnet20-19bf3aee", "tars")), _views(store)]:
        was = manifests[Path(str(teacher.folder / "manifest.json"))]
        assert teacher.manifest.fingerprint == was["fingerprint"]
        assert store.manifest.fingerprint == was["store_fingerprint"]
        for shard in store.shards:
            if teacher.shards.number_of(shard.name) >= 0:
                assert set(teacher.read_shard(shard)) == {f["name"] for f in was["fields"]}
    assert run(old) == "nothing"


def _views(store):
    return store.open_pass("resnet20-6e4f76f0", stored_views=True)


def test_an_interrupted_migration_is_finished_by_the_same_command(old, monkeypatch):
    expected = shutil.copytree(old, old.parent / "expected")
    run(expected)

    def crash(store):
        raise KeyboardInterrupt

    monkeypatch.setattr(migration, "_migrate_store", crash)
    with pytest.raises(KeyboardInterrupt):
        run(old)
    assert json.loads((old / "manifest.json").read_text())["schema"] == 1
    monkeypatch.undo()

    assert run(old) == "store"
    assert tree_bytes(old) == tree_bytes(expected)


def test_a_damaged_receipt_stops_the_migration_and_the_store_stays_as_it_is(old):
    receipt = next((old / "receipts").glob("*.parquet"))
    data = bytearray(receipt.read_bytes())
    data[len(data) // 2] ^= 1
    receipt.write_bytes(data)
    before = (old / "manifest.json").read_bytes()

    with pytest.raises(ManifestError, match=receipt.name):
        run(old)

    assert (old / "manifest.json").read_bytes() == before
    assert (old / "index.parquet").exists()


def test_a_folder_without_a_store_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished store"):
        run(tmp_path / "none")
