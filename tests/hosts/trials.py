"""Trials of hosts: a command that runs on several, what happens to them, and how it ends.

python -m tests.hosts.trials <trial> <folder> <space>    where `python -m tests.hosts` starts it, in namespaces

The space is an empty folder with a short path, below which the hosts have theirs. The other folder gets the logs in
`<trial>/`, and outcomes and digests of what undisturbed commands made, with which the others are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from obstore.store import from_url

from tests.hosts.machines import Host, connect_hosts, drain, start_ray, start_relay, start_server
from tests.support.buckets import KEYS, contents, names_of

LIMIT_SECONDS = 900
"""Time after which a command counts as one that hangs."""
HANGS = 124
_MAX_REPETITIONS = 3
_STUDENT = ["student=cifar", "student.name=resnet8", "trainer.batch_size=16"]


class Command(NamedTuple):
    """Command of the trials, and what it makes in the bucket."""

    words: list[str]
    result: str
    """Folder of the result."""
    ending: str
    """Ending of the names of the objects that are compared."""
    middle: str
    """Pattern of the names of objects of which there are some in the middle of the command."""
    some: int = 1


PRECOMPUTE = Command(
    [
        *("precompute", "data=demo", "data.train_digits=720", "data.test_digits=8"),
        *("data.test_placements=1", "data.teacher_digits=8", "data.teacher_placements=1"),
        *("teacher=cifar", "teacher.name=resnet20", "teacher.weights=random"),
        *("store.path=s3://bucket/store", "store.shard_size=8"),
    ],
    result="store",
    ending="",
    middle="teachers/.*/commits/",
    some=6,
)
DISTILL = Command(
    [
        *("distill", "store.path=s3://bucket/store", "run=s3://bucket/run", *_STUDENT),
        *("method=kd", "trainer.ranks=2", "trainer.epochs=20", "trainer.checkpoint_every_steps=5"),
    ],
    result="run",
    ending="model.safetensors",
    middle="checkpoint.pt",
)
SWEEP = Command(
    [
        *("sweep", "store.path=s3://bucket/store", "run=s3://bucket/run", *_STUDENT),
        *("variants={kd: [method=kd]}", "seeds=[0,1,2,3,4,5]", "parallel=3"),
        *("trainer.epochs=5", "evaluate.splits=[test]"),
    ],
    result="run",
    ending="model.safetensors",
    middle="model.safetensors",
)


@dataclass
class Outcome:
    """End of a trial."""

    trial: str
    codes: list[int] = field(default_factory=list)
    """Exit codes of the command and of its repetitions."""
    seconds: float = 0.0
    """Seconds from the disturbance, or from the start of an undisturbed command, to the end of the first command."""
    said: list[str] = field(default_factory=list)
    """Warnings and errors."""
    compared: int = 0
    """Number of objects that are compared with those of the undisturbed command."""
    differing: list[str] = field(default_factory=list)
    """Names of those that differ, or that only one of both has."""


class World:
    """Hosts with Ray, and one with a server of S3."""

    def __init__(self, folder: Path, logs: Path, workers: int, gpus: int) -> None:
        self.folder = folder
        self.logs = logs
        self._hosts = 0
        self.server = self.host("server")
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": start_server(self.server, logs)}
        self.bucket = from_url("s3://bucket", client_options={"allow_http": True})
        self.head = self.host("head")
        start_ray(self.head, self.head, 0, logs)
        self.workers = [self.join(int(number < gpus)) for number in range(workers)]

    def host(self, name: str) -> Host:
        """Add a host without Ray."""
        self._hosts += 1
        return Host(name, self._hosts, self.folder)

    def join(self, gpus: int = 0) -> Host:
        """Add a host with one CPU, which joins the cluster."""
        host = self.host(f"worker{self._hosts - 1}")
        start_ray(host, self.head, 1, self.logs, gpus)
        return host

    def start(self, words: list[str], host: Host) -> subprocess.Popen[str]:
        """Start a command on a host."""
        command = [sys.executable, "-m", "permafrost", *words]
        address = os.environ["AWS_ENDPOINT_URL"]
        return host.start(command, self.logs / "command.log", AWS_ENDPOINT_URL=address)

    def run(self, words: list[str], host: Host) -> int:
        """Run a command on a host and return its exit code, HANGS if it does not end in time."""
        return self.wait(self.start(words, host), host)

    def wait(self, process: subprocess.Popen[str], host: Host) -> int:
        """Wait for a command of a host and return its exit code, HANGS if it does not end in time."""
        try:
            return process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in host.pids("-m permafrost"):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            return HANGS

    def digests(self, command: Command) -> dict[str, str]:
        """Return the SHA-256 of what a command made, by the names of the objects."""
        made = contents(self.bucket, command.result)
        kept = {name: data for name, data in made.items() if name.endswith(command.ending)}
        return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(kept.items())}


class Trial(NamedTuple):
    """Trial of hosts."""

    says: str
    """Words of its row."""
    command: Command
    disturb: Callable[[World], None] | None = None
    """Event in the middle of the command; None for nothing."""
    workers: int = 2
    gpus: int = 0
    """Number of workers that have a GPU, the first ones."""
    actors: int = 2
    """Number of actors of precompute."""
    options: tuple[str, ...] = ()
    """Further options of the first command."""
    driver: int | None = None
    """Number of the worker on which the first command runs, of which the last one repeats it; None for the head."""
    before_repetition: Callable[[World], object] | None = None


def run_trial(name: str, trial: Trial, world: World) -> Outcome:
    """Run the command of a trial, repeated until it succeeds."""
    if trial.command is not PRECOMPUTE:
        words = [*PRECOMPUTE.words, "executor=serial"]
        assert world.run(words, world.head) == 0, "no store was made"
    words = [*trial.command.words, "cluster=existing", f"cluster.address={world.head.address}:6379"]
    if trial.command is PRECOMPUTE:
        words.append(f"cluster.actors={trial.actors}")
    host = world.head if trial.driver is None else world.workers[trial.driver]
    other = world.head if trial.driver is None else world.workers[-1]
    process = world.start([*words, *trial.options], host)
    outcome, started, ended = Outcome(name), time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(world.wait, process, host)
        code.add_done_callback(lambda _: ended.append(time.monotonic()))
        if trial.disturb is not None:
            while not is_in_the_middle(world, trial.command):
                assert not code.done(), "the command ended before it was disturbed"
                time.sleep(0.2)
            started = time.monotonic()
            trial.disturb(world)
        outcome.codes.append(code.result())
    outcome.seconds = ended[0] - started
    if outcome.codes[-1] and trial.before_repetition is not None:
        trial.before_repetition(world)
    while outcome.codes[-1] and len(outcome.codes) <= _MAX_REPETITIONS:
        outcome.codes.append(world.run(words, other))
    return outcome


def is_in_the_middle(world: World, command: Command) -> bool:
    """Return whether a command has made what is there in its middle."""
    names = names_of(world.bucket, command.result)
    return sum(re.search(command.middle, name) is not None for name in names) >= command.some


def compare(outcome: Outcome, trial: Trial, world: World, folder: Path) -> None:
    """Compare what a command made with what it made undisturbed, which is kept in the folder."""
    made, expected_file = world.digests(trial.command), folder / f"{trial.command.words[0]}.json"
    if trial.disturb is None:
        assert outcome.codes == [0], f"the undisturbed command ended with {outcome.codes[0]}"
        expected_file.write_text(json.dumps(made))
    expected = json.loads(expected_file.read_text())
    outcome.compared = len(expected)
    names = sorted({*made, *expected})
    outcome.differing = [each for each in names if made.get(each) != expected.get(each)]


# ---- disturbances ----------------------------------------------------------------------------------


def lose_worker(world: World) -> None:
    """Kill a host that works."""
    _working(world)[0].kill()


def lose_other_worker(world: World) -> None:
    """Kill the last host that works."""
    _working(world)[-1].kill()


def leave_alone(world: World) -> None:
    """Do nothing."""


def lose_last_host(world: World) -> None:
    """Kill a host that decodes."""
    world.workers[-1].kill()


def take_away(world: World) -> None:
    """Announce that a host that works will be taken away after 10 seconds, and do so."""
    host = _working(world)[0]
    drain(host, world.head, 10, world.logs)
    time.sleep(10)
    host.kill()


def kill_rank(world: World) -> None:
    """Kill one rank."""
    os.kill(_working(world)[-1].pids(_RANK)[0], signal.SIGKILL)


def cut_for_good(world: World) -> None:
    """Cut the link of a host that works."""
    _working(world)[0].cut()


def cut_for_a_time(world: World) -> None:
    """Cut the link of a host that works for 30 seconds."""
    _cut(_working(world)[0], 30)


def cut_for_a_time_and_restart(world: World) -> None:
    """Cut the link of a host that works for 30 seconds, and start its Ray again when that has ended itself for it."""
    host = _working(world)[0]
    _cut(host, 30)
    until = time.monotonic() + 60
    while host.pids("raylet/raylet"):
        if time.monotonic() > until:  # Ray has not noticed
            return
        time.sleep(0.5)
    start_ray(host, world.head, 1, world.logs)


def cut_server(world: World) -> None:
    """Cut the server's link for 40 seconds."""
    _cut(world.server, 40)


def lose_frames(world: World) -> None:
    """Lose 20 % of the frames of all workers, and delay a round trip by 300 ms, for 60 seconds."""
    for host in world.workers:
        host.lose_frames(0.2, 0.15)
    time.sleep(60)
    for host in world.workers:
        host.mend()


def refuse(seconds: float) -> Callable[[World], None]:
    """Return a disturbance by a server that drops and refuses all connections for so long."""

    def disturb(world: World) -> None:
        for pid in world.server.pids("relay.py"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(seconds)
        start_relay(world.server, world.logs)

    return disturb


def join_workers(world: World) -> None:
    """Add a host."""
    world.workers.append(world.join())


def kill_rank_often(world: World) -> None:
    """Kill the rank of one host as soon as it has loaded torch, 20 times. No later one may fail to load it."""
    killed: list[int] = []
    while len(killed) < 20:
        killed.append(_wait_for_rank(world, killed))
        os.kill(killed[-1], signal.SIGKILL)
    _wait_for_rank(world, killed)
    failed = world.workers[0].find("oneMKL|cannot load|cannot open shared object")
    assert not failed, failed
    assert world.workers[0].find("core_worker"), "these are no logs"


def _wait_for_rank(world: World, killed: list[int]) -> int:
    """Return the process of a rank that has loaded torch and is none of those that were killed."""
    while True:
        for pid in set(world.workers[0].pids(_RANK)) - {*killed}:
            with suppress(OSError):
                if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
                    return pid
        time.sleep(0.2)


_RANK = "RayTrainWorker"
_WORK = ("_ShardActor", _RANK, "kd-seed")
"""Words of Ray's titles of processes that work. That of a student is its name."""


def _working(world: World) -> list[Host]:
    """Return the workers that work, once there are any. Fails if there are none for a minute."""
    until = time.monotonic() + 60
    while True:
        assert time.monotonic() < until, "no host works"
        busy = [host for host in world.workers if any(host.pids(word) for word in _WORK)]
        if busy:
            return busy
        time.sleep(0.2)


def _cut(host: Host, seconds: float) -> None:
    host.cut()
    time.sleep(seconds)
    host.mend()


# ---- the trials ------------------------------------------------------------------------------------


_SHORT_WAIT = ("cluster.max_wait_seconds=20",)
_DECODING = (3, 1, 1, ("cluster.decode=hosts",))
"""Three workers, one GPU, one actor on it, and the option by which others decode."""
TRIALS = {
    "precompute": Trial("precompute, undisturbed", PRECOMPUTE),
    "lost-worker": Trial("a worker's host killed", PRECOMPUTE, lose_worker),
    "cut-30": Trial("a worker's link cut for 30 s", PRECOMPUTE, cut_for_a_time),
    "cut": Trial("a worker's link cut for good", PRECOMPUTE, cut_for_good),
    "loss": Trial("20 % of the frames lost, 300 ms, for 60 s", PRECOMPUTE, lose_frames),
    "refuse-5": Trial("the server refuses for 5 s", PRECOMPUTE, refuse(5)),
    "refuse-20": Trial("the server refuses for 20 s", PRECOMPUTE, refuse(20)),
    "refuse-60": Trial("the server refuses for 60 s", PRECOMPUTE, refuse(60)),
    "cut-server": Trial("the server's link cut for 40 s", PRECOMPUTE, cut_server),
    "join": Trial("a host joins", PRECOMPUTE, join_workers, workers=1),
    "lost-driver": Trial("the driver's host killed", PRECOMPUTE, lose_worker, driver=0),
    "drain": Trial(
        "a worker's host taken away 10 s after it was announced, no death allowed",
        *(PRECOMPUTE, take_away),
        options=("cluster.max_restarts=0",),
    ),
    "decode": Trial("two hosts decode for one with a GPU", *(PRECOMPUTE, leave_alone), *_DECODING),
    "lost-decoder": Trial("one of these killed", *(PRECOMPUTE, lose_last_host), *_DECODING),
    "no-decoder": Trial(
        "no host has a core to decode", *(PRECOMPUTE, leave_alone, 1), *_DECODING[1:]
    ),
    "distill": Trial("distill on two ranks, undisturbed", DISTILL),
    "rank": Trial("a rank killed", DISTILL, kill_rank),
    "lost-rank": Trial("a rank's host killed, with a spare", DISTILL, lose_worker, workers=3),
    "lost-rank-2": Trial("the other one's, with a spare", DISTILL, lose_other_worker, workers=3),
    "lost-rank-alone": Trial(
        "a rank's host killed, replaced for the repetition",
        *(DISTILL, lose_worker),
        options=_SHORT_WAIT,
        before_repetition=join_workers,
    ),
    "lost-rank-2-alone": Trial(
        "the other one's, replaced for the repetition",
        *(DISTILL, lose_other_worker),
        options=_SHORT_WAIT,
        before_repetition=join_workers,
    ),
    "cut-rank": Trial("a rank's link cut for good, with a spare", DISTILL, cut_for_good, workers=3),
    "cut-rank-30": Trial(
        "a rank's link cut for 30 s, Ray started again", DISTILL, cut_for_a_time_and_restart
    ),
    "ranks-20": Trial(
        "20 ranks killed, one after the other",
        *(DISTILL, kill_rank_often),
        options=("cluster.max_restarts=40",),
    ),
    "sweep": Trial("sweep of six on three hosts, undisturbed", SWEEP, workers=3),
    "lost-student": Trial("a student's host killed", SWEEP, lose_worker, workers=3),
}
"""Trials by name. The undisturbed one of a command precedes the others."""
_LOUD = re.compile(
    r"\b(warning|error|Traceback|permafrost.(ray|buckets))\b(?!.*(classes_of_one_split|teachers: ))",
    re.IGNORECASE,
)
"""Lines that warn or name an error, except of what the demo's few records lack."""


def lines_said(log: Path) -> list[str]:
    """Return the lines of a command's output that warn or name an error, without their times."""
    lines = [line for line in log.read_text().splitlines() if _LOUD.search(line)]
    return [re.sub(r"^[0-9:]+ permafrost\.\w+: ", "", line) for line in lines]


def main(name: str, folder: Path, space: Path) -> None:
    trial, logs = TRIALS[name], folder / name
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    connect_hosts()
    world = World(space / "host", logs, trial.workers, trial.gpus)
    outcome = run_trial(name, trial, world)
    compare(outcome, trial, world, folder)
    outcome.said = lines_said(logs / "command.log")
    (folder / f"{name}.outcome.json").write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
