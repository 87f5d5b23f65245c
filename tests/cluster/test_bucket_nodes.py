"""Two Ray nodes without a shared folder: each has its own cache and working folder, and all they share is a bucket."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from obstore.store import from_url

from tests.support.buckets import KEYS, contents, files_below, moto_server, names_of
from tests.support.paths import PYTHONPATH
from tests.support.processes import run_program
from tests.support.ray_nodes import lose, node_environment, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.ray]

DATA = [
    "data=demo",
    "data.train_digits=80",
    "data.test_digits=8",
    "data.test_placements=1",
    "data.teacher_digits=8",
    "data.teacher_placements=1",
    "store.shard_size=8",
]
TEACHER = ["teacher=cifar", "teacher.name=resnet8", "teacher.weights=random"]
STUDENT = ["student=cifar", "student.name=resnet8", "trainer.epochs=2", "trainer.batch_size=16"]


def permafrost(
    folder: Path, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess:
    """Run a command in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return run_program([sys.executable, "-m", "permafrost", *words], cwd=folder, env=environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A bucket, two nodes with folders of their own, and what a driver needs to use both."""
    folder = tmp_path_factory.mktemp("nodes")
    with moto_server() as server:
        shared = KEYS | {"AWS_ENDPOINT_URL": server}
        with ray_nodes(PYTHONPATH=PYTHONPATH, **shared) as nodes:
            nodes.start_head("--num-cpus=0", dashboard=False)
            started = [
                nodes.start_node("--num-cpus=1", PERMAFROST_CACHE=str(folder / f"cache{number}"))
                for number in range(2)
            ]
            driver = node_environment(
                PYTHONPATH=PYTHONPATH, PERMAFROST_CACHE=str(folder / "cache-driver"), **shared
            )
            words = ["cluster=existing", f"cluster.address={nodes.address}"]
            yield folder, nodes, started, driver, words


@pytest.fixture(scope="module")
def bucket(cluster):
    """Client of the bucket."""
    _, _, _, driver, _ = cluster
    with pytest.MonkeyPatch.context() as patch:
        for name in (*KEYS, "AWS_ENDPOINT_URL"):
            patch.setenv(name, driver[name])
        return from_url("s3://bucket", client_options={"allow_http": True})


@pytest.fixture(scope="module")
def local(cluster):
    """The same store of one process without Ray."""
    folder, _, _, driver, _ = cluster
    made = permafrost(
        folder / "local",
        driver,
        "precompute",
        *DATA,
        *TEACHER,
        "store.path=store",
        "executor=serial",
    )
    assert made.returncode == 0, made.stderr
    return folder / "local" / "store"


def test_a_node_that_is_lost_in_the_middle_is_made_up_for_and_the_bytes_are_those_of_one_process(
    cluster, bucket, local
):
    folder, nodes, started, driver, words = cluster
    command = [
        "precompute",
        *DATA,
        *TEACHER,
        "store.path=s3://bucket/store",
        "executor=ray",
        "cluster.actors=2",
        *words,
    ]
    results = []
    thread = threading.Thread(
        target=lambda: results.append(permafrost(folder / "driver", driver, *command))
    )
    thread.start()
    while not any("teachers" in name for name in names_of(bucket, "store")):
        assert thread.is_alive(), results
        time.sleep(0.2)  # the server has only this machine
    lose(started[0])
    nodes.start_node("--num-cpus=1", PERMAFROST_CACHE=str(folder / "cache2"))
    thread.join()
    while results[-1].returncode:  # lost shards are named, and the same command goes on
        assert "same command again" in results[-1].stderr, results[-1].stderr
        assert len(results) < 4
        results.append(permafrost(folder / "driver", driver, *command))
    assert contents(bucket, "store") == files_below(local)
    assert not list((folder / "driver").rglob("*.tar"))


def test_students_of_a_sweep_on_both_nodes_are_those_of_one_process(cluster, bucket, local):
    folder, _, _, driver, words = cluster
    variants = [
        "variants={kd: [method=kd], e2kd: [method=e2kd]}",
        "seeds=[0,1]",
        "evaluate.splits=[test]",
    ]
    swept = permafrost(
        folder / "driver",
        driver,
        "sweep",
        "store.path=s3://bucket/store",
        "run=s3://bucket/runs/sweep",
        "executor=ray",
        "parallel=2",
        *STUDENT,
        *variants,
        *words,
    )
    assert swept.returncode == 0, swept.stderr
    own = permafrost(
        folder / "local",
        driver,
        "sweep",
        "store.path=store",
        "run=sweep",
        "executor=serial",
        *STUDENT,
        *variants,
    )
    assert own.returncode == 0, own.stderr
    made = contents(bucket, "runs/sweep/students")
    weights = {n: data for n, data in made.items() if n.endswith("model.safetensors")}
    expected = files_below(folder / "local" / "runs" / "sweep" / "students")
    assert sorted(weights.values()) == sorted(
        data for name, data in expected.items() if name.endswith("model.safetensors")
    )
    assert len(weights) == 4
    page = permafrost(
        folder / "driver",
        driver,
        "report",
        "store.path=s3://bucket/store",
        "run=s3://bucket/runs/sweep",
    )
    assert page.returncode == 0, page.stderr
    assert "report.html" in contents(bucket, "runs/sweep")


def test_a_student_of_two_ranks_on_two_nodes_is_finished_on_another_machine(tmp_path):
    """These nodes are their own: on those of which one was lost, Ray Train's workers die while they are created."""
    with moto_server() as server:
        shared = KEYS | {"AWS_ENDPOINT_URL": server}
        with ray_nodes(PYTHONPATH=PYTHONPATH, **shared) as nodes:
            nodes.start_head("--num-cpus=0", dashboard=False)
            for number in range(2):
                cache = str(tmp_path / f"cache{number}")
                nodes.start_node("--num-cpus=1", PERMAFROST_CACHE=cache)
            driver = node_environment(
                PYTHONPATH=PYTHONPATH, PERMAFROST_CACHE=str(tmp_path / "driver"), **shared
            )
            store, run = "store.path=s3://bucket/store", "run=s3://bucket/runs/ranks"
            made = permafrost(
                tmp_path / "a", driver, "precompute", *DATA, *TEACHER, store, "executor=serial"
            )
            assert made.returncode == 0, made.stderr
            command = ["distill", store, run, "method=kd", *STUDENT, "trainer.ranks=2"]
            words = ["cluster=existing", f"cluster.address={nodes.address}"]
            trained = permafrost(tmp_path / "a", driver, *command, *words)
            assert trained.returncode == 0, trained.stderr
            assert "trained_epochs: 2" in trained.stdout
        elsewhere = driver | {"PERMAFROST_CACHE": str(tmp_path / "elsewhere")}
        again = permafrost(tmp_path / "b", elsewhere, *command)
        assert again.returncode == 0, again.stderr
        assert "trained_epochs: 0" in again.stdout
