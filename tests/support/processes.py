"""Processes that tests start, watch and kill."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.support.paths import PYTHONPATH


def environment():
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def bare_environment(**variables):
    """Environment with these variables, the project, and the place of the interpreter's libraries if it is set."""
    needed = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PYTHONPATH": PYTHONPATH, **needed, **variables}


def run_program(words, **options):
    """Run a program to its end, whatever its exit status, and keep what it prints as text."""
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def fork_server(*modules):
    """Multiprocessing context whose processes are forked from one that has imported torch, permafrost and the modules.

    Importing them takes three seconds of a core in every new interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("kornia", "torchvision.io", "webdataset"),
            *(
                "permafrost.loading.record_loader",
                "permafrost.training.loop",
                "permafrost.models.providers",
                "permafrost.annotation.teacher_pass",
            ),
            *modules,
        ]
    )
    return context


class StageProcess:
    """Stage in a forked process of its own session, with the interface of `subprocess.Popen`.

    module      module that is run, such as "stages.precompute"
    file_limit  largest size of a file in bytes that the process may write, None without a limit
    variables   variables of its environment beyond those of the fork server
    outputs     folder of what it prints, if that is not to be the folder in which it runs
    """

    def __init__(self, module, words, folder, file_limit=None, variables=None, outputs=None):
        outputs = outputs or folder
        self._outputs = [outputs / f".{module}-{time.monotonic_ns()}-{name}" for name in "oe"]
        self._process = fork_server().Process(
            target=_run_module,
            args=(module, words, folder, self._outputs, file_limit, variables or {}),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        """Send a signal, unless the process has ended."""
        if self.poll() is not None:
            return  # its id may be another process's by now
        with suppress(ProcessLookupError):  # it ended in between
            os.kill(self.pid, number)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end, and return standard output and standard error."""
        self.wait(timeout)
        return tuple(path.read_text() for path in self._outputs)


def _run_module(module, words, folder, outputs, file_limit, variables):
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    tempfile.tempdir = None  # the fork server may have asked for its place
    # Locks of a fork server's children have names, which a killed process would leave in /dev/shm.
    multiprocessing.set_start_method(None, force=True)
    # Children of a shell's background job would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream.fileno())
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def descendants(pid):
    """Process ids of all descendants of `pid`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def status(pid):
    """State of a process: R, S, T (stopped), ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pids):
    """Return those of the processes that have not ended."""
    return [pid for pid in pids if title(pid)]


def wait_until(condition, process=None):
    """Wait for the condition's first true value and return it. The process, if given, must not end before that.

    Only the time limit of the test ends the wait, as no other limit suits every machine.
    """
    while True:
        if value := condition():
            return value
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)
