"""GPUs of teachers, ranks and students, on a Ray with logical GPUs, which needs none of a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from permafrost.cluster import placement, session
from permafrost.cluster.placement import (
    ClusterError,
    ClusterGpus,
    Request,
    count_actors,
    gpus_each,
    place_actors,
)
from permafrost.cluster.ray_executor import RayExecutor
from permafrost.cluster.ray_training import _request
from permafrost.cluster.session import ray_session
from permafrost.config.cluster import ExistingClusterConfig, LocalClusterConfig, NodeOptions
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.core.tasks import ShardResult, Subject
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.processes import wait_until
from tests.support.ray_nodes import node_environment, ray_nodes


@pytest.mark.parametrize(
    ("option", "share"),
    [
        ("gpus_per_actor", 0.6),
        ("gpus_per_actor", 0.3),
        ("gpus_per_actor", 2),
        ("gpus_per_student", 1.5),
        ("gpus_per_student", 0.7),
        ("gpus_per_rank", 0.5),
        ("gpus_per_rank", 2),
    ],
)
def test_shares_that_leave_gpus_idle_or_put_two_ranks_on_one_are_refused(option, share):
    with pytest.raises(ConfigError, match=f"cluster.{option}={share}.*(idle|NCCL)"):
        LocalClusterConfig(**{option: share})


@pytest.mark.parametrize("share", [None, 0, 1, 0.5, 0.25, 0.33, 1 / 3, 0.1])
def test_even_shares_are_taken(share):
    assert LocalClusterConfig(gpus_per_actor=share).gpus_per_actor == share


@pytest.mark.parametrize(
    ("actors", "up", "most", "share"),
    [
        (1, 0, 0, 0),
        (4, 0, 8, 1),  # of hosts that are to come
        (4, 1, 4, 1),  # one of four is up
        (8, 8, 8, 1),
        (2, 8, 8, 1),
        (16, 8, 8, 0.5),
        (3, 1, 1, 1 / 3),
    ],
)
def test_teachers_share_the_gpus_of_all_hosts(monkeypatch, actors, up, most, share):
    monkeypatch.setattr(ClusterGpus, "read_session", lambda: ClusterGpus(up, most))
    assert place_actors(ExistingClusterConfig(actors=actors), actors) == share


def test_teachers_that_would_leave_gpus_idle_are_refused(monkeypatch):
    monkeypatch.setattr(ClusterGpus, "read_session", lambda: ClusterGpus(8, 8))
    with pytest.raises(ConfigError, match=r"cluster.actors=12 .* 8 GPUs .* set it to 8 or 16"):
        place_actors(ExistingClusterConfig(actors=12), 12)


def test_the_line_of_a_pass_names_what_is_asked_for_and_what_there_is(monkeypatch, caplog):
    monkeypatch.setattr(ClusterGpus, "read_session", lambda: ClusterGpus(8, 16))
    with caplog.at_level("INFO"):
        place_actors(ExistingClusterConfig(), 1)
    assert caplog.messages == [
        "teachers: cluster.actors=1, cluster.gpus_per_actor=1; GPUs of the cluster: 8, more to come, of which 7 stay "
        "idle"
    ]


def test_all_gpus_of_this_machine_are_used_and_of_a_cluster_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(placement, "count_local_gpus", lambda: 8)
    assert count_actors(LocalClusterConfig()) == 8
    assert count_actors(LocalClusterConfig(actors=2)) == 2
    assert count_actors(ExistingClusterConfig()) == 1
    monkeypatch.setattr(placement, "count_local_gpus", lambda: 0)
    assert count_actors(LocalClusterConfig()) == 1


@pytest.mark.parametrize(
    ("device", "option", "most", "gpus"),
    [
        ("auto", None, 0, 0),
        ("auto", None, 2, 1),
        ("auto", 0, 2, 0),
        ("cuda", None, 0, 1),  # the ranks wait for hosts with GPUs
        ("cpu", None, 2, 0),
    ],
)
def test_ranks_get_a_gpu_each(monkeypatch, device, option, most, gpus):
    monkeypatch.setattr(ClusterGpus, "read_session", lambda: ClusterGpus(0, most))
    job = SimpleNamespace(trainer=TrainerOptions(device=device, ranks=2))
    request = _request(job, LocalClusterConfig(gpus_per_rank=option))
    assert request.gpus == gpus


def test_ranks_on_one_named_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"trainer.device=cuda:1 is one device"):
        TrainerOptions(device="cuda:1", ranks=2)
    job = SimpleNamespace(trainer=TrainerOptions(device="cuda", ranks=2))
    with pytest.raises(ConfigError, match=r"trainer.device=cuda, but cluster.gpus_per_rank=0"):
        _request(job, LocalClusterConfig(gpus_per_rank=0))


# ---- nodes that are large enough -------------------------------------------------------------------


NODE = {
    "Alive": True,
    "Resources": {"CPU": 4.0, "memory": 8e9, "disk": 2.0},
    "Labels": {"zone": "a"},
}
GPU_NODE = {**NODE, "Resources": {"CPU": 2.0, "GPU": 1.0, "accelerator_type:A100": 1.0}}


@pytest.mark.parametrize(
    ("request_", "fits"),
    [
        (Request("actor", 4), True),
        (Request("actor", 5), False),
        (Request("actor", 2, 1), True),
        (Request("actor", 4, 1), False),  # no node has both
        (Request("rank", 1, node=NodeOptions(memory=8e9)), True),
        (Request("rank", 1, node=NodeOptions(memory=8.1e9)), False),
        (Request("rank", 1, 1, NodeOptions(accelerator_type="A100")), True),
        (Request("rank", 1, 1, NodeOptions(accelerator_type="H100")), False),
        (Request("student", 1, node=NodeOptions(resources={"disk": 2.0})), True),
        (Request("student", 1, node=NodeOptions(resources={"tape": 1.0})), False),
        (Request("student", 1, node=NodeOptions(label_selector={"zone": "a"})), True),
        (Request("student", 1, node=NodeOptions(label_selector={"zone": "b"})), False),
        (Request("student", 1, node=NodeOptions(label_selector={"zone": "!b"})), True),
    ],
    ids=str,
)
def test_a_request_that_no_node_can_hold_names_what_is_missing(monkeypatch, request_, fits):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [NODE, GPU_NODE, {**GPU_NODE, "Alive": False}])
    monkeypatch.setattr(placement, "_announced_resources", dict)
    monkeypatch.setattr(placement, "_JOIN_SECONDS", 0.0)
    monkeypatch.setattr(placement, "_POLL_SECONDS", 0.0)
    if fits:
        request_.await_node()
        return
    with pytest.raises(ClusterError, match=f"cluster.cpus_per_{request_.process}") as error:
        request_.await_node()
    assert str(request_) in str(error.value)
    assert "the most that a node has, of 2:" in str(error.value)
    monkeypatch.setattr(placement, "_announced_resources", lambda: {"GPU": 8})
    request_.await_node()  # an autoscaler may add a node


def test_needs_of_processes_are_handed_to_ray_by_its_names():
    needs = NodeOptions(
        memory=1e9, accelerator_type="L4", resources={"disk": 1}, label_selector={"zone": "a"}
    )
    assert Request("actor", 2, 0.5, needs).ray_options == {
        "num_cpus": 2, "num_gpus": 0.5, "memory": 1e9, "accelerator_type": "L4", "resources": {"disk": 1},
        "label_selector": {"zone": "a"},
    }  # fmt: skip
    assert Request("actor", 1).ray_options == {"num_cpus": 1}


# ---- with a Ray ------------------------------------------------------------------------------------


class NoteDevices:
    """Task that reports the GPUs that Ray lets its actor see, once there are `actors` of them."""

    needs_gpu = True
    subject = Subject("", "work")

    def __init__(self, folder, actors):
        self.folder, self.actors = folder, actors

    def __call__(self, shard):
        (self.folder / str(os.getpid())).touch()
        wait_until(lambda: len(list(self.folder.iterdir())) == self.actors)
        report = os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return ShardResult(name=str(shard), records=1, seconds=0.0, report=report)


def devices_of(executor, folder, actors):
    """Return the GPUs that each of the actors sees, sorted."""
    results = executor.map_shards(NoteDevices(folder, actors), range(actors))
    return sorted(dict(result.report for result in results).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({}, ["0", "1", "2", "3"]),
        ({"actors": 8}, ["0", "0", "1", "1", "2", "2", "3", "3"]),
        ({"actors": 2}, ["0", "1"]),
        ({"gpus_per_actor": 0.0, "actors": 2}, ["", ""]),
    ],
    ids=["default", "two_on_each", "two", "none"],
)
def test_actors_on_logical_gpus(tmp_path, monkeypatch, options, visible):
    """Four GPUs are declared, of which each actor sees its own."""
    monkeypatch.setattr(placement, "count_local_gpus", lambda: 4)
    monkeypatch.setattr(session, "count_local_gpus", lambda: 4)
    executor = RayExecutor(LocalClusterConfig(cpus_per_actor=0.1, **options))
    try:
        assert devices_of(executor, tmp_path, len(visible)) == visible
    finally:
        executor.close()


def announce(**resources):
    """Announce a group of hosts that may come, as an autoscaler does."""
    from ray import _raylet
    from ray.core.generated.autoscaler_pb2 import ClusterConfig
    from ray.experimental.internal_kv import _internal_kv_put

    config = ClusterConfig()
    group = config.node_group_configs.add(name="gpus", max_count=2)
    group.resources.update(resources)
    _internal_kv_put(
        _raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
        config.SerializeToString(),
        namespace=_raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
    )


def run_driver(address, folder):
    """Print what a driver sees of a cluster that scales from zero, and which GPU its teacher gets."""
    config = ExistingClusterConfig(address=address, auth="disabled", cpus_per_actor=0.1)
    with ray_session(config, 0):
        before = str(ClusterGpus.read_session()), gpus_each(None)
        announce(CPU=4, GPU=4)
        after = str(ClusterGpus.read_session()), gpus_each(None)
        print(json.dumps([before, after]), flush=True)
        print(json.dumps(devices_of(RayExecutor(config), Path(folder), 1)), flush=True)


@pytest.mark.slow
def test_a_cluster_that_scales_from_zero_gets_its_gpus_from_a_host_that_comes(tmp_path):
    """No host with a GPU is up, and a group of such hosts is announced: the teacher waits for one of them."""
    program = (
        "import sys; from tests.cluster.test_placement import run_driver; run_driver(*sys.argv[1:])"
    )
    with ray_nodes(PYTHONPATH=PYTHONPATH) as nodes:
        nodes.start_head("--num-cpus=1", "--num-gpus=0", dashboard=False)
        driver = subprocess.Popen(
            [sys.executable, "-c", program, nodes.address, str(tmp_path)],
            cwd=ROOT,
            env=node_environment(PYTHONPATH=PYTHONPATH),
            stdout=subprocess.PIPE,
            text=True,
        )
        answers = json.loads(driver.stdout.readline())
        assert answers == [
            ["GPUs of the cluster: 0", 0],
            ["GPUs of the cluster: 0, more to come", 1],
        ]
        nodes.start_node("--num-cpus=1", "--num-gpus=4")
        visible, _ = driver.communicate()
    assert json.loads(visible) == ["0"]
