"""Damage anywhere in a store is never read as data: a reader gives the same values, or one line that names the file.

`make test` takes a seeded sample; `make test-all` 400 corruptions of each kind of store and 1,200 flips of receipts.
"""

import io
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.augment import AugmentOptions, OperationConfig
from pipeline.config.data import WebDatasetDataConfig
from pipeline.config.store import PassOptions
from pipeline.config.views import RandomViewsConfig
from pipeline.core.errors import UserError
from pipeline.loading.dataset import StoreDataset, iter_batches
from pipeline.sources.demo import DemoSource
from pipeline.store.index import RECEIPT_SCHEMA, read_receipt
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store
from stages import precompute
from tests.conftest import TINY_DATA, precompute_config

PAYLOADS = PassOptions(
    batch_size=8, payloads=("logits", "map", "attention", "class_maps", "pooled")
)
INTERMEDIATES = ("attention", "class_maps", "pooled")


def write_tars(folder: Path) -> WebDatasetDataConfig:
    """Somebody's own tars of the tiny set, 36 records each, to be referenced."""
    source = DemoSource(TINY_DATA)
    records = source.records()
    for number in range(2):
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as tar:
            for record in records[number::2]:
                content = source.read(record)
                for suffix, data in (
                    (content.suffix, content.image),
                    ("cls", str(record.label).encode()),
                    ("mask.png", content.mask),
                ):
                    member = tarfile.TarInfo(f"{record.key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return WebDatasetDataConfig(path=str(folder), reference="always")


def build(kind: str, folder: Path, teacher) -> Path:
    """A store of that kind with a canonical pass, in a folder of its own beside what it refers to."""
    config = precompute_config(folder / "store", teacher, annotate=PAYLOADS)
    if kind in ("jpeg95", "raw"):
        config = replace(config, store=replace(config.store, format=kind))
    if kind == "webdataset":
        config = replace(config, store=replace(config.store, backend="webdataset"))
    if kind == "stored views":
        views = RandomViewsConfig(count=2)
        config = replace(
            config,
            views=views,
            augment=AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),)),
        )
    if kind == "referenced tars":
        config = replace(config, data=write_tars(folder / "tars"))
    precompute.run(config)
    return folder / "store"


def read_everything(path: Path, kind: str = "zarr") -> list[torch.Tensor]:
    """All that training or evaluation reads of a store, as a flat list."""
    read: list[torch.Tensor] = []
    store = Store(path)
    for stored_views in (False, True):
        if stored_views and "views" not in kind:
            continue
        passes = store.open_passes(stored_views=stored_views)
        covered = store.index["split"].to_numpy() == "train"
        rows = np.flatnonzero(covered) if stored_views else np.arange(store.index.num_rows)
        for payload in INTERMEDIATES:
            dataset = StoreDataset(store, rows, passes, with_regions=True, payload=payload)
            if stored_views:
                positions = [(at, at % 2) for at in range(len(rows))]
                batches = [dataset.__getitems__(positions)]
            else:
                batches = list(iter_batches(dataset, 24))
            for batch in batches:
                (targets,) = batch.targets
                read += [batch.inputs, batch.labels, batch.groups, batch.masks, *batch.boxes]
                read += [targets.logits, targets.maps, targets.explained_class]
                read += [targets.intermediates[name] for name in sorted(targets.intermediates)]
                if batch.canonical_from_view is not None:
                    read.append(batch.canonical_from_view)
    return read


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def damage(file: Path, others: list[Path], random: np.random.Generator) -> tuple[str, list[Path]]:
    """Damage a file in one of six ways: its name, and the files that are now wrong."""
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


def all_files(folder: Path) -> list[Path]:
    """Of the store and of what lies beside it, but for the lock, which is empty."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


KINDS = ("zarr", "webdataset", "jpeg95", "raw", "stored views", "inner chunks", "referenced tars")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_teacher):
    """Kind -> (its folder, what a sound one gives, its files), made on first use."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("kind")
            path = build(kind, folder, tiny_teacher)
            made[kind] = folder, read_everything(path, kind), all_files(folder)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contexts", [16, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_no_corruption_is_read_as_data(kind, contexts, stores, monkeypatch):
    if kind == "inner chunks":
        monkeypatch.setattr("pipeline.store.zarr_fields._MAX_CHUNK_BYTES", 64)
        monkeypatch.setattr("pipeline.store.zarr_fields._COMPRESSED_RECORD_BYTES", 64)
    folder, sound, files = stores(kind)
    random = np.random.default_rng(KINDS.index(kind))
    outcomes = Counter()
    for _ in range(contexts):
        file = files[random.integers(len(files))]
        before = {f: f.read_bytes() for f in files if f.suffix == file.suffix}
        how, wrong = damage(file, list(before), random)
        try:
            read = read_everything(folder / "store", kind)
            outcomes["same values" if equal(read, sound) else f"silent: {how} {file}"] += 1
        except UserError as error:
            named = any(str(path) in str(error) for path in wrong)
            blamed = "learning rate" not in str(error) and "optimizer" not in str(error)
            outcomes["named" if named and blamed else f"unnamed: {how} {file}: {error}"] += 1
        except Exception as error:
            outcomes[f"raw: {how} {file}: {error!r}"] += 1
        problems = list(verify_store(folder / "store"))
        found = any(str(path) in problem for problem in problems for path in wrong)
        outcomes["verified" if found else f"not found: {how} {file}: {problems}"] += 1
        for path in wrong:
            path.write_bytes(before[path])

    assert set(outcomes) <= {"same values", "named", "verified"}, outcomes
    assert outcomes["verified"] == contexts
    assert (
        outcomes["named"] > contexts / 4
    )  # the rest hit receipts, padding or headers that nobody reads
    assert equal(read_everything(folder / "store", kind), sound)


@pytest.mark.parametrize(("of_pass", "contexts"), [(False, 6), (True, 6)])
def test_a_flipped_receipt_is_never_published(of_pass, contexts, tmp_path, tiny_teacher):
    check_receipt_flips(of_pass, contexts, tmp_path, tiny_teacher)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("of_pass", "contexts"), [(False, 600), (True, 600)])
def test_no_flip_of_a_receipt_is_ever_published(of_pass, contexts, tmp_path, tiny_teacher):
    check_receipt_flips(of_pass, contexts, tmp_path, tiny_teacher)


def check_receipt_flips(of_pass, contexts, tmp_path, teacher):
    """Flip a receipt of a store, or of its pass, whose manifest is gone; finish it, and compare every value."""
    config = precompute_config(tmp_path / "store", teacher, shard_size=36)
    precompute.run(config)
    store = tmp_path / "store"
    sound = read_values(store)
    (folder,) = (store / "teachers").iterdir()
    unpublished = folder if of_pass else store
    shutil.copytree(store, tmp_path / "sound")
    random = np.random.default_rng(int(of_pass))
    noticed = 0
    for _ in range(contexts):
        receipts = sorted((unpublished / "receipts").glob("*.parquet"))
        receipt = receipts[random.integers(len(receipts))]
        data = bytearray(receipt.read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        receipt.write_bytes(data)
        (unpublished / "manifest.json").unlink()
        done = precompute.run(config)
        noticed += (done.teacher_records if of_pass else done.packed_records) > 0

        assert list(verify_store(store)) == []
        values = read_values(store)
        assert values.keys() == sound.keys()
        assert all(values[name] == sound[name] for name in sound)
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "sound", store)
    assert (
        noticed >= contexts / 4
    )  # the others hit statistics and padding, which no reader looks at


def read_values(store: Path) -> dict[str, object]:
    """What a store's index, its receipts' entries and its pass say, however their files are written."""
    index = Store(store).index
    values = {name: index[name].to_pylist() for name in index.column_names}
    for path in sorted((store / "receipts").glob("*.parquet")):
        table, metadata = read_receipt(path, RECEIPT_SCHEMA)
        values[path.name] = (table.to_pylist(), metadata)
    (teacher,) = Store(store).open_passes()
    for shard in teacher.store.manifest.shards:
        for name, array in teacher.read_shard(shard).items():
            values[f"{shard.name} {name}"] = array.tobytes()
    return values
