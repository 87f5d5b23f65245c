"""One writer per run: a second training, evaluation or sweep of the same run is refused in one line."""

import os
import subprocess
import sys
import textwrap

import pytest

from permafrost.cli import stage_main
from permafrost.runs.mirrors import RUNS
from permafrost.storage.lock import LockedError, folder_lock
from tests.support.paths import PYTHONPATH
from tests.support.run_corruptions import Runs
from tests.support.runs import distill_config, evaluate_config, save_student
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, evaluate, teach

HOLD = """
    import os, sys, time
    from pathlib import Path
    from permafrost.storage.lock import folder_lock

    with folder_lock(Path(sys.argv[1])):
        runs, tell = os.pipe()
        child = os.fork()  # as a loader's worker, which may live longer than its parent
        if child:
            os.read(runs, 1)  # so that it has let go of the lock, as any child does first
            print(child, flush=True)
        else:
            os.write(tell, b"1")
        time.sleep(600)
"""


@pytest.fixture
def holder():
    """Function that starts a process which holds the lock of a folder, and has a child."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD), folder],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )
        started.append((process, int(process.stdout.readline())))
        return process

    yield hold
    for process, child in started:
        process.kill()
        os.kill(child, 9)
        process.wait()
        process.stdout.close()


def test_a_second_training_of_a_run_is_refused_until_the_first_is_gone(frozen, holder):
    folder = RUNS / "one" / "distill"
    process = holder(folder)
    before = tree_bytes(folder)

    with pytest.raises(
        LockedError, match=r"another process is writing to runs/one/distill; wait .* run$"
    ):
        distill.run(distill_config(frozen))
    assert tree_bytes(folder) == before

    process.kill()
    process.wait()  # its child lives on
    assert distill.run(distill_config(frozen)).trained_epochs == 3


def test_a_teacher_and_an_evaluation_are_locked_too(frozen, tmp_path):
    save_student(frozen, "one")
    with folder_lock(RUNS / "one" / "evaluate"), pytest.raises(LockedError, match="one/evaluate"):
        evaluate.run(evaluate_config(frozen))
    with folder_lock(RUNS / "taught" / "teach"), pytest.raises(LockedError, match="taught/teach"):
        teach.run(Runs(frozen, tmp_path).teach["taught"])


def test_a_sweep_that_is_refused_leaves_the_config_of_the_running_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["permafrost sweep", "experiment=demo", "seeds=[7]"])
    (RUNS / "demo").mkdir(parents=True)
    with folder_lock(RUNS / "demo"), pytest.raises(SystemExit) as end:
        stage_main("sweep")

    assert end.value.code == 1
    assert "another process is writing to runs/demo; wait" in capsys.readouterr().err
    assert not (RUNS / "demo" / "sweep.yaml").exists()
