"""Table of job arrays whose tasks are killed: do they end with the bytes of an undisturbed run?

    python -m tests.cluster.kill_array DATA                all of CIFAR-10 (DATA/cifar10) and photographs (DATA/photos)
    python -m tests.cluster.kill_array DATA 10 3           ten kills in each row, with seed 3

Tasks are processes that are forked from one that has imported torch. At random moments one of them gets SIGKILL, or all
of them, and others begin later in their place. Claims expire after a second in place of a minute. The bucket is that of
moto's server. In the last rows two teachers run over one store at once, and one task may write no file above a limit,
as on a full disk.
"""

import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import obstore

from permafrost.storage import lock
from permafrost.store.verification import verify_store
from tests.support.buckets import KEYS, moto_server
from tests.support.processes import fork_server
from tests.support.trees import tree_bytes

COLUMNS = "data store tasks teachers kills all_killed starts seconds same_bytes verified left_over"
EXPIRY_SECONDS = 1.0


def run_task(words, part, output, limit=None, expiry=EXPIRY_SECONDS):
    """Run precompute as a task of an array, or alone without a part, in a process of its own."""
    os.setsid()
    lock.EXPIRY_SECONDS, lock.RENEWAL_SECONDS = expiry, expiry / 5
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from permafrost.__main__ import main

    how = [f"cluster.part={part}", "executor=array"] if part else ["executor=serial"]
    sys.argv = ["permafrost", "precompute", *words, *how]
    main()


class Array:
    """Tasks of a job array, each with one of several lists of options."""

    def __init__(self, folder, lists, tasks, expiry=EXPIRY_SECONDS):
        self.folder, self.lists, self.tasks = folder, lists, tasks
        self.processes, self.expiry = {}, expiry
        self.starts = 0

    def start(self, number, limit=None):
        words = self.lists[number % len(self.lists)]
        part = f"{number // len(self.lists) + 1}/{-(-self.tasks // len(self.lists))}"
        output = self.folder / f"task-{number}.log"
        arguments = words, part, output, limit, self.expiry
        process = fork_server().Process(target=run_task, args=arguments)
        process.start()
        self.processes[number] = process
        self.starts += 1

    def living(self):
        return [number for number, process in self.processes.items() if process.is_alive()]

    def kill(self, numbers):
        for number in numbers:
            self.processes[number].kill()
            self.processes[number].join()

    def wait(self):
        """Wait for all tasks, and return their exit codes."""
        for process in self.processes.values():
            process.join()
        return [process.exitcode for process in self.processes.values()]


def disturb(array, kills, generator, pause, limit=None):
    """Kill tasks at random moments, start others in their place, and return how often all were killed.

    limit  largest file in bytes that the first start of the first task may write
    """
    of_all = 0
    for number in range(array.tasks):
        array.start(number, limit if number == 0 else None)
    for _ in range(kills):
        time.sleep(generator.expovariate(1 / pause))
        living = array.living()
        if generator.random() < 0.2 and living:
            of_all += 1
            array.kill(living)
        elif living:
            array.kill([generator.choice(living)])
        for number in set(range(array.tasks)) - set(array.living()):
            if generator.random() < 0.8 or not array.living():
                array.start(number)
    for number in set(range(array.tasks)) - set(array.living()):
        array.start(number)
    return of_all


def files_of(store):
    """Bytes of the files of a store without locks, which stay and are empty."""
    files = tree_bytes(store).items()
    return {name: data for name, data in files if not name.endswith(".lock")}


def compare(store, reference):
    """Return whether a store has the expected bytes, what verify says, and which files are left over."""
    made, wanted = files_of(store), files_of(reference)
    same = all(made.get(name) == data for name, data in wanted.items())
    return same, list(verify_store(store)), sorted(made.keys() - wanted.keys())


def photograph_words(data, folder):
    return [
        *("data=image_folder", f"data.path={data / 'photos'}", "store.format=jpeg95"),
        *("store.image_size=64", "store.shard_size=10", f"store.path={folder}"),
    ]


def cifar_words(data, folder):
    return [
        *("data=webdataset", f"data.path={data / 'cifar10'}", "data.reference=never"),
        *("store.shard_size=500", f"store.path={folder}"),
    ]


def teacher_words(data, name="resnet20"):
    weights = next((data / "weights").glob(f"{name}*"))
    return ["teacher=cifar", f"teacher.name={name}", f"teacher.weights={weights}"]


def trial(kind, place, tasks, kills, seed, data, folder, teachers=("resnet20",), limit=None):
    """Run an array with kills, and return a row of the table."""
    words_of = {"photographs": photograph_words, "CIFAR-10": cifar_words}[kind]
    reference = folder / f"serial-{kind}-{'-'.join(teachers)}"
    if not reference.exists():
        for name in teachers:
            words = [*words_of(data, reference), *_teacher_words(kind, data, name)]
            process = fork_server().Process(target=run_task, args=(words, "", folder / "s.log"))
            process.start()
            process.join()
            assert process.exitcode == 0, (folder / "s.log").read_text()
    generator = random.Random(seed)
    here = Path(tempfile.mkdtemp(dir=folder))
    store = "s3://bucket/store" if place == "bucket" else here / "store"
    lists = [[*words_of(data, store), *_teacher_words(kind, data, name)] for name in teachers]
    started = time.monotonic()
    array = Array(here, lists, tasks)
    of_all = disturb(array, kills, generator, 1.0 if kind == "photographs" else 3.0, limit)
    codes = array.wait()
    for _ in range(3):  # the next start of what has failed
        if not any(codes):
            break
        for number in range(tasks):
            array.start(number)
        codes = array.wait()
    seconds = time.monotonic() - started
    copy = _downloaded(here) if place == "bucket" else store
    same, problems, left = compare(copy, reference)
    cells = [
        *(kind, place, tasks, len(teachers), kills, of_all, array.starts, round(seconds)),
        *(same and not any(codes), not problems, ", ".join(left) or "nothing"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _teacher_words(kind, data, name):
    more = ["teacher.classes=10"] if kind == "photographs" else []
    return [*teacher_words(data, name), *more]


def _downloaded(here):
    """Copy the objects of the bucket's store to a folder, and remove them from the bucket."""
    store = obstore.store.S3Store(
        "bucket",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
    )
    for block in obstore.list(store, "store"):
        for meta in block:
            path = here / "copy" / meta["path"].partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(obstore.get(store, meta["path"]).bytes()))
            obstore.delete(store, meta["path"])
    return here / "copy"


def main(data, kills=25, seed=0):
    names = [name.replace("_", " ") for name in COLUMNS.split()]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    two = ("resnet20", "resnet56")
    rows = [
        *(
            ("photographs", place, tasks, ("resnet20",), None)
            for place in ("folder", "bucket")
            for tasks in (4, 16)
        ),
        *(("CIFAR-10", place, 4, ("resnet20",), None) for place in ("folder", "bucket")),
        ("photographs", "folder", 8, two, None),
        ("photographs", "folder", 4, ("resnet20",), 20_000),
    ]
    with tempfile.TemporaryDirectory() as folder, moto_server() as server:
        os.environ.update(
            KEYS, AWS_ENDPOINT_URL=server, AWS_ALLOW_HTTP="true", PERMAFROST_CACHE=f"{folder}/cache"
        )
        for kind, place, tasks, teachers, limit in rows:
            row = trial(kind, place, tasks, kills, seed, data, Path(folder), teachers, limit)
            print(row, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
