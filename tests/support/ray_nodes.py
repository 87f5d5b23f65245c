"""Ray nodes as separate processes, which are started and ended by their process ids."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.processes import alive, descendants, wait_until

RAY = str(Path(sys.executable).parent / "ray")
LIMITS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def node_environment(**more):
    """Environment of a process that uses these nodes and no other Ray."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**inherited, **LIMITS, "COLUMNS": "200", **more}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Nodes:
    """Ray head and the nodes that join it."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.processes = []

    def start_head(self, *options, dashboard):
        head, port = self.address.rsplit(":", 1)
        words = [f"--node-ip-address={head}", f"--port={port}", f"--temp-dir={self.folder}"]
        words += [f"--include-dashboard={dashboard}"]
        if dashboard:
            words += [f"--dashboard-port={self.dashboard.rsplit(':', 1)[1]}"]
        head = self._start("--head", *words, *options)
        if dashboard:  # it listens later than `ray start` says that the head runs
            wait_until(self._dashboard_answers)
        return head

    def _dashboard_answers(self):
        host, port = self.dashboard.removeprefix("http://").rsplit(":", 1)
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    def start_node(self, *options, **environment):
        """Start a node, with environment variables of its own."""
        return self._start(f"--address={self.address}", *options, **environment)

    def _start(self, *words, **environment):
        log = self.folder / f"node{len(self.processes)}.log"
        # Jobs need the agent, whose default port may be in use by another Ray on this machine.
        words += (f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000")
        with log.open("w") as output:
            process = subprocess.Popen(
                [RAY, "start", *words, "--block"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=node_environment(**self.environment | environment),
                start_new_session=True,
            )
        self.processes.append(process)
        while "will now block forever" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        return process

    def stop(self):
        """End the remaining nodes, the head last."""
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


@contextmanager
def ray_nodes(**environment):
    """Context of nodes that end with it, with these environment variables.

    Their folder has a short path, as Ray's sockets require.
    """
    if " " in RAY:
        pytest.skip(f"`ray start` runs a shell that ends at the space in {RAY}")
    folder = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))
    nodes = Nodes(folder, environment)
    try:
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def lose(node):
    """Kill a node and all its processes at once, as a power cut does."""
    below = descendants(node.pid)
    for pid in (node.pid, *below):
        os.kill(pid, signal.SIGKILL)
    node.wait()
    wait_until(lambda: not alive(below))
