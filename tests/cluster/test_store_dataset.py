"""A store as a data set of Ray: the values of other readers, numbers of rows before a read, and reads without torch."""

import ast
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

import permafrost
from permafrost.cluster import store_dataset
from permafrost.cluster.store_dataset import ray_dataset
from permafrost.core.errors import UserError
from permafrost.store.entries import StoreMismatchError
from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store
from permafrost.store.shard_records import open_same_store
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.processes import run_program
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


@pytest.fixture
def tasks(monkeypatch):
    """Read tasks of the data set that was made last, which is not given to Ray."""
    made = []

    def read_datasource(source, override_num_blocks):
        made[:] = source.get_read_tasks(override_num_blocks)
        assert source.estimate_inmemory_data_size() == sum(
            task.metadata.size_bytes for task in made
        )
        assert override_num_blocks == max(1, len(made))

    monkeypatch.setattr(store_dataset, "read_datasource", read_datasource)
    return made


def columns_of(tasks):
    """Return the columns of all blocks of read tasks as arrays."""
    tables = [table for task in tasks for table in task()]
    return {
        name: np.concatenate(
            [
                np.asarray(chunk.to_numpy_ndarray())
                if hasattr(chunk, "to_numpy_ndarray")
                else chunk.to_numpy(zero_copy_only=False)
                for table in tables
                for chunk in table[name].chunks
            ]
        )
        for name in tables[0].column_names
    }


def frames_of(store, shards):
    return np.concatenate(
        [ShardFrames(store, shard).read(0, shard.records).frames.numpy() for shard in shards]
    )


def test_a_data_set_has_the_values_of_the_store(frozen, tasks):
    names = ("key", "split", "label", "input", "logits", "map")
    ray_dataset(frozen.store.path, split="train", columns=names)

    values = columns_of(tasks)
    expected = permafrost.open_store(frozen.store.path).arrays("train", fields=("logits", "map"))
    shards = [shard for shard in frozen.store.shards if shard.split == "train"]
    assert tuple(values) == names
    for name in ("key", "label", "logits", "map"):
        assert np.array_equal(values[name], expected[name])
        assert values[name].shape == expected[name].shape
    assert set(values["split"]) == {"train"}
    assert np.array_equal(values["input"], frames_of(frozen.store, shards))
    assert [task.metadata.num_rows for task in tasks] == [shard.records for shard in shards]


def test_a_shard_is_not_opened_for_what_the_pass_and_the_index_have(frozen, tasks, monkeypatch):
    """In a bucket it would be downloaded."""
    monkeypatch.delattr(store_dataset, "ShardRecords")
    ray_dataset(frozen.store, columns=["key", "logits"])

    assert len(columns_of(tasks)["logits"]) == frozen.store.num_records()
    ray_dataset(frozen.store, columns=["key", "bytes"])
    with pytest.raises(NameError, match="ShardRecords"):
        columns_of(tasks)


def test_stored_bytes_are_those_of_the_index(frozen, tasks):
    ray_dataset(frozen.store, columns=["bytes"])

    contents = columns_of(tasks)["bytes"]
    sizes = frozen.store.index.take(("size",), range(frozen.store.num_records()))["size"]
    assert [len(content) for content in contents] == sizes.tolist()


def test_columns_are_chosen_by_what_the_store_has(frozen, tasks):
    ray_dataset(frozen.store)

    assert list(columns_of(tasks)) == ["key", "label", "input", "logits"]


def test_a_large_shard_is_several_blocks(frozen, tasks, monkeypatch):
    ray_dataset(frozen.store, columns=["key", "input"])
    whole = columns_of(tasks)
    monkeypatch.setattr(store_dataset, "_BLOCK_BYTES", 3 * 16 * 16 * 3)

    assert max(len(table) for task in tasks for table in task()) == 2
    assert all(np.array_equal(values, whole[name]) for name, values in columns_of(tasks).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tests"}, r"split='tests' must be one of those of .*: .*test"),
        ({"columns": ["logit"]}, r"columns=\['logit'\] must be of: key, .*logits"),
        ({"teacher": "resnet9"}, "has no teacher pass 'resnet9'"),
    ],
)
def test_what_a_store_does_not_have_is_an_error(frozen, tasks, options, message):
    with pytest.raises(UserError, match=message):
        ray_dataset(frozen.store, **options)


def test_records_that_the_pass_does_not_cover_are_left_out(tmp_path, tasks):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(5))
    precompute.run(growing_options(pictures, tmp_path / "store", teacher=TEACHER))
    pictures.add_all(range(5, 8))
    precompute.run(growing_options(pictures, tmp_path / "store", append=True))

    ray_dataset(tmp_path / "store", columns=["key", "input"])
    assert len(columns_of(tasks)["key"]) == 16
    ray_dataset(tmp_path / "store", columns=["key", "input", "logits"])
    values = columns_of(tasks)
    assert sum(task.metadata.num_rows for task in tasks) == len(values["key"]) == 10
    store = Store(tmp_path / "store")
    first = store.part(0, 1)
    assert set(values["key"]) == set(first.index.keys(range(10)))
    assert np.array_equal(values["input"], frames_of(first, first.shards))


def test_a_store_that_was_written_anew_is_an_error(tmp_path, tasks, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    precompute.run(config)
    ray_dataset(tmp_path / "store")
    precompute.run(
        replace(config, store=replace(config.store, path=str(tmp_path / "other"), image_size=8))
    )
    (tmp_path / "store").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "store")
    open_same_store.cache_clear()

    with pytest.raises(StoreMismatchError, match="was written anew while it was read"):
        columns_of(tasks)


@pytest.mark.slow
def test_torch_is_imported_only_to_resize(frozen, tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(2))
    precompute.run(growing_options(pictures, tmp_path / "larger"))
    program = """
import sys
from unittest.mock import patch
from permafrost.cluster import store_dataset
with patch.object(store_dataset, "read_datasource") as made:
    store_dataset.ray_dataset(sys.argv[1])
blocks = [table for task in made.call_args.args[0].get_read_tasks(1) for table in task()]
print(sum(map(len, blocks)), "torch" in sys.modules)
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
        ).stdout.split()
        for path in (frozen.store.path, tmp_path / "larger")
    ]
    assert printed == [[str(frozen.store.num_records()), "False"], ["4", "True"]]


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text(
        "import threading\nbegun.set()\nassert go_on.wait(60)\nvalue = 7\n"
    )
    events = {"begun": threading.Event(), "go_on": threading.Event()}
    for name, event in events.items():
        monkeypatch.setattr(f"builtins.{name}", event, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))

    handled = threading.Event()

    def handle(number, frame):
        if not handled.is_set():
            handled.set()
            raise KeyboardInterrupt

    def interrupt():
        assert events["begun"].wait(60)
        while not handled.wait(0.05):  # a signal just before the main thread waits does not wake it
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, handle)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            store_dataset._import_apart("slow_module")
    finally:
        signal.signal(signal.SIGINT, before)
    events["go_on"].set()

    import slow_module

    assert slow_module.value == 7


@pytest.mark.ray
@pytest.mark.slow
def test_ray_reads_counts_and_divides_it(frozen, ray_cluster):
    data = permafrost.ray_dataset(frozen.store.path, split="train")

    assert data.count() == frozen.store.num_records("train")
    batches = list(data.drop_columns(["key"]).iter_torch_batches(batch_size=16))
    assert sum(len(batch["label"]) for batch in batches) == frozen.store.num_records("train")
    assert batches[0]["input"].dtype == torch.uint8
    assert batches[0]["input"].shape == (16, 3, 16, 16)
    assert batches[0]["logits"].dtype == torch.float32
    parts = data.split(2)
    assert sum(part.count() for part in parts) == frozen.store.num_records("train")
    keys = {row["key"] for row in data.select_columns(["key"]).take_all()}
    expected = permafrost.open_store(frozen.store.path).table("train")["key"]
    assert keys == set(expected.to_pylist())
    assert isinstance(data.schema().base_schema, pa.Schema)


@pytest.mark.ray
@pytest.mark.slow
def test_the_loop_of_the_page_trains_on_ray(frozen, tmp_path):
    (block,) = blocks_of(ROOT / "docs/howto/ray-data.md", "python")
    (tmp_path / "ray_training.py").write_text(
        block.code.replace(
            "import ray.train\n", "import ray.train\n\nray.init('local', num_cpus=3)\n", 1
        )
    )
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}

    ended = run_program(
        [sys.executable, "ray_training.py", str(frozen.store.path)], cwd=tmp_path, env=environment
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    folder, metrics = ended.stdout.splitlines()[-1].split(" ", 1)
    assert ast.literal_eval(metrics)["epoch"] == 1
    assert 0 < ast.literal_eval(metrics)["loss"] < 10
    weights = torch.load(f"{folder}/student.pt", weights_only=True)
    assert weights["bn1.num_batches_tracked"] == 2 * -(-frozen.store.num_records("train") // 16)
