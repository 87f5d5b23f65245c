"""A process that ends after any of its file operations."""

import contextlib
import os

from permafrost.storage import local_files

OPERATIONS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")


class Stopped(BaseException):
    """Simulated end of the process, which no handler may catch."""


READING = ("stat", "fstat", "scandir", "access", "W_OK", "pread", "fdopen")
"""Functions that change nothing, after which a crash is that of the operation before."""


class StoppingOs:
    """Replacement of `os` whose operations all fail after the first n, as after a power cut.

    Opening a file for reading, or a folder on the way to a file, is no operation, and neither is closing it.
    """

    def __init__(self, stop_after):
        self.left = stop_after
        self.stopped = False
        self.read_only = set()

    def __getattr__(self, name):
        if name in READING or name.startswith("O_"):
            return getattr(os, name)
        assert name in OPERATIONS, f"unexpected operation {name}"

        def operation(*args, **options):
            reads = name == "open" and args[1] & (os.O_DIRECTORY | os.O_NONBLOCK)
            if not reads and not (name == "close" and args[0] in self.read_only):
                self.count()
            result = getattr(os, name)(*args, **options)
            self.read_only -= {args[0], result}
            self.read_only |= {result} if reads else set()
            return result

        return operation

    def count(self):
        if self.left == 0:
            self.stopped = True
            raise Stopped
        self.left -= 1


def stop_everywhere(monkeypatch, action, check, every=1):
    """Run `action` with a crash after 0, 1, 2, ... times `every` operations, and `check` after each crash."""
    points = 0
    while True:
        stopping = StoppingOs(points)
        with monkeypatch.context() as patch:
            patch.setattr(local_files, "os", stopping)
            with contextlib.suppress(Stopped):
                action(points)
        if not stopping.stopped:
            return points
        check(points)
        points += every
