"""A store that grows: further generations of records, passes that follow, and readers of what was there before."""

import dataclasses
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import obstore
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from permafrost.annotation.feature_projections import ChannelMoments
from permafrost.annotation.teacher_pass import plan_passes
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.compose import compose
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.store import PassOptions, SubsetOptions
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import UserError
from permafrost.loading import transfer
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.sampler import EpochOrder
from permafrost.loading.subset import rows_of_split, select_training_rows
from permafrost.models.resolve import resolve_precompute
from permafrost.storage import bucket_files, buckets, lock
from permafrost.storage.rooted_paths import rooted
from permafrost.store import commit
from permafrost.store.commit import ORIGIN_NAME
from permafrost.store.entries import StoreMismatchError
from permafrost.store.index_writer import is_table
from permafrost.store.projections import write_projection
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.verbs.precompute import plan_precompute
from tests.support.buckets import contents, files_below, memory_buckets, stop_after
from tests.support.crashes import stop_everywhere
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.images import write_tar
from tests.support.kills import Killed, killed_at
from tests.support.paths import ROOT
from tests.support.processes import wait_until
from tests.support.runs import TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.stores import Frozen
from tests.support.tars import samples
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, precompute


@pytest.fixture
def pictures(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(5))
    return pictures


def labels_of(store):
    rows = range(store.index.num_rows)
    names = store.manifest.classes
    labels = store.index.values("label", rows).tolist()
    return dict(zip(store.index.keys(rows), (names[label] for label in labels), strict=True))


def logits_of(store):
    """Stored logits by key."""
    (teacher,) = store.open_passes()
    return {
        key: values
        for shard in store.shards
        if (keys := teacher.shard_keys(shard))
        for key, values in zip(keys, teacher.read_shard(shard)["logits"][:, 0], strict=True)
    }


# ---- records -------------------------------------------------------------------------------------


def test_records_of_many_appends_are_those_of_a_dictionary(pictures, tmp_path):
    generator, path = random.Random(0), tmp_path / "store"
    config = growing_options(pictures, path, teacher=TEACHER, append=True)
    precompute.run(config)
    orders = [list(labels_of(Store(path)))]
    for number in range(6):
        for name in range(generator.choice((1, 3, 9))):
            pictures.add(f"{number}-{name}", generator.choice(("cat", "dog")))
        result = precompute.run(config)
        store = Store(path)
        assert result.packed_records == len(pictures.labels) - len(orders[-1])
        assert labels_of(store) == pictures.labels
        orders.append(list(labels_of(store)))
        assert orders[-1][: len(orders[-2])] == orders[-2]  # none of the earlier ones has moved
    assert store.num_generations == 7
    assert len(store.pass_folders()) == 1
    assert logits_of(store).keys() == pictures.labels.keys()
    for number in range(1, 7):
        part = store.part(0, number)
        assert list(labels_of(part)) == orders[number - 1]
        assert store.part_with(part.manifest.fingerprint).num_generations == number
    assert list(verify_store(path)) == []
    assert precompute.run(config).packed_records == 0

    at_once = tmp_path / "at once"
    precompute.run(growing_options(pictures, at_once, teacher=TEACHER))
    wanted = logits_of(Store(at_once))
    for key, logits in logits_of(store).items():
        np.testing.assert_allclose(logits.astype(float), wanted[key].astype(float), atol=2e-3)


SIZES = st.one_of(st.integers(1, 5), st.integers(1, 100), st.integers(1, 5000))


@pytest.mark.slow
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(sizes=st.lists(SIZES, min_size=50, max_size=50), seed=st.integers(0, 2**32))
def test_records_of_fifty_appends_are_those_of_a_dictionary(sizes, seed, tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("fifty"), random.Random(seed)
    pictures, path = Pictures(folder / "pictures"), folder / "store"
    for split in ("train", "test"):
        pictures.add_all(range(5), split=split)
    config = growing_options(pictures, path, teacher=TEACHER, append=True, shard_size=256)
    precompute.run(config)
    order, targets = labels_of(Store(path)), logits_of(Store(path))
    for number, size in enumerate(sizes):
        for name in range(size):
            cls = generator.choice(("cat", "dog", f"class{number % 7}"))
            split = generator.choice(("train", "test"))
            pictures.add(f"{number}-{name}", cls, size=(2, 3), split=split)
        assert precompute.run(config).packed_records == size
        store = Store(path)
        after = labels_of(store)
        assert after == pictures.labels
        assert list(after)[: len(order)] == list(order)
        order = after
    assert store.num_generations == 51
    assert store.num_records() == len(pictures.labels)
    assert list(verify_store(path)) == []
    final = logits_of(store)
    for key, logits in targets.items():
        np.testing.assert_array_equal(final[key], logits)
    at_once = folder / "at once"
    precompute.run(growing_options(pictures, at_once, teacher=TEACHER, shard_size=256))
    wanted = logits_of(Store(at_once))
    assert final.keys() == wanted.keys()
    for key, logits in final.items():
        np.testing.assert_allclose(logits.astype(float), wanted[key].astype(float), atol=2e-3)


def test_a_store_of_one_generation_lists_none(pictures, tmp_path):
    precompute.run(growing_options(pictures, tmp_path / "store"))
    precompute.run(growing_options(pictures, tmp_path / "appended", append=True))
    assert files_below(tmp_path / "store") == files_below(tmp_path / "appended")
    assert Store(tmp_path / "store").manifest.generations == ()


def test_new_classes_come_last_and_old_labels_keep_their_numbers(pictures, tmp_path):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    pictures.add_all("ab", ("ant", "dog", "bird"))
    with pytest.raises(UserError, match=r"2 classes .* describe 4 .* append what is new to it"):
        precompute.run(growing_options(pictures, path))
    precompute.run(growing_options(pictures, path, append=True))
    store = Store(path)
    assert store.manifest.classes == ("cat", "dog", "ant", "bird")
    assert labels_of(store) == pictures.labels
    assert store.part(0, 1).manifest.classes == ("cat", "dog")
    assert list(verify_store(path)) == []


def test_of_a_network_of_the_first_classes_the_labels_of_others_are_unknown(
    pictures, tmp_path, caplog
):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    pictures.add_all("ab", ("ant", "dog"))
    precompute.run(growing_options(pictures, path, append=True))
    whole = Store(path)
    known = pickle.loads(pickle.dumps(whole.known_to(["cat", "dog"])))  # noqa: S301
    rows = rows_of_split(known.index, "train")
    stored, labels = (store.index.values("label", rows) for store in (whole, known))
    np.testing.assert_array_equal(labels, np.where(stored == 2, -1, stored))
    assert known.manifest.fingerprint == whole.manifest.fingerprint
    assert known.manifest.classes == whole.manifest.classes_of(2) == ("cat", "dog")
    assert whole.manifest.classes_of(1000) == whole.manifest.classes_of(1) == ()
    assert all(whole.known_to(names) is whole for names in ((), ("dog",), whole.manifest.classes))
    for subset in (SubsetOptions(), SubsetOptions(shots=3, holdout=1)):
        selected = np.asarray(select_training_rows(known.index, "train", subset))
        assert set(labels[selected]) == {0, 1}
    known.warn_of_later_classes("it", rows, "so what")
    assert caplog.messages[-1] == "it does not know 'ant' (2 records): so what"


def test_a_reader_goes_on_while_records_are_appended(pictures, tmp_path):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    opened, begun = Store(path), Store(path)
    before = labels_of(begun)
    pictures.add_all("ab")
    precompute.run(growing_options(pictures, path, append=True))
    assert labels_of(opened) == labels_of(begun) == before
    assert len(labels_of(Store(path))) == len(before) + 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.path_of(1, "cat").unlink(), r"1 not listed any more \('train/cat/1"),
        (
            lambda p: Image.new("RGB", (90, 90)).save(p.path_of(2, "dog")),
            r"1 with another number of bytes \('train/dog/2",
        ),
    ],
    ids=["missing", "bytes"],
)
@pytest.mark.parametrize("grows", [True, False])
def test_records_that_have_changed_stop_unless_they_are_kept(
    pictures, tmp_path, change, text, grows
):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    pictures.add_all("ab")
    precompute.run(growing_options(pictures, path, append=True))
    before = labels_of(Store(path))
    change(pictures)
    if grows:
        pictures.add("c", "cat")
    config = growing_options(pictures, path, append=True)
    config = replace(config, store=replace(config.store, relist=True))
    with pytest.raises(UserError, match=text):
        precompute.run(config)
    assert labels_of(Store(path)) == before
    precompute.run(replace(config, store=replace(config.store, changed="keep")))
    after = labels_of(Store(path))
    assert after.items() >= before.items()
    assert len(after) == len(before) + grows


def test_other_options_of_the_data_are_named_in_place_of_what_they_change(pictures, tmp_path):
    path, folder = tmp_path / "store", str(pictures.folder / "train")
    config = growing_options(pictures, path, append=True)
    packed = ImageFolderDataConfig(path=folder, test_fraction=0.3)
    precompute.run(replace(config, data=packed))
    pictures.add_all("ab")
    other = replace(config, data=ImageFolderDataConfig(path=folder))
    with pytest.raises(
        UserError, match=r"was packed with data\.test_fraction=0\.3, so type"
    ) as stop:
        precompute.run(other)
    assert "another split" not in str(stop.value)
    (path / ORIGIN_NAME).unlink()  # as of a store that was packed before they were written
    with pytest.raises(UserError, match=r"3 with another split"):
        precompute.run(other)
    assert precompute.run(replace(config, data=packed)).packed_records == 4


@pytest.mark.parametrize("kind", ["shards", "tables"])
def test_lost_files_of_any_generation_are_written_again(pictures, tmp_path, kind):
    path = tmp_path / "store"
    config = growing_options(pictures, path, append=True)
    precompute.run(config)
    for names in ("ab", "cd"):
        pictures.add_all(names)
        precompute.run(config)
    whole = tree_bytes(path)
    manifest = Store(path).manifest
    shards = [shard.name for shard in manifest.shards]
    lost = {
        "shards": [f"images/{shards[0]}.tar", f"commits/{shards[-1]}.parquet"],
        "tables": [manifest.index["key"].path, manifest.index["label"].path],
    }[kind]
    for name in lost:
        (path / name).unlink()
    precompute.run(growing_options(pictures, path))
    assert {name: tree_bytes(path)[name] for name in lost} == {name: whole[name] for name in lost}
    assert Store(path).manifest.fingerprint == manifest.fingerprint
    assert list(verify_store(path)) == []


def test_lost_tables_are_written_by_a_command_and_not_by_its_plan(pictures, tmp_path):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    pictures.add_all("ab")
    precompute.run(growing_options(pictures, path, append=True))
    index = path / Store(path).manifest.index["size"].path
    abandoned = path / "images/train-0123abcd-000000.tar"  # of an append that was killed
    index.unlink()
    abandoned.write_bytes(b"")
    before = tree_bytes(path)
    with pytest.raises(UserError, match="is missing"):
        plan_precompute(growing_options(pictures, path))
    assert tree_bytes(path) == before
    precompute.run(growing_options(pictures, path))
    assert index.exists()
    assert abandoned.exists()


def test_a_lost_file_of_changed_records_is_named(pictures, tmp_path):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path))
    pictures.add_all("ab")
    precompute.run(growing_options(pictures, path, append=True))
    next((path / "images").iterdir()).unlink()
    pictures.path_of("a", "cat").unlink()
    with pytest.raises(UserError, match=r"has lost 1 shards .* not as they were packed"):
        precompute.run(growing_options(pictures, path, changed="keep"))


# ---- kills ---------------------------------------------------------------------------------------


@pytest.fixture
def begun(pictures, tmp_path):
    """Packed and annotated store whose data have got more records, and the files that an append makes of it."""
    path, expected = tmp_path / "begun", tmp_path / "expected"
    precompute.run(growing_options(pictures, path, teacher=TEACHER, shard_size=8))
    pictures.add_all("ab", ("bird", "cat"))
    shutil.copytree(path, expected)
    precompute.run(growing_options(pictures, expected, teacher=TEACHER, append=True, shard_size=8))
    return path, tree_bytes(expected)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 37])
def test_an_append_that_was_stopped_anywhere_ends_with_the_same_bytes(
    begun, pictures, tmp_path, monkeypatch, every
):
    start, expected = begun

    def append(point):
        store = shutil.copytree(start, tmp_path / str(point), dirs_exist_ok=True)
        precompute.run(growing_options(pictures, store, teacher=TEACHER, append=True, shard_size=8))

    def check(point):
        store = tmp_path / str(point)
        assert len(labels_of(Store(store))) in (10, 14)
        assert {*logits_of(Store(store))} <= pictures.labels.keys()
        precompute.run(growing_options(pictures, store, teacher=TEACHER, append=True, shard_size=8))
        made = tree_bytes(store)
        assert made.items() >= expected.items()
        assert all(is_table(name) for name in made.keys() - expected.keys())
        assert list(verify_store(store)) == []
        shutil.rmtree(store)

    assert stop_everywhere(monkeypatch, append, check, every) > 150


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_an_append_to_a_bucket_that_was_killed_anywhere_ends_with_the_same_bytes(
    begun, pictures, tmp_path, monkeypatch, every
):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.2)  # of the lease of a writer that was killed
    start, expected = begun
    expected = {name: data for name, data in expected.items() if not name.endswith(lock.LOCK_NAME)}
    words = {"teacher": TEACHER, "append": True, "shard_size": 8}
    call, is_killed = 0, True
    while is_killed:
        call += every
        with memory_buckets(tmp_path / f"cache{call}"):
            client = buckets._client("s3://bucket")
            for name, data in tree_bytes(start).items():
                obstore.put(client, f"store/{name}", data)
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, call)
                try:
                    precompute.run(growing_options(pictures, "s3://bucket/store", **words))
                    is_killed = False
                except Killed:
                    assert len(labels_of(Store(rooted("s3://bucket/store")))) in (10, 14)
            precompute.run(growing_options(pictures, "s3://bucket/store", **words))
            assert list(verify_store(rooted("s3://bucket/store"))) == []
            made = contents(client, "store")
        assert made.keys() >= expected.keys()
        assert all(made[name] == data for name, data in expected.items())
    assert call > 20


@pytest.mark.parametrize("cleans", [True, False])
def test_of_two_writers_that_append_to_a_bucket_the_second_one_stops(
    begun, pictures, tmp_path, monkeypatch, cleans
):
    """The lease would turn it away, unless it was taken over from a process that had only stopped for a while."""
    start, _ = begun
    original = commit.write_manifest

    def after_another(folder, manifest):
        monkeypatch.setattr(commit, "write_manifest", original)
        pictures.add("other", "cat")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket_files, "_versions", {})  # as another process has
            if not cleans:  # it has not yet removed the tables of others
                patch.setattr(commit, "remove_other_tables", lambda *_: None)
            precompute.run(growing_options(pictures, store, append=True))
        return original(folder, manifest)

    store = "s3://bucket/store"
    with memory_buckets(tmp_path / "cache"):
        client = buckets._client("s3://bucket")
        for name, data in tree_bytes(start).items():
            obstore.put(client, f"store/{name}", data)
        monkeypatch.setattr(commit, "write_manifest", after_another)
        no_lock = nullcontext(lambda: None)
        monkeypatch.setattr(precompute.module, "folder_lock", lambda *_, **__: no_lock)
        with pytest.raises(UserError, match=r"was written by another process"):
            precompute.run(growing_options(pictures, store, append=True))
        assert labels_of(Store(rooted(store))) == pictures.labels
        assert precompute.run(growing_options(pictures, store, append=True)).packed_records == 0
        assert list(verify_store(rooted(store))) == []


_RUN = """
import pickle, sys
from tests.support.verbs import precompute
precompute.run(pickle.load(open(sys.argv[1], "rb")))
"""


@pytest.mark.slow
def test_an_append_on_ray_whose_driver_was_killed_ends_with_the_same_bytes(
    begun, pictures, tmp_path
):
    start, expected = begun
    before = len(tree_bytes(start))
    for written in range(0, len(expected) - before, 2):
        store = shutil.copytree(start, tmp_path / str(written))
        config = growing_options(
            pictures, store, teacher=TEACHER, append=True, shard_size=8, executor="ray"
        )
        saved = tmp_path / f"{written}.pickle"
        saved.write_bytes(pickle.dumps(config))
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, saved], cwd=ROOT, start_new_session=True
        )
        wait_until(lambda: len(tree_bytes(store)) >= before + written, process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        precompute.run(replace(config, executor="serial"))
        made = tree_bytes(store)
        assert made.items() >= expected.items()
        assert all(is_table(name) for name in made.keys() - expected.keys())


def test_a_store_in_a_bucket_grows_to_the_bytes_of_a_local_one(pictures, tmp_path):
    with memory_buckets(tmp_path / "cache"):
        for path in ("s3://bucket/store", tmp_path / "store"):
            precompute.run(growing_options(pictures, path, teacher=TEACHER))
        pictures.add_all("ab", ("bird", "cat"))
        for path in ("s3://bucket/store", tmp_path / "store"):
            precompute.run(growing_options(pictures, path, teacher=TEACHER, append=True))
        made = contents(buckets._client("s3://bucket"), "store")
        store = Store(rooted("s3://bucket/store"))
        dataset = StoreDataset(store, rows_of_split(store.index, "train"), store.open_passes())
        fetched = {
            str(file.path).removeprefix("s3://bucket/store/")
            for number in range(len(store.shards))
            for file in dataset._files_of(number)
        }
        assert fetched <= made.keys()
        assert len({name.split("/")[1] for name in fetched if name.startswith("teachers")}) == 2
        assert list(verify_store(rooted("s3://bucket/store"))) == []
    local = files_below(tmp_path / "store")
    assert made.keys() == local.keys()
    assert all(made[name] == data for name, data in local.items() if name != ".origin.json")


# ---- passes and runs -----------------------------------------------------------------------------


def test_a_pass_follows_with_the_projections_of_the_first_one(pictures, tmp_path):
    config = growing_options(
        pictures,
        tmp_path / "store",
        teacher=TEACHER,
        append=True,
        views=RandomViewsConfig(count=2),
        augment=AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),)),
    )
    config = replace(
        config,
        annotate=PassOptions(batch_size=4, outputs=("logits", "features"), features_channels=3),
    )
    first = precompute.run(config)
    pictures.add_all("abc", ("cat", "dog", "bird"))
    second = precompute.run(config)
    store = Store(tmp_path / "store")

    assert first.passes == second.passes
    assert second.teacher_records == 3 * 9
    (teacher,) = store.open_passes()
    (views,) = store.open_passes(stored_views=True)
    parts = teacher.parts
    assert [part.manifest.follows for part in parts] == [None, parts[0].manifest.fingerprint]
    assert parts[0].projections.keys() == parts[1].projections.keys() != set()
    for name, projection in parts[0].projections.items():
        np.testing.assert_array_equal(projection.components, parts[1].projections[name].components)
    assert views.num_generations == 2
    assert precompute.run(config).teacher_records == 0
    assert list(verify_store(tmp_path / "store")) == []


def _bits_of(value):
    """Bytes of all tensors inside of dataclasses, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        return [value.numpy().tobytes()]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = tuple(value.values())
    return [bits for part in value for bits in _bits_of(part)] if isinstance(value, tuple) else []


def test_targets_are_those_of_a_store_packed_at_once_with_the_same_projections(pictures, tmp_path):
    annotate = PassOptions(
        batch_size=4, outputs=("logits", "maps", "features"), features_channels=3
    )
    pictures.add_all("a")  # whole batches: 3 of the first generation, 2 of the next one
    config = growing_options(pictures, tmp_path / "store", teacher=TEACHER, append=True)
    config = replace(config, annotate=annotate)
    precompute.run(config)
    pictures.add_all("bcde")
    precompute.run(config)

    at_once = growing_options(pictures, tmp_path / "at once", teacher=TEACHER)
    precompute.run(replace(at_once, teacher=NoModelConfig()))
    at_once = resolve_precompute(replace(at_once, annotate=annotate), Store(tmp_path / "at once"))
    ((plan,),) = plan_passes(at_once, Store(tmp_path / "at once"))
    (teacher,) = Store(tmp_path / "store").open_passes()
    assert teacher.projections
    for field, projection in teacher.projections.items():
        write_projection(plan.folder, field, projection)
    precompute.run(at_once)

    targets = []
    for name in ("store", "at once"):
        store = Store(tmp_path / name)
        for output_name in ("maps", "features"):
            dataset = StoreDataset(
                store, range(store.num_records()), store.open_passes(), output=output_name
            )
            batch = dataset.__getitems__(sorted(range(20), key=dataset.keys_at().__getitem__))
            targets.append(batch)
    for joined, whole in zip(targets[:2], targets[2:], strict=True):
        assert joined.keys == whole.keys
        torch.testing.assert_close(joined.inputs, whole.inputs, rtol=0, atol=0)
        bits = [_bits_of(batch.targets) for batch in (joined, whole)]
        assert bits[0] == bits[1]
        assert len(bits[0]) > 1


def test_a_run_keeps_to_the_generations_that_it_has_read(pictures, tmp_path):
    path = tmp_path / "store"
    config = growing_options(pictures, path, teacher=TEACHER)
    precompute.run(config)
    frozen = Frozen(Store(path), config)
    trainer = replace(TRAINER, epochs=3, batch_size=4, checkpoint_every_steps=1)
    distill.run(distill_config(frozen, run="whole", trainer=trainer))
    with killed_at(transfer, "move_batch", 4):
        distill.run(distill_config(frozen, run="killed", trainer=trainer))
    pictures.add_all("abcd", ("ant", "cat"), size=(40, 17))
    precompute.run(growing_options(pictures, path, teacher=TEACHER, append=True))

    distill.run(distill_config(frozen, run="killed", trainer=trainer))
    assert_equal_states(weights_of("killed"), weights_of("whole"))
    assert distill.run(distill_config(frozen, run="whole", trainer=trainer)).trained_epochs == 0
    distill.run(distill_config(frozen, run="new", trainer=trainer))
    with pytest.raises(AssertionError):
        assert_equal_states(weights_of("new"), weights_of("whole"))


def test_a_new_run_reads_what_its_passes_cover(pictures, tmp_path, caplog):
    path = tmp_path / "store"
    config = growing_options(pictures, path, teacher=TEACHER)
    precompute.run(config)
    pictures.add_all("abcd")
    precompute.run(growing_options(pictures, path, append=True))  # without the teacher
    frozen = Frozen(Store(path), config)
    trainer = replace(TRAINER, epochs=1, batch_size=4)
    distill.run(distill_config(frozen, run="one", trainer=trainer))
    assert "2 generations, and resnet8" in caplog.text
    assert "cover the first 1" in caplog.text


def test_what_a_deleted_pass_leaves_behind_is_told(pictures, tmp_path, caplog):
    path = tmp_path / "store"
    precompute.run(growing_options(pictures, path, teacher=TEACHER))
    pictures.add_all("ab")
    precompute.run(growing_options(pictures, path, teacher=TEACHER, append=True))
    (first,) = Store(path).pass_folders()
    shutil.rmtree(str(first))
    (left,) = (path / "teachers").iterdir()
    assert Store(path).pass_folders() == []
    assert f"so delete them, too: rm -r {left}" in caplog.text
    shutil.rmtree(left)
    caplog.clear()
    assert Store(path).pass_folders() == list(verify_store(path)) == []
    assert caplog.text == ""


def test_components_that_do_not_fit_the_appended_records_are_told():
    generator = np.random.default_rng(0)
    first = torch.from_numpy(
        generator.normal(size=(40, 8, 3, 3)) * np.array([5, 4, 3, *5 * [0.1]]).reshape(8, 1, 1)
    )
    moments = ChannelMoments(8)
    moments.add(first)
    projection = moments.fit(3)
    assert moments.kept_share(projection) == pytest.approx(projection.kept_share, abs=1e-4)
    others = ChannelMoments(8)
    others.add(first.flip(1))
    assert others.kept_share(projection) < 0.1
    shifted = ChannelMoments(8)
    shifted.add(first + 3)  # also what lies beside the mean of the fit is not kept
    assert shifted.kept_share(projection) < projection.kept_share - 0.1


# ---- orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0, 500, 1600])
def test_windows_of_small_shards_have_the_records_of_full_ones(least):
    sizes = np.random.default_rng(0).permutation([100] * 20 + [50] + [7] * 200 + [60] * 3)
    asked = []
    order = EpochOrder(
        np.r_[0, np.cumsum(sizes)],
        3,
        fetch=lambda numbers: asked.extend(numbers),
        least_records=least,
    )
    windows = list(order.windows(1))
    whole = np.concatenate(windows)
    assert sorted(whole.tolist()) == list(range(sizes.sum()))
    assert sorted(asked) == list(range(len(sizes)))
    assert all(len(window) >= least for window in windows[:-1])
    assert (len(windows) == 14) == (least == 0)
    for first in (1, 100, 1777):
        np.testing.assert_array_equal(np.concatenate(list(order.windows(1, first))), whole[first:])


RANDOM_TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture
def tars(tmp_path):
    """Tars of twelve images whose labels are numbers from 0 to 2."""
    return write_tar(tmp_path / "tars/train-000000.tar", samples(12)).parent


def run(tars, *words):
    options = ["data=webdataset", f"data.path={tars}", f"store.path={tars.parent / 'store'}"]
    words = [*options, "executor=serial", "store.image_size=16", *words]
    return precompute.run(build_verb_config("precompute", compose("precompute", words)))


def list_of(tars, *names):
    path = tars.parent / "classes.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return f"data.classes={path}"


def test_names_come_later_and_nothing_else_changes(tars):
    run(tars, *RANDOM_TEACHER)
    store = Store(tars.parent / "store")
    assert store.manifest.classes == ("0", "1", "2")
    before = tree_bytes(store.path)

    run(tars, *RANDOM_TEACHER, list_of(tars, "cat", "dog", "eel"))

    after = tree_bytes(store.path)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}
    named = Store(store.path)
    assert named.manifest.classes == ("cat", "dog", "eel")
    assert named.manifest.fingerprint == store.manifest.fingerprint
    assert list(verify_store(named.path)) == []
    assert len(named.pass_folders()) == 1  # the teacher has not run again

    run(tars, *RANDOM_TEACHER)  # without the list: the names stay
    assert Store(store.path).manifest.classes == ("cat", "dog", "eel")


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat", "dog", "eel", "fox")])
def test_another_number_of_names_is_refused(tars, names):
    run(tars, "teacher=none")

    with pytest.raises((StoreMismatchError, ValueError)):
        run(tars, "teacher=none", list_of(tars, *names))
    assert Store(tars.parent / "store").manifest.classes == ("0", "1", "2")


def test_names_are_not_exchanged_for_others(tars):
    run(tars, "teacher=none", list_of(tars, "cat", "dog", "eel"))

    with pytest.raises(StoreMismatchError, match="contains 3 classes"):
        run(tars, "teacher=none", list_of(tars, "eel", "dog", "cat"))
