"""Students trained by several ranks of Ray Train: killed ranks, killed drivers and other numbers of ranks."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray
import ray.train
import torch.distributed as dist

from permafrost.cluster.ray_training import (
    RanksError,
    _choose_interface,
    _RankLoop,
    interface_of,
    train_on_ranks,
)
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import UserError
from permafrost.losses.e2kd import E2KDLoss
from permafrost.runs.mirrors import RUNS
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import read_metrics
from tests.cluster.kill_ranks import run_cell
from tests.support.paths import PYTHONPATH
from tests.support.processes import alive, descendants, run_program, title, wait_until
from tests.support.ray_nodes import node_environment, ray_nodes
from tests.support.runs import (
    TWO_RANKS,
    TWO_RANKS_CLUSTER,
    assert_equal_states,
    distill_config,
    logged_lines,
    weights_of,
)


class DeadlyLoss(E2KDLoss):
    """Loss that kills the second rank once, at its 9th step, in the middle of the second of three epochs."""

    def __init__(self, config, marker):
        super().__init__(config)
        self.marker = marker
        self.steps = 0

    def forward(self, student, targets, labels):
        self.steps += 1
        if self.steps == 9 and dist.get_rank() == 1 and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(student, targets, labels)


class DisturbedPlan(StudentPlan):
    """Plan with further attributes, which the ranks receive, too."""

    def __init__(self, options, folder, store=None, **attributes):
        super().__init__(options, folder, store)
        self.attributes = attributes
        self.__dict__.update(attributes)

    def __reduce__(self):
        kind, arguments = super().__reduce__()
        return partial(kind, **self.attributes), arguments


class KilledOnce(DisturbedPlan):
    """Plan of a training in which one rank is killed once."""

    def spec(self, distributed=None):
        spec = super().spec(distributed)
        return replace(spec, loss=DeadlyLoss(spec.loss.config, self.marker))


def test_a_rank_knows_how_many_ranks_share_its_machine(frozen, monkeypatch):
    """Ranks 4 and 5 of 6 are on the third machine."""
    context = SimpleNamespace(
        get_world_rank=lambda: 5, get_world_size=lambda: 6, get_local_world_size=lambda: 2
    )
    found = []
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray, "get", lambda asked: "")
    monkeypatch.setattr(StudentPlan, "train", lambda job, on_epoch, ranks: found.append(ranks))
    job = StudentPlan(distill_config(frozen, trainer=replace(TWO_RANKS, device="cpu")), Path())

    _RankLoop(job, MagicMock(), SimpleNamespace(full=lambda: False))()

    assert [replace(each, on_line=None) for each in found] == [DistributedContext(5, 6, None, 2)]
    assert found[0].ranks_here == 2


class RefusingLoss(E2KDLoss):
    """Loss that raises a UserError in the second rank only, while the first waits for it."""

    def forward(self, student, targets, labels):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise UserError("this record is not what it was")
        return super().forward(student, targets, labels)


class Refused(StudentPlan):
    """Plan of a training in which one rank fails."""

    def spec(self, distributed=None):
        spec = super().spec(distributed)
        return replace(spec, loss=RefusingLoss(spec.loss.config))


def job(frozen, run, kind=StudentPlan, **options):
    config = distill_config(frozen, run=run, trainer=TWO_RANKS, cluster=TWO_RANKS_CLUSTER)
    folder = (RUNS / run / "distill").absolute()
    folder.mkdir(parents=True)
    return kind(config, folder, **options)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_rank_changes_nothing(frozen, tmp_path):
    epochs = []
    train_on_ranks(job(frozen, "whole"), lambda epoch, line: epochs.append(epoch))
    marker = tmp_path / "killed"

    train_on_ranks(job(frozen, "killed", KilledOnce, marker=marker), lambda *_: None)

    assert epochs == [1, 2, 3]
    killed = int(marker.read_text())  # the rank was killed
    assert not Path(f"/proc/{killed}").exists()
    assert_equal_states(weights_of("killed"), weights_of("whole"))
    assert logged_lines("killed") == logged_lines("whole")
    assert {path.name for path in (RUNS / "killed" / "distill").iterdir()} >= {
        "model.safetensors",
        "model.json",
    }
    assert not (RUNS / "killed" / "distill" / ".ray_train").exists()


@pytest.mark.slow
def test_a_rank_of_three_killed_at_random_moments_changes_nothing(frozen, tmp_path):
    _, equal = run_cell(frozen, tmp_path, 3, "float32", seed=0, kills=3)

    assert equal == 3


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_of_one_rank_is_one_line_and_is_not_tried_again(frozen):
    with pytest.raises(RanksError, match=r"^this record is not what it was$"):
        train_on_ranks(job(frozen, "refused", Refused), lambda *_: None)


class HelperDeadlyLoss(E2KDLoss):
    """Loss of which the first rank kills actors of the driver at its 9th step."""

    def __init__(self, config, driver, actor, marker):
        super().__init__(config)
        self.driver = driver
        self.actor = actor
        self.marker = marker
        self.steps = 0

    def forward(self, student, targets, labels):
        self.steps += 1
        if self.steps == 9 and dist.get_rank() == 0:
            helpers = [pid for pid in descendants(self.driver) if self.actor in title(pid)]
            for helper in helpers:
                os.kill(helper, signal.SIGKILL)
            self.marker.write_text(" ".join(map(str, helpers)))
        return super().forward(student, targets, labels)


class HelperKilled(DisturbedPlan):
    """Plan of a training during which actors of the driver are killed."""

    def spec(self, distributed=None):
        spec = super().spec(distributed)
        return replace(
            spec, loss=HelperDeadlyLoss(spec.loss.config, self.driver, self.actor, self.marker)
        )


def job_that_kills(frozen, run, actor, marker):
    return job(frozen, run, HelperKilled, driver=os.getpid(), actor=actor, marker=marker)


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_goes_on_without_the_actors_that_receive_its_progress(frozen, tmp_path):
    epochs = []
    killed = job_that_kills(frozen, "helper", "_QueueActor", tmp_path / "helper")

    train_on_ranks(killed, lambda epoch, line: epochs.append(epoch))
    train_on_ranks(job(frozen, "calm"), lambda *_: None)

    helpers = (tmp_path / "helper").read_text().split()
    assert len(helpers) == 2
    assert not any(Path(f"/proc/{helper}").exists() for helper in helpers)
    assert epochs[-2:] == [2, 3]  # the new actor passes on what follows
    assert_equal_states(weights_of("helper"), weights_of("calm"))
    assert logged_lines("helper") == logged_lines("calm")


@pytest.mark.ray
@pytest.mark.slow
def test_the_death_of_the_controller_is_one_line_and_loses_nothing(frozen, tmp_path):
    killed = job_that_kills(frozen, "headless", "TrainController", tmp_path / "controller")

    with pytest.raises(
        RanksError, match=r"^Ray ended the training \(ActorDiedError: .* same command"
    ):
        train_on_ranks(killed, lambda *_: None)

    assert (RUNS / "headless" / "distill" / "checkpoint.pt").exists()


# ---- several hosts ---------------------------------------------------------------------------------


def test_the_interface_of_an_address_is_chosen_unless_the_environment_names_one(monkeypatch):
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""  # an address for documents, which no machine has
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    _choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "fabric0")
    _choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "fabric0"


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_without_room_for_the_ranks_is_named_and_waited_for_so_long(frozen, tmp_path):
    with ray_nodes(PYTHONPATH=PYTHONPATH) as nodes:
        nodes.start_head("--num-cpus=1", dashboard=False)
        words = ["cluster=existing", f"cluster.address={nodes.address}", "cluster.cpus_per_rank=1"]
        command = distill_command(frozen, "alone", "trainer.ranks=2", *words)
        ended = run_program(
            [*command, "cluster.max_wait_seconds=28"],
            cwd=tmp_path,
            env=node_environment(PYTHONPATH=PYTHONPATH),
        )

    assert (
        "ranks: 0 of 2 started; each needs 1 CPU, and the cluster has 1 CPU (1 free)"
        in ended.stderr
    )
    room = "cluster.max_wait_seconds=28 went by without room for 2 ranks; each needs 1 CPU"
    assert room in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1


# ---- a killed driver -----------------------------------------------------------------------------


def distill_command(frozen, run, *more):
    teacher = frozen.config.teacher
    return [
        *(sys.executable, "-m", "stages.distill", f"store.path={frozen.store.path}", f"run={run}"),
        *(
            f"student.name={teacher.name}",
            f"student.width={teacher.width}",
            "cluster.cpus_per_rank=0.5",
        ),
        *("trainer.epochs=40", "trainer.batch_size=8", "trainer.num_threads=1"),
        *("trainer.checkpoint_every_steps=3", *more),
    ]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("then", [2, 1])
def test_a_killed_driver_is_taken_up_again_by_any_number_of_ranks(frozen, tmp_path, then):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment}
    process = subprocess.Popen(
        distill_command(frozen, "killed", "trainer.ranks=2"), start_new_session=True, **options
    )
    folder = tmp_path / "runs" / "killed" / "distill"
    wait_until((folder / "checkpoint.pt").exists, process)
    below = descendants(process.pid)

    process.kill()
    process.wait()
    assert not (folder / "model.json").exists()  # the training was not finished
    wait_until(lambda: not alive(below))  # the ranks end with their driver

    for run, ranks in (("killed", then), ("whole", 2)):
        subprocess.run(
            distill_command(frozen, run, f"trainer.ranks={ranks}"), check=True, **options
        )
    killed, whole = (
        [line["step"] for line in read_metrics(tmp_path / "runs" / run / "distill")]
        for run in ("killed", "whole")
    )
    assert killed == whole
    if then == 2:
        assert_equal_states(weights_of("killed"), weights_of("whole"))
