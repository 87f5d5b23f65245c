"""Tasks of job arrays that tests start, kill and start again.

Tasks are processes that are forked from one that has imported torch. Claims expire after a second in place of a minute.
"""

import os
import resource
import signal
import sys
import time

from permafrost.storage import lock
from tests.support.processes import fork_server
from tests.support.trees import tree_bytes

EXPIRY_SECONDS = 1.0


def run_task(words, part, output, limit, expiry, variables):
    """Run precompute as a task of an array in a process of its own, with variables of its environment."""
    os.setsid()
    os.environ.update(variables)
    lock.EXPIRY_SECONDS, lock.RENEWAL_SECONDS = expiry, expiry / 5
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from permafrost.__main__ import main

    sys.argv = ["permafrost", "precompute", *words, f"cluster.part={part}", "executor=array"]
    main()


class Array:
    """Tasks of a job array, each with one of several lists of options."""

    def __init__(self, folder, lists, tasks, expiry=EXPIRY_SECONDS, variables=None):
        self.folder, self.lists, self.tasks = folder, lists, tasks
        self.processes, self.expiry, self.variables = {}, expiry, variables or {}

    def start(self, number, limit=None):
        words = self.lists[number % len(self.lists)]
        part = f"{number // len(self.lists) + 1}/{-(-self.tasks // len(self.lists))}"
        output = self.folder / f"task-{number}.log"
        arguments = words, part, output, limit, self.expiry, self.variables
        process = fork_server().Process(target=run_task, args=arguments)
        process.start()
        self.processes[number] = process

    def living(self):
        return [number for number, process in self.processes.items() if process.is_alive()]

    def kill(self, numbers):
        for number in numbers:
            self.processes[number].kill()
            self.processes[number].join()

    def wait(self):
        """Wait for all tasks, and return their exit codes."""
        for process in self.processes.values():
            process.join()
        return [process.exitcode for process in self.processes.values()]


def disturb(array, kills, generator, pause, limit=None):
    """Kill one task or all at random moments, start others in their place, and return how many died.

    limit  largest file in bytes that the first start of the first task may write
    """
    dead = 0
    for number in range(array.tasks):
        array.start(number, limit if number == 0 else None)
    for _ in range(kills):
        time.sleep(generator.expovariate(1 / pause))
        living = array.living()
        victims = living if generator.random() < 0.2 else generator.sample(living, len(living[:1]))
        array.kill(victims)
        dead += len(victims)
        for number in set(range(array.tasks)) - set(array.living()):
            if generator.random() < 0.8 or not array.living():
                array.start(number)
    for number in set(range(array.tasks)) - set(array.living()):
        array.start(number)
    return dead


def files_of(store):
    """Bytes of the files of a store without locks, which stay and are empty."""
    files = tree_bytes(store).items()
    return {name: data for name, data in files if not name.endswith(".lock")}
