"""Check every byte, count, key and value of a store against its manifests.

    permafrost verify experiment=demo
    permafrost verify store.path=stores/demo

Reads   all of <store.path>
Writes  nothing; prints a line for each problem, with exit code 1 if there is any
Rerun   the same command reads everything again
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import LinkError, RootedPath
from permafrost.store.reader import Store
from permafrost.store.verification import unfinished_passes, verify_store

_DENIED = os.strerror(errno.EACCES)

logger = logging.getLogger("permafrost.verify")


class DamagedStoreError(UserError):
    """Error for a store that does not match its manifests, with a line for each problem."""

    def __init__(self, store: RootedPath, problems: Sequence[str]) -> None:
        unreadable = [problem for problem in problems if _DENIED in problem]
        advice = [
            "this user may not read some files; that does not mean that they are damaged. Let it read them, or verify "
            "as another user"
        ][: len(unreadable)]
        if len(unreadable) < len(problems):
            advice.append(
                "to repair a file of the store, delete it and run again the permafrost precompute that wrote it, with "
                "its data= (for a folder of artifacts/, the stage that made it); restore a file outside the store "
                "yourself"
            )
        header = f"{len(problems)} problem(s) in {store}:"
        self.lines = (header, *(f"  {problem}" for problem in problems), *advice)
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Numbers of verified records and passes."""

    verified_records: int
    verified_passes: int
    verified_bytes: str
    unfinished_passes: str = ""
    """Names of passes that were begun and have no manifest yet, which readers ignore."""


def verify_bytes(config: VerifyConfig) -> VerifyResult:
    """Check the whole store.

    Raises:
        DamagedStoreError: If there are problems; it lists every one.
    """
    path = config.store.folder
    size = _size(path)
    logger.info("%s: reading all of its %s files, %s", path, f"{size[0]:,}", _format_bytes(size[1]))
    if problems := list(verify_store(path)):
        raise DamagedStoreError(path, problems)
    unfinished = unfinished_passes(path)
    for folder in unfinished:
        logger.warning(
            "%s is an unfinished pass, which readers ignore: finish it with permafrost precompute store.path=%s and "
            "the options of its teacher, or delete its folder if no process works on it",
            folder,
            config.store.path,
        )
    store = Store(path)
    return VerifyResult(
        verified_records=store.num_records(),
        verified_passes=len([*store.pass_folders(), *store.pass_folders(stored_views=True)]),
        verified_bytes=_format_bytes(size[1]),
        unfinished_passes=", ".join(folder.name for folder in unfinished),
    )


def _size(folder: RootedPath) -> tuple[int, int]:
    """Return the number of files below a folder and their bytes, without links that may not be there."""
    files = total = 0
    with file_at(folder).listing():
        for path in file_at(folder).iter_files():
            with suppress(LinkError):
                size = file_at(path).size()
                files, total = files + (size is not None), total + (size or 0)
    return files, total


def _format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
