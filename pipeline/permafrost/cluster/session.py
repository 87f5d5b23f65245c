"""A Ray session with explicit settings instead of Ray's automatic defaults."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from permafrost.cluster.placement import ClusterError, count_local_gpus
from permafrost.config.cluster import ClusterConfig, ExistingClusterConfig, LocalClusterConfig
from permafrost.config.environment import (
    _JOB_VARIABLE,
    ALLOCATOR_ENVIRONMENT,
    NO_REPORTS,
    PACKAGE,
    THREAD_ENVIRONMENT,
    in_submitted_job,
)
from permafrost.config.plugins import ENTRIES, SHIPPED, entry_modules, entry_places, plugin_places
from permafrost.core.errors import printable
from permafrost.core.machine import usable_cores

if TYPE_CHECKING:
    from ray.util.queue import Queue


# Read by Ray when it is imported or started. Variables set by the user take precedence.
_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's log files contain the rest
    # Ray's own 15 leaves workers a thirtieth of a core that another process uses, and a run seems to hang.
    "RAY_worker_niceness": "0",
    # A thread of Ray Data would start another Ray after the end of this one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
# Read in the worker processes.
_ACTOR_ENVIRONMENT = {
    **ALLOCATOR_ENVIRONMENT,
    **THREAD_ENVIRONMENT,
    **NO_REPORTS,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # without a requested GPU, none is visible
}

_STARTS = 2
"""Number of attempts to start a local Ray, which times out on a busy machine."""
_POLL_SECONDS, _LIST_SECONDS = 0.05, 2.0
_MESSAGE_SIZE = 200
_NODE_ID = re.compile("node id: [0-9a-f]+ and ")

TOKEN_ADVICE = (
    "If the head has a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the "
    "head. If it has none, unset RAY_AUTH_MODE, and set cluster.auth=disabled"
)
"""Remedies for a token that is missing, wrong or unexpected."""

logger = logging.getLogger("permafrost.ray")


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray, which names its cause, without the advice of Ray Data."""
    return str(error).partition("\nFailed to apply UDF")[0].strip().splitlines()[-1]


def one_line(error: Exception) -> str:
    """Return the message of an error of Ray as one line, without the advice that Ray adds to a missing token."""
    return " ".join(str(getattr(error, "message", error)).split()).rstrip(".")


@contextmanager
def ray_session(config: ClusterConfig, cpus: float) -> Iterator[None]:
    """Provide Ray inside the block: a local instance, a cluster, or the existing session of this process.

    Args:
        config: Options of `cluster=`.
        cpus: Number of CPUs that the block's actors or tasks use at once, for which a local Ray is made large enough.

    Raises:
        ClusterError: If Ray cannot be started or joined.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    environment = {"RAY_AUTH_MODE": config.auth, **_ENVIRONMENT}
    if isinstance(config, LocalClusterConfig):
        environment["RAY_AUTH_TOKEN"] = _token()  # Ray would write one to the home folder
        environment["RAY_USAGE_STATS_ENABLED"] = str(int(config.usage_statistics))
    with variables_set(environment):
        import ray

        on_terminate = signal.getsignal(signal.SIGTERM)
        if isinstance(config, LocalClusterConfig):
            _start(config, cpus)
            _watch_head()
        else:
            _connect(config)
        ray._private.worker.print_to_stdstream = partial(_warn_of_cluster, set())
        # Ray replaces the handler of SIGTERM with one that exits without a message.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in the block, unless they are set, and remove them afterwards."""
    absent = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            os.environ.pop(name, None)


@cache
def _token() -> str:
    """Draw the token of this process's local sessions, which Ray reads once."""
    return secrets.token_hex(32)


def _start(config: LocalClusterConfig, cpus: float) -> None:
    """Start a local Ray, with a second attempt if the first fails. Raises ClusterError if both fail."""
    import ray

    for attempt in range(1, _STARTS + 1):
        logger.info(
            "starting Ray on this machine, which takes 5 to 60 seconds ..."
            if attempt == 1
            else "starting Ray once more ..."
        )
        started = time.monotonic()
        try:
            with _without_level_line():
                _init(config, cpus)
            return
        except Exception as error:  # Ray raises its base class where a node does not start in time
            ray.shutdown()
            seconds = time.monotonic() - started
            reason = one_line(error)[:200]
            failure = error
            logger.warning("Ray did not start: %s (after %.0f s)", reason, seconds)
    advice = (
        f"The path of the folder for temporary files, {tempfile.gettempdir()}, is too long for Ray's sockets "
        "in it: set TMPDIR to a shorter one, as in TMPDIR=/tmp"
        if "AF_UNIX" in reason or "path length" in reason
        else "Run the same command again on a less busy machine or with a larger /dev/shm"
    )
    raise ClusterError(
        f"Ray did not start in {_STARTS} attempts ({reason}); nothing is lost. {advice}, or avoid Ray with "
        "executor=serial (precompute, sweep) or trainer.ranks=1 (teach, distill)"
    ) from failure


@contextmanager
def _without_level_line() -> Iterator[None]:
    """Hold back the standard error in the block, and leave out the line in which Ray repeats its log level."""
    with os.fdopen(os.memfd_create("lines"), "w+b") as lines:
        stream = os.dup(2)
        os.dup2(lines.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            lines.seek(0)
            for line in lines:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


def _init(config: LocalClusterConfig, cpus: float) -> None:
    import ray

    modules = [str(place) for place in plugin_places().values()]
    ray.init(
        address="local",
        namespace=_namespace(),
        # A whole number, with a slot for what Ray itself runs.
        num_cpus=max(usable_cores(), int(cpus) + 1),
        num_gpus=count_local_gpus(),  # Ray also counts those that this torch cannot use
        include_dashboard=config.dashboard,
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={
            # Actors must be able to import this package from any working directory of the driver.
            "env_vars": _actor_environment(config)
            | {
                "PYTHONPATH": os.pathsep.join(
                    [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
                )
            },
            # Ray starts no actor with an empty list.
            **({"py_modules": modules} if modules else {}),
            # Ray puts it into a shell command as it is, so a space in the path would end it.
            "py_executable": shlex.quote(sys.executable),
        },
    )


def _namespace() -> str:
    """Return the namespace of this command's actors, which names its host and process."""
    return f"permafrost-{socket.gethostname()}-{os.getpid()}"


def _watch_head() -> None:
    """End this process with a message when Ray's raylet or its control store ends, in a thread.

    Ray itself ends it a minute later, without an exception, or lets it wait forever, and leaves processes behind, of
    which the agents of the raylet end themselves after up to two minutes.
    """
    import psutil  # type: ignore[import-untyped]  # comes with Ray
    import ray._private.worker as ray_worker

    if (node := ray_worker.global_worker.node) is None:  # Ray runs elsewhere
        return
    processes = {name: node.all_processes[name][0].process for name in ("raylet", "gcs_server")}

    def watch() -> None:
        below, listed = [], -math.inf
        while all(process.poll() is None for process in processes.values()):
            if time.monotonic() > listed + _LIST_SECONDS:
                with suppress(psutil.Error):  # it has just ended
                    below = psutil.Process(processes["raylet"].pid).children(recursive=True)
                listed = time.monotonic()
            time.sleep(_POLL_SECONDS)
        if ray_worker.global_worker.node is node:  # not shut down by this process
            (name, process), *_ = [
                (name, process) for name, process in processes.items() if process.poll() is not None
            ]
            print(
                f"permafrost: error: Ray's {name} (process {process.pid}) ended with status {process.returncode}; it "
                "was killed, or the machine ran out of memory. The same command resumes where it stopped",
                file=sys.stderr,
                flush=True,
            )
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            for each in below:
                with suppress(psutil.Error):
                    each.kill()
            os._exit(1)

    threading.Thread(target=watch, name="head-watch", daemon=True).start()


def _warn_of_cluster(logged: set[str], data: dict[str, Any], ignore_prefix: bool) -> None:
    """Log the first sentence of a message of the cluster, in place of Ray, which prints its log's lines of a lost node.

    What was logged is kept in `logged`, as Ray repeats itself until it notices that a node is lost.
    """
    lines = " ".join(data["lines"]).strip().splitlines() or [""]
    sentence = _NODE_ID.sub("", printable(lines[0])).partition(". ")[0][:_MESSAGE_SIZE]
    # What has ended a call is another message, unless it was this process.
    if sentence not in logged and not sentence.endswith("submit failed"):
        logged.add(sentence)
        logger.warning("Ray: %s", sentence)


def _connect(config: ClusterConfig) -> None:
    """Connect to a running Ray. Raises ClusterError if none responds."""
    import ray

    address = config.address if isinstance(config, ExistingClusterConfig) else "auto"
    try:
        where = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
        if where != "auto":  # Ray would retry an address that is not reachable for many minutes
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        logger.info("joining the Ray cluster at %s ...", address)
        with _without_level_line():
            ray.init(
                address=address,
                namespace=_namespace(),
                logging_level=logging.WARNING,
                log_to_driver=False,
                runtime_env=_cluster_environment(config),
            )
    except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(
            f"no Ray cluster could be joined at cluster.address={address} ({one_line(error)}); "
            f"start one (ray start --head), or correct cluster.address. {TOKEN_ADVICE}"
        ) from error


def _cluster_environment(config: ClusterConfig) -> dict[str, Any]:
    """Runtime environment of actors on all nodes: variables, and the code."""
    code = {
        "py_modules": list(map(str, (PACKAGE, *entry_places(), *plugin_places().values()))),
        "excludes": ["__pycache__"],
    }
    ours = _actor_environment(config)
    if not in_submitted_job():
        return {"env_vars": ours, **code}
    # Ray rejects what is also in the job's environment, and the user's value takes precedence.
    job = json.loads(os.environ[_JOB_VARIABLE]).get("runtime_env") or {}
    job_variables = job.get("env_vars") or {}
    code = {} if code.keys() & job.keys() else code
    return {"env_vars": {name: ours[name] for name in ours if name not in job_variables}, **code}


def _actor_environment(config: ClusterConfig) -> dict[str, str]:
    shipped = {SHIPPED: ",".join(plugin_places()), ENTRIES: json.dumps(entry_modules())}
    return {"OMP_NUM_THREADS": str(config.threads_per_actor), **_ACTOR_ENVIRONMENT, **shipped}


def open_queue(maxsize: int = 0) -> Queue:
    """Start a queue on the driver's own node, so that it is lost with no other one.

    Ray restarts its actor, empty, if the process dies.

    Args:
        maxsize: Largest number of items; 0 for any.
    """
    from ray.util.queue import Queue

    restarts = {"max_restarts": -1, "max_task_retries": -1}
    return Queue(maxsize, actor_options={**on_this_node(), **restarts})


def on_this_node() -> dict[str, Any]:
    """Return the options of an actor that is lost with the driver's own node, and with no other one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"scheduling_strategy": here, "num_cpus": 0}


def put_item(queue: Queue, item: Any) -> None:
    """Put an item into a queue, unless it is full or lost, as no work depends on it."""
    import ray
    from ray.util.queue import Full

    with suppress(Full, ray.exceptions.RayError):
        queue.put_nowait(item)


def send_item(queue: Queue, item: Any) -> None:
    """Send an item to a queue without a size limit, and do not wait for its arrival.

    While a task waits, Ray gives its CPU to another task, so more tasks would run than there are CPUs.
    """
    queue.actor.put_nowait.remote(item)


def take_items(queue: Queue) -> list[Any]:
    """Take all items out of a queue that no other process reads. There are none if it is lost."""
    import ray

    try:
        items: list[Any] = queue.get_nowait_batch(queue.qsize())
    except ray.exceptions.RayError:  # also if it was restarted in between, and has fewer
        return []
    return items
