"""Executors: order, memory and results of a task do not depend on where it runs."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

from permafrost.annotation import shard_tasks
from permafrost.annotation.shard_tasks import AnnotateShard
from permafrost.cluster.executors import ExecutorChoice
from permafrost.cluster.placement import ClusterError
from permafrost.cluster.shard_rows import Gate, ShardAssignment, _ShardActor
from permafrost.config.cluster import SMALL_STORE, ExistingClusterConfig, LocalClusterConfig
from permafrost.config.models import NoModelConfig
from permafrost.core.errors import FileError, RecordError
from permafrost.core.tasks import SerialExecutor, ShardResult
from permafrost.storage import buckets
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import rooted
from permafrost.store.deaths import ShardDeaths
from permafrost.store.frames import ShardFrames
from tests.support.buckets import memory_buckets
from tests.support.settings import pass_config
from tests.support.stores import frame_batches
from tests.support.verbs import precompute

NAMED = ExistingClusterConfig()


@pytest.mark.parametrize(
    ("executor", "cluster", "records", "chosen"),
    [
        ("auto", LocalClusterConfig(), SMALL_STORE, "serial"),
        ("auto", LocalClusterConfig(), SMALL_STORE + 1, "ray"),
        ("auto", LocalClusterConfig(actors=2), 1, "ray"),
        ("auto", NAMED, 1, "ray"),
        ("ray", LocalClusterConfig(), 1, "ray"),
        ("serial", NAMED, SMALL_STORE + 1, "serial"),
    ],
)
def test_a_small_pass_without_a_named_cluster_is_serial(executor, cluster, records, chosen):
    assert ExecutorChoice(executor, cluster).for_records(records).name == chosen


@pytest.mark.parametrize(
    ("cluster", "tasks", "parallel", "chosen"),
    [
        (LocalClusterConfig(), 1, None, "serial"),
        (LocalClusterConfig(), 5, 1, "serial"),
        (LocalClusterConfig(), 2, None, "ray"),
        (NAMED, 1, None, "ray"),
    ],
)
def test_one_task_without_a_named_cluster_is_serial(monkeypatch, cluster, tasks, parallel, chosen):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})

    assert (
        ExecutorChoice("auto", cluster).for_tasks(tasks, parallel, lambda: 100.0)[0].name == chosen
    )


# ---- a Ray that does not start --------------------------------------------------------------------


@pytest.fixture(
    params=[
        RuntimeError("The current node timed out during startup"),
        Exception("Failed to start the raylet"),
        ConnectionError("Could not read 'session_name' from GCS"),
        TimeoutError("GCS did not start"),
        ValueError("The object store's memory 0 is below its minimum"),
        ray.exceptions.RaySystemError("System error: no shared memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def broken_ray(request, monkeypatch):
    """Calls of a ray.init that fails."""
    calls = []

    def init(*arguments, **options):
        calls.append(options)
        raise request.param

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return calls


def double(shard):
    return 2 * shard


@dataclass(frozen=True)
class Note:
    name: str
    after = ()

    def __call__(self, report):
        report("done")


def test_auto_goes_on_in_this_process_if_a_local_ray_does_not_start(
    broken_ray, caplog, monkeypatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    with ExecutorChoice("auto", LocalClusterConfig(actors=2)) as choice:
        executor = choice.for_records(1)
        assert list(executor.map_shards(double, [])) == []
        assert broken_ray == []
        assert list(executor.map_shards(double, [1, 2, 3])) == [2, 4, 6]
        assert list(choice.for_records(2).map_shards(double, [4])) == [8]
    with ExecutorChoice("auto", LocalClusterConfig()) as choice:
        lines = []
        tasks = [Note("a"), Note("b")]
        found = [
            *choice.for_tasks(2, 2, lambda: 100.0)[0].run_tasks(
                tasks, lambda *line: lines.append(line), 2
            )
        ]

    assert [outcome.name for outcome in found] == ["a", "b"]
    assert lines == [("a", "done"), ("b", "done")]
    assert len(broken_ray) == 4  # two attempts of each, and none for the second work
    found = [
        r.getMessage() for r in caplog.records if "continues in this process" in r.getMessage()
    ]
    assert len(found) == 2
    assert all("Ray did not start in 2 attempts" in line and "\n" not in line for line in found)


def test_ray_is_not_replaced_where_it_is_named(broken_ray):
    with ExecutorChoice("ray", LocalClusterConfig()) as choice:
        with pytest.raises(ClusterError, match="avoid Ray with executor=serial") as error:
            list(choice.for_records(1).map_shards(double, [1]))
        assert "\n" not in str(error.value)


# ---- batches -------------------------------------------------------------------------------------


def annotation(frozen, folder, **options):
    """Task of a pass over the frozen store, of which only the batches are read."""
    config = frozen.config
    return AnnotateShard(
        store_path=frozen.store.path,
        folder=folder,
        fields=None,
        fingerprint="",
        teacher=config.teacher,
        classes=tuple(map(str, range(10))),
        explainer=config.explainer,
        config=replace(config.annotate, batch_size=4),
        num_threads=1,
        **options,
    )


def batches_of(task, shard):
    decoding = task._mark(shard, ShardDeaths(task.folder, shard.name))
    task._begin(decoding)
    return task._batches(decoding)


def test_the_next_batches_are_decoded_while_the_teacher_works(tmp_path, frozen, monkeypatch):
    decoded = [threading.Event() for _ in range(4)]
    read = ShardFrames.read

    def note(self, start, stop):
        batch = read(self, start, stop)
        decoded[(self.rows[0] - first) // 4].set()
        return batch

    monkeypatch.setattr(ShardFrames, "read", note)
    shards = frozen.store.shards
    shard = next(shard for shard in shards if shard.records == 16)
    first = frozen.store.rows_of_shard(shards.number_of(shard.name)).start
    batches = batches_of(annotation(frozen, tmp_path), shard)

    next(batches)  # the teacher has only requested the first batch

    assert decoded[1].wait(60)
    assert not decoded[3].is_set()  # memory stays flat, as a shard is not decoded completely
    batches.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_whatever_the_number_of_decoding_threads(tmp_path, frozen, threads):
    task = annotation(frozen, tmp_path, decode_threads=threads)

    for shard in frozen.store.manifest.shards:
        (whole,) = frame_batches(frozen.store, shard, shard.records)
        batches = list(batches_of(task, shard))
        assert [len(batch.frames) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        assert torch.equal(torch.cat([batch.frames for batch in batches]), whole.frames)
        assert torch.equal(torch.cat([batch.heights for batch in batches]), whole.heights)


def events_of_pass(folder, monkeypatch, fail_at=None):
    """Annotate a store, and return which shards are begun and written, in order."""
    events = []
    begin, write = AnnotateShard._begin, shard_tasks.write_pass_shard

    def note_begin(self, decoding):
        events.append(("begin", decoding.shard.name))
        begin(self, decoding)

    def note_write(fields, position, name, *rest, **options):
        events.append(("write", name))
        if len(events) > 1 and name == fail_at:
            raise OSError(28, "No space left on device")
        write(fields, position, name, *rest, **options)

    monkeypatch.chdir(folder)
    precompute.run(replace(pass_config("whole"), teacher=NoModelConfig()))
    monkeypatch.setattr(AnnotateShard, "_begin", note_begin)
    monkeypatch.setattr(shard_tasks, "write_pass_shard", note_write)
    precompute.run(pass_config("whole", outputs=("logits",)))
    return events


def test_the_shard_that_follows_is_begun_before_the_one_before_it_is_written(tmp_path, monkeypatch):
    events = events_of_pass(tmp_path, monkeypatch)
    written = [name for kind, name in events if kind == "write"]
    assert len(written) > 4
    for name, following in itertools.pairwise(written):
        assert events.index(("begin", following)) < events.index(("write", name))


def test_a_shard_that_was_begun_and_is_dropped_leaves_no_mark_of_a_death(tmp_path, monkeypatch):
    store = tmp_path / "store"
    with pytest.raises(OSError, match="No space left"):
        events_of_pass(tmp_path, monkeypatch, fail_at="teacher-000000")
    (folder,) = (store / "teachers").iterdir()
    assert list(folder.glob("commits/.*.deaths")) == []


# ---- uploads beside the work ---------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path):
    with memory_buckets(tmp_path / "cache"):
        yield buckets._client("s3://bucket")


class WriteTwoFiles:
    """Task of a shard that writes its data and then its commit marker."""

    needs_gpu = False

    def __init__(self, sent):
        self.sent = sent
        self.written = []
        self.second = threading.Event()
        self.waiting = []
        """Number of written shards that were not uploaded when each shard began."""

    def __call__(self, shard):
        self.waiting.append(sum(f"marker-{n}" not in self.sent for n in self.written))
        for name in ("data", "marker"):
            file_at(rooted("s3://bucket/store") / f"{name}-{shard}").write(b"x" * shard)
        self.written.append(shard)
        if shard == 2:
            self.second.set()
        return ShardResult(name=str(shard), records=shard, seconds=0.0, report=None)


@pytest.fixture
def sent(monkeypatch):
    """The names of the objects that were uploaded, in their order."""
    names, put = [], buckets.put_object

    def put_object(address, *rest):
        put(address, *rest)
        names.append(address.rpartition("/")[2])

    monkeypatch.setattr(buckets, "put_object", put_object)
    return names


def serially(task, shards):
    yield from SerialExecutor().map_shards(task, shards)


class HandsOut:
    """Gate that hands out the shard of each row in this process."""

    def __init__(self, shards):
        data = list(map(cloudpickle.dumps, shards))
        self.take = SimpleNamespace(remote=lambda row, actor: ShardAssignment(row, 0, data[row]))
        self.begin = self.report = self.say = SimpleNamespace(remote=lambda *values: None)


def in_an_actor(task, shards):
    """Yield results of an actor that takes two calls at once, as Ray Data makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda value: value)
        patch.setattr(ray, "get_runtime_context", MagicMock())
        patch.setattr(_ShardActor, "_task", lambda self, work: task)
        actor = _ShardActor(HandsOut(shards), LocalClusterConfig())
        rows = [{"row": np.array([row])} for row in range(len(shards))]
        with ThreadPoolExecutor(2) as calls:
            for answer in calls.map(actor, rows):
                _, _, result, _ = cloudpickle.loads(answer["answer"][0])
                if not isinstance(result, ShardResult):
                    raise FileError(result.text)
                yield result


@pytest.mark.parametrize("run", [serially, in_an_actor])
def test_a_shard_is_uploaded_while_the_next_one_is_worked_on(bucket, sent, monkeypatch, run):
    task = WriteTwoFiles(sent)
    put, overlapped = buckets.put_object, []

    def put_object(address, *rest):
        if address.endswith("data-1"):
            overlapped.append(task.second.wait(60))
        put(address, *rest)

    monkeypatch.setattr(buckets, "put_object", put_object)
    results = []
    for result in run(task, [1, 2, 3]):
        # What a result reports has been uploaded.
        assert f"marker-{result.name}" in sent
        results.append(result.name)
    assert results == ["1", "2", "3"]
    assert overlapped == [True]
    assert max(task.waiting) == 1
    assert sorted(sent) == sorted(f"{name}-{n}" for name in ("data", "marker") for n in (1, 2, 3))
    assert all(sent.index(f"data-{n}") < sent.index(f"marker-{n}") for n in (1, 2, 3))


@pytest.mark.parametrize("run", [serially, in_an_actor])
def test_an_upload_that_fails_is_an_error_and_its_shard_has_no_marker(
    bucket, sent, monkeypatch, run
):
    put = buckets.put_object

    def put_object(address, *rest):
        if address.endswith("data-1"):
            raise FileError("the first upload fails")
        put(address, *rest)

    monkeypatch.setattr(buckets, "put_object", put_object)
    with pytest.raises(FileError, match="the first upload fails"):
        list(run(WriteTwoFiles(sent), [1, 2]))
    assert not any(name.endswith("-1") for name in sent)


def test_a_task_that_fails_uploads_nothing_of_its_shard_and_what_came_before_it(bucket, sent):
    def task(shard):
        file_at(rooted("s3://bucket/store") / f"data-{shard}").write(b"x")
        if shard == 2:
            raise RecordError("a record")
        return ShardResult(name=str(shard), records=1, seconds=0.0, report=None)

    with pytest.raises(RecordError):
        list(SerialExecutor().map_shards(task, [1, 2]))
    assert sent == ["data-1"]


async def hold_a_shard(gate):
    """Return the one of two shards that an actor has, and its second call, which waits for the other one."""
    await gate.add(1, b"task", [b"a", b"b"])
    first = await gate.take(0, "one")
    second = asyncio.create_task(gate.take(1, "one"))
    await asyncio.sleep(0.01)
    assert not second.done()
    return first, second


def test_an_actor_takes_a_second_shard_only_if_each_idle_actor_is_left_one():
    async def take_shards():
        gate = Gate(0, actors=2)
        _, second = await hold_a_shard(gate)
        other = await gate.take(2, "two")
        await gate.add(2, b"task", [b"c"])
        return other.shard, (await second).shard

    assert asyncio.run(take_shards()) == (b"b", b"c")


def test_an_actor_takes_the_last_shard_once_its_own_is_answered():
    async def take_shards():
        gate = Gate(0, actors=2)
        first, second = await hold_a_shard(gate)
        await gate.answered(first.number)
        return (await second).shard

    assert asyncio.run(take_shards()) == b"b"


def test_a_shard_of_a_row_that_goes_on_elsewhere_is_held_there():
    async def take_shards():
        gate = Gate(0, actors=2)
        _, second = await hold_a_shard(gate)
        second.cancel()
        again = await gate.take(0, "two")  # Ray repeats the row of an actor that died
        return again.shard, (await asyncio.wait_for(gate.take(2, "one"), 60)).shard

    assert asyncio.run(take_shards()) == (b"a", b"b")
