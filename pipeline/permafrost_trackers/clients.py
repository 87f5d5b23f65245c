"""Clients of Weights & Biases, MLflow and Trackio."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress

from permafrost.runs.trackers import TrackedRun, TrackerClient

_FINISH_SECONDS = 120.0
"""Timeout of the uploads to Weights & Biases at the end of a training."""
_PATIENCE = {
    "WANDB_INIT_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""Variables that a training does not wait minutes for a server that is gone: MLflow's client would for five."""


def _wait_briefly() -> None:
    """Set the timeouts of the clients, unless the environment has them."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)


class WandB(TrackerClient):
    """Run of Weights & Biases, on this machine with WANDB_MODE=offline, where a kill loses up to 15 seconds of it."""

    def __init__(self, tracked: TrackedRun, first_step: int, last_step: int) -> None:
        _wait_briefly()
        import wandb

        run_id, self.last_step = tracked.read_state(last_step)
        self._run = wandb.init(
            project=tracked.project,
            name=tracked.name,
            id=run_id,
            config=tracked.read_options(),
            allow_val_change=True,  # as trainer.epochs of a training that is continued
            resume="allow",
            dir=tracked.folder,  # in which it writes to wandb/
            reinit="create_new",
            settings=wandb.Settings(console="off", finish_timeout=_FINISH_SECONDS),
        )
        tracked.save_state(self._run.id, self.last_step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def log_results(self, numbers: Mapping[str, float]) -> None:
        self._run.summary.update(dict(numbers))

    def close(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


class MLflow(TrackerClient):
    """Run of MLflow, on the server of MLFLOW_TRACKING_URI or in a database in the folder of the training."""

    def __init__(self, tracked: TrackedRun, first_step: int, last_step: int) -> None:
        _wait_briefly()
        from mlflow import MlflowClient

        local = f"sqlite:///{tracked.files}/mlflow.db"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        run_id, _ = tracked.read_state()
        if run_id is None:
            run_id = self._create(tracked)
            tracked.save_state(run_id, 0)
        else:
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "total")
            self.last_step = max((metric.step for metric in history), default=0)
        self._id = run_id

    def _create(self, tracked: TrackedRun) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(tracked.project)) is None:
            with suppress(MlflowException):  # another student may create it at the same time
                self._client.create_experiment(tracked.project)
            experiment = self._client.get_experiment_by_name(tracked.project)
        created = self._client.create_run(experiment.experiment_id, run_name=tracked.name)
        run_id = str(created.info.run_id)
        params = [
            Param(_mlflow_name(name), str(value)[:_MLFLOW_CHARACTERS])
            for name, value in tracked.read_options().items()
        ]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MLFLOW_PARAMS])
        return run_id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id,
            metrics=[
                Metric(_mlflow_name(name), value, now, step) for name, value in numbers.items()
            ],
        )

    def close(self, is_finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "FAILED")


_MLFLOW_PARAMS, _MLFLOW_CHARACTERS = 100, 6000
"""Largest number of options in a request to MLflow, and of characters of one."""


def _mlflow_name(name: str) -> str:
    """Replace characters that MLflow does not take in a name."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


class Trackio(TrackerClient):
    """Run of Trackio, in the folder TRACKIO_DIR of this machine unless its variables name a server."""

    def __init__(self, tracked: TrackedRun, first_step: int, last_step: int) -> None:
        import trackio

        run_id, self.last_step = tracked.read_state(last_step)
        self._run = trackio.init(
            project=tracked.project,
            name=tracked.name,
            resume="never" if run_id is None else "allow",
            config=tracked.read_options(),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        tracked.save_state(self._run.id, self.last_step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, is_finished: bool) -> None:
        self._run.finish()
