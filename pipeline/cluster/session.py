"""A Ray session that is explicit about everything it would otherwise decide by itself."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import ClusterConfig

# Read by Ray when it is imported or started; what the user has set wins.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster of this process alone, bound to the loopback interface
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "900",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its own log files keep the rest
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # no GPU asked for, none seen
}

_ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def ray_session(config: ClusterConfig, cpus: float) -> Iterator[None]:
    """A local Ray for the block, or the one that is already running in this process.

    cpus  that the block's own actors or tasks take at once
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    actor_environment = {
        "OMP_NUM_THREADS": str(config.threads_per_actor),
        # Two processes whose OpenMP threads spin for each other's cores run at a fifth of their speed.
        "OMP_WAIT_POLICY": "PASSIVE",
        # An actor imports this package wherever the driver was started.
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        # The driver and Ray's own tasks need a slot beside them, or a dataset never starts.
        num_cpus=max(os.cpu_count() or 1, int(cpus) + 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"env_vars": actor_environment},
    )
    # Ray replaces the handler of SIGTERM by one that exits without a word.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()
