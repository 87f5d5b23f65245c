"""Errors of the disk while an open file is written or read: each names the file."""

import errno
import os
from pathlib import Path

import pytest

from permafrost.storage import local_files
from permafrost.storage.files import file_at, read_at
from permafrost.storage.local_files import NoSpaceError

UNREADABLE = Path("/proc/self/mem")
"""Regular file whose first bytes are an EIO."""


@pytest.mark.parametrize("size", [10, 2**17])  # written when the file is closed, and at once
def test_a_file_without_room_that_is_written_in_place_is_named(tmp_path, monkeypatch, size):
    monkeypatch.setattr(local_files, "_open", lambda *_: os.open("/dev/full", os.O_WRONLY))

    def write():
        with file_at(tmp_path / "counted").create() as file:
            file.write(b"1" * size)

    reason = os.strerror(errno.ENOSPC)
    with pytest.raises(NoSpaceError, match=rf"no room to write .*/counted \({reason}"):
        write()


@pytest.mark.parametrize(
    "read",
    [
        lambda file: read_at(file, 8, 0),
        lambda file: file.read(8),
        lambda file: file.readall(),
        lambda file: file.readinto(bytearray(8)),
    ],
)
def test_a_file_that_a_disk_does_not_return_is_named(read):
    with file_at(UNREADABLE).open() as file, pytest.raises(OSError) as error:  # noqa: PT011
        read(file)
    assert (error.value.errno, error.value.filename) == (errno.EIO, str(UNREADABLE))
