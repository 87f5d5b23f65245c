"""Jobs that are submitted to a running Ray head, which neither they nor the client started."""

import json
import os
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import from_url

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.functions import run_verb
from permafrost.models.saved import SavedNetwork
from tests.support.buckets import KEYS, contents, files_below, moto_server, names_of
from tests.support.paths import ROOT
from tests.support.processes import descendants, run_program, title, wait_until
from tests.support.ray_nodes import RAY, node_environment, ray_nodes
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute
from tests.support.words import TINY_DATA, TINY_TEACHER

PRECOMPUTE = [
    *(*TINY_DATA, *TINY_TEACHER, "store.shard_size=16", "annotate.batch_size=8"),
    "annotate.outputs=[logits, maps]",  # with a space, which requires quoting
]
SWEEP = [
    *("grid={method.tau: [1, 4]}", "seeds=[0,1]", "parallel=1", "method=kd", "trainer.epochs=1"),
    *("student.name=resnet8", "student.width=4", "trainer.batch_size=8", "evaluate.splits=[test]"),
]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="module")
def server():
    """The environment of a bucket's users."""
    with moto_server() as address:
        yield KEYS | {"AWS_ENDPOINT_URL": address}


@pytest.fixture(scope="module")
def nodes(server, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    # `python` of a job is the first one on the head's path.
    with ray_nodes(PATH=PATH, PERMAFROST_CACHE=str(cache), **server) as nodes:
        nodes.start_head("--num-cpus=2", dashboard=True)
        yield nodes


@pytest.fixture(scope="module")
def head(nodes):
    return nodes.dashboard


def submit(head, folder, verb, *words):
    return run_program(
        [
            *(RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--"),
            *(sys.executable, "-m", f"stages.{verb}", *words),
        ],
        cwd=folder,
        env=node_environment(),
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_writes_what_a_serial_run_writes_and_a_student_learns_from_it(
    head, tmp_path, serial
):
    store = tmp_path / "store"
    paths = [f"store.path={store}", f"run={tmp_path / 'run'}"]
    done = submit(head, tmp_path, "precompute", "cluster=existing", *paths, *PRECOMPUTE)

    assert done.returncode == 0, done.stdout
    assert "teacher_records: 72" in done.stdout
    assert tree_bytes(store) == tree_bytes(serial)

    options = ["method=kd", "trainer.epochs=1", "student.name=resnet8", "student.width=4"]
    ranks = ["trainer.ranks=2", "cluster.cpus_per_rank=0.5", "trainer.batch_size=8"]
    done = submit(head, tmp_path, "distill", "cluster=existing", *paths, *options, *ranks)

    assert done.returncode == 0, done.stdout
    _, trained = SavedNetwork(tmp_path / "run" / "distill").load()
    assert trained.config.width == 4


def make_submit(head, verb, *words):
    return run_program(
        [
            *("make", "submit", f"VERB={verb}", f"ADDRESS={head}"),
            # The environment of this test, which `make install` would otherwise create.
            *("-o", "install", f"PY={sys.executable}", f"ARGS={shlex.join(words)}"),
        ],
        cwd=ROOT,
        env=node_environment(PATH=PATH),
    )


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The folder of the store of a serial run."""
    folder = tmp_path_factory.mktemp("serial") / "store"
    words = [*PRECOMPUTE, f"store.path={folder}", "executor=serial"]
    precompute.run(build_verb_config("precompute", compose("precompute", words)))
    return folder


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.mark.ray
@pytest.mark.slow
@needs_make
def test_make_submit_writes_what_a_serial_run_writes(head, tmp_path, serial, count_trials):
    words = [*PRECOMPUTE, f"store.path={tmp_path / 'made'}", f"run={tmp_path / 'made-run'}"]
    done = make_submit(head, "precompute", *words)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher_records: 72" in done.stdout
    assert tree_bytes(tmp_path / "made") == tree_bytes(serial)
    count_trials("none: `make submit` against a serial run", {"the same bytes": 1})


@pytest.mark.ray
@pytest.mark.slow
@needs_make
def test_make_submit_with_a_bucket_writes_what_a_serial_run_writes(head, server, serial):
    paths = ["store.path=s3://bucket/store", "run=s3://bucket/run"]
    done = make_submit(head, "precompute", *paths, *PRECOMPUTE)
    assert done.returncode == 0, done.stdout + done.stderr
    student = ["method=kd", "trainer.epochs=1", "student.name=resnet8", "student.width=4"]
    trained = make_submit(head, "distill", *paths, *student, "trainer.batch_size=8")
    assert trained.returncode == 0, trained.stdout + trained.stderr

    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        bucket = from_url("s3://bucket", client_options={"allow_http": True})
        assert contents(bucket, "store") == files_below(serial)
        assert "distill/model.safetensors" in names_of(bucket, "run")


@pytest.mark.ray
@pytest.mark.slow
@needs_make
def test_a_sweep_whose_driver_is_killed_is_finished_by_the_same_job(nodes, tmp_path, serial):
    words = [f"store.path={serial}", f"run={tmp_path / 'runs/sw'}", *SWEEP]
    table = tmp_path / "runs/sw/sweep.json"

    def finished():
        return len(json.loads(table.read_text())["runs"]) if table.exists() else 0

    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(make_submit, nodes.dashboard, "sweep", *words)
        wait_until(finished)
        titles = {pid: title(pid) for pid in descendants(nodes.processes[0].pid)}
        (driver,) = [
            pid for pid, text in titles.items() if text.startswith("python -m stages.sweep")
        ]
        os.kill(driver, signal.SIGKILL)
        assert submitted.result().returncode != 0
    before = finished()
    assert 1 <= before < 4

    again = make_submit(nodes.dashboard, "sweep", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert finished() == 4
    assert "trained_now: 4" not in again.stdout
    run_verb("report", *words[:2], "report.contact_records=0", "augment=pad_crop")
    assert len(json.loads((tmp_path / "runs/sw/report.json").read_text())["runs"]) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_fails_says_so_with_the_line_and_the_exit_code_of_its_stage(head, tmp_path):
    words = ("cluster=existing", "teacher=none", "store.path=stores/here")
    done = submit(head, tmp_path, "precompute", *words)

    assert done.returncode == 1
    assert "Job entrypoint command failed with exit code 2" in done.stdout
    assert "store.path=stores/here is relative" in done.stdout
    assert "Traceback" not in done.stdout
