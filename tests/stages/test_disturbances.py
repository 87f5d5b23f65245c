"""Signals, kills and faults of the system at random moments of the verbs: one line, whole files, the same bytes."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter, defaultdict
from multiprocessing import forkserver

import numpy as np
import pytest
from obstore.store import S3Store

from tests.support.buckets import KEYS, moto_server
from tests.support.connections import WHY_NOT
from tests.support.disturbances import ON_RAY, VERBS, Fault, Signal, World, signals
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
PLAIN = [name for name in VERBS if name not in (*ON_RAY, "bucket")]
EFFECTS = {
    "full": "no room on the disk from a call on",
    "quota": "quota exceeded from a call on",
    "disk": "input/output error of one call",
    "dead": "input/output error from a call on",
    "readonly": "disk made read-only",
    "short": "a third of the bytes at once",
    "stale": "stale handle of one file, as of NFS",
    "lost": "answer lost to one rename or removal, as of NFS",
    "nolock": "no locks",
    "open": "too many open files from a call on",
    "clock": "clock set back by an hour",
}
"""Effects of file_faults.c, and their names in the table."""
WRITING = [name for name in PLAIN if name != "verify"]


@pytest.fixture
def report(count_trials):
    """Function that runs trials in a world, puts them into the table, and fails if one is wrong."""

    def run(world, trials, kind):
        outcomes, wrong = defaultdict(Counter), []
        for name, disturbance in trials:
            outcome = world.trial(name, disturbance)
            print(outcome, flush=True)
            outcomes[kind(name, disturbance)][outcome.result] += 1
            wrong += [outcome] if outcome.faults else []
        for row, counted in outcomes.items():
            count_trials(row, counted)
        assert wrong == []
        return outcomes

    return run


def test_signals_end_every_verb_and_lose_nothing(tmp_path, report):
    names = ["precompute", "teach", "distill", "evaluate", "sweep", "report", "verify"]
    trials = signals(names, 42, 881, [signal.SIGTERM, signal.SIGINT])

    outcomes = report(World(tmp_path, names), trials, lambda name, _: name)

    assert {"ended with 143", "ended with 130"} <= set().union(*outcomes.values())


def test_killed_verbs_are_repeated_with_the_same_bytes(tmp_path, report):
    names = [*PLAIN, "bucket"]
    with moto_server() as server:
        variables = KEYS | {"AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true"}
        keys = {name.removeprefix("AWS_").lower(): value for name, value in KEYS.items()}
        bucket = S3Store("bucket", endpoint=server, client_options={"allow_http": True}, **keys)
        trials = signals(names, 6 * len(names), 126, [signal.SIGKILL])
        report(
            World(tmp_path, names, bucket, variables), trials, lambda name, _: f"SIGKILL of {name}"
        )


@pytest.mark.ray
def test_killed_processes_of_ray_are_made_up_for(tmp_path, report):
    random = np.random.default_rng(126)
    victims = ["", "permafrost precompute", "MapWorker", "Gate", "raylet", "gcs_server"]
    trials = [
        ("two actors", Signal(signal.SIGKILL, float(random.uniform(0.2, 1)), victim))
        for _ in range(3)
        for victim in victims
    ]
    world = World(tmp_path, ["two actors"])
    report(world, trials, lambda _, each: f"SIGKILL on Ray of {each.victim or 'all'}")


@pytest.fixture
def preloaded(tmp_path, monkeypatch):
    """Let the processes of this test ask file_faults.c before they ask the system."""
    library = tmp_path / "file_faults.so"
    source = ROOT / "tests/support/file_faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    forkserver._forkserver._stop()  # the next one is started with the library
    yield
    forkserver._forkserver._stop()


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("effect", EFFECTS)
def test_a_fault_of_the_system_is_one_line_and_a_repeat_has_the_same_bytes(
    tmp_path, report, preloaded, effect
):
    random = np.random.default_rng(126)
    trials = [(name, Fault(effect, float(random.uniform()))) for _ in range(3) for name in WRITING]
    report(World(tmp_path, WRITING), trials, lambda _, each: EFFECTS[each.effect])


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_place_for_temporary_files_or_shared_memory_without_room_is_one_line(
    tmp_path, report, preloaded
):
    places = {str(tmp_path / "trial-tmp"): "TMPDIR", "/dev/shm": "/dev/shm"}
    trials = [(name, Fault("full", 0, root)) for root in places for name in WRITING]
    report(World(tmp_path, WRITING), trials, lambda _, each: f"no room in {places[each.root]}")
