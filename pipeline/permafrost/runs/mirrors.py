"""Runs in a bucket: local working folders of runs, and their copies in the bucket.

A run writes many small files, appends to some and replaces others, which no bucket offers. So a run whose name is an
address has a folder of this machine, its mirror, whose path follows from the address. Files that another machine has
written are fetched before the work, and files of this one are uploaded at every checkpoint and at the end. What marks
work as done is uploaded last, so a machine that dies leaves the state of its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from permafrost.core.errors import MAX_NAME_BYTES, quote
from permafrost.storage import buckets
from permafrost.storage.addresses import Bucket, is_address, parse_bucket
from permafrost.storage.files import file_at
from permafrost.storage.local_files import PARTIAL_SUFFIX, described_errors, write_error
from permafrost.storage.lock import LOCK_NAME, folder_lock
from permafrost.storage.object_cache import cache_folder, scratch_folder_of
from permafrost.storage.rooted_paths import rooted

logger = logging.getLogger("permafrost.buckets")

RUNS = Path("runs")
"""Folder of all runs that are not in a bucket."""
_RUNS = "runs"
"""Folder of the mirrors within the cache."""
_STATES = ".states"
_LAST = ("checkpoint.pt", "metrics.json", "model.json")
"""Files that are uploaded after all others, in this order: those that others of the folder must agree with."""


class RunFiles:
    """Folder of a run on this machine, which is a mirror if the run is in a bucket."""

    def __init__(self, run: str) -> None:
        """Name the run.

        Args:
            run: Path below runs/, or the address of a bucket's folder.
        """
        self.run = run
        self.is_mirrored = is_address(run)
        self.folder = _mirror_of(run) if self.is_mirrored else RUNS / run

    def fetch(self, verb: str = "", *, exactly: bool = False) -> None:
        """Fetch what other machines have written to the run, or to the folder of a verb, if it is in a bucket.

        Args:
            verb: Folder to fetch; empty fetches the whole run.
            exactly: As in `fetch_folder`.
        """
        if self.is_mirrored:
            fetch_folder(f"{self.run}/{verb}".rstrip("/"), exactly=exactly)

    @contextmanager
    def opened(self, verb: str) -> Iterator[None]:
        """Keep other writers out of a verb's folder in a bucket, fetch it before the block and upload it afterwards."""
        if not self.is_mirrored:
            yield
            return
        address = f"{self.run}/{verb}"
        with folder_lock(rooted(address), "run"):
            fetch_folder(address, exactly=True)
            try:
                yield
            finally:
                upload_folder(address)

    def upload_top(self) -> None:
        """Upload the files that are not in the folder of a verb, and the cost of a pass, if the run is in a bucket."""
        if self.is_mirrored:
            paths = [*self.folder.glob("*"), *self.folder.glob("precompute/*")]
            names = [path.relative_to(self.folder).as_posix() for path in paths if path.is_file()]
            upload_folder(self.run, [name for name in names if _is_own(Path(name))])


def _mirror_of(address: str) -> Path:
    """Return the folder of this machine for a folder of a run in a bucket."""
    scheme, _, rest = parse_bucket("run", address).partition("://")
    return _root() / scheme / rest


def _root() -> Path:
    return scratch_folder_of(Bucket("")) / _RUNS


def fetch_folder(address: str, *, exactly: bool = False) -> None:
    """Fetch what another machine has written to a folder of a bucket since it was fetched or uploaded here.

    Args:
        address: Address of the folder.
        exactly: Remove what is not in the bucket, and replace what differs, for a folder that is not in use.
            Else files that were changed here stay.

    Raises:
        FileError: If a file cannot be downloaded or written.
    """
    mirror, state = _mirror_of(address), _read_state(address)
    remote = dict(_entries(address))
    for name, (size, e_tag) in remote.items():
        path = mirror / name
        here = _stamp(path)
        known = state.get(name)
        if here is not None and known is not None and here == known[:2]:
            if known[2] == e_tag:
                continue
        elif here is not None and not exactly:
            continue
        _download(f"{address}/{name}", path, size)
        state[name] = [*(_stamp(path) or (0, 0)), e_tag]
    if exactly:
        for path in list(_own_files(mirror)):
            if path.relative_to(mirror).as_posix() not in remote:
                path.unlink()
    _write_state(address, {name: entry for name, entry in state.items() if name in remote})


def upload_folder(address: str, names: Iterable[str] | None = None) -> None:
    """Upload the files of a run's mirror that were changed here, those that mark work as done last.

    Args:
        address: Address of the folder in the bucket.
        names: Files below the folder; None for all.

    Raises:
        FileError: If one cannot be uploaded.
    """
    mirror, state = _mirror_of(address), _read_state(address)
    changed = {
        name: stamp
        for path in (_own_files(mirror) if names is None else (mirror / name for name in names))
        if (stamp := _stamp(path)) is not None
        and list(stamp) != state.get(name := path.relative_to(mirror).as_posix(), [])[:2]
    }
    for name in sorted(changed, key=lambda name: (_rank(name), name)):
        path = mirror / name
        with path.open("rb") as file:
            buckets.put_object(f"{address}/{name}", file, changed[name][0], file_at(path).sha256())
        facts = buckets.object_facts(f"{address}/{name}")
        state[name] = [*changed[name], "" if facts is None else facts.e_tag]
    if changed:
        _write_state(address, state)


def upload_mirror(folder: Path) -> None:
    """Upload a folder if it is, or is in, the mirror of a run in a bucket.

    Raises:
        FileError: If a file cannot be uploaded.
    """
    if address := _address_of(folder):
        upload_folder(address)


def remove_file(path: Path) -> None:
    """Remove a file of a run, and its object if the folder is in the mirror of a run in a bucket.

    Raises:
        FileError: If it cannot be removed.
    """
    if address := _address_of(path):
        buckets.remove_object(address)
    file_at(path).remove()


def _address_of(path: Path) -> str:
    """Return the address of what a mirror holds, empty for a path outside of mirrors."""
    root = cache_folder() / _RUNS  # not created, as a run of this machine needs no cache
    if not path.is_relative_to(root):
        return ""
    scheme, *rest = path.relative_to(root).parts
    return f"{scheme}://{'/'.join(rest)}"


def _rank(name: str) -> int:
    last = name.rpartition("/")[2]
    return 1 + _LAST.index(last) if last in _LAST else 0


def _entries(address: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Iterate over the files below a folder of a bucket, with their sizes and ETags.

    Objects that no run has written, as no file of this machine can have their names, are left out with a warning.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in buckets.list_entries(f"{address}/{folder}".rstrip("/")):
            name = f"{folder}{entry.name}"
            if len(os.fsencode(entry.name)) > MAX_NAME_BYTES:
                logger.warning(
                    "%s has an object %s whose name is too long for a file of a run; it is left out",
                    address,
                    quote(name),
                )
            elif entry.is_dir():
                folders.append(f"{name}/")
            elif entry.name != LOCK_NAME:
                yield name, (entry.size, entry.e_tag)


def _own_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and _is_own(path))


def _is_own(path: Path) -> bool:
    """Return whether a file is part of a run: no lock, and nothing in the making."""
    return path.name != LOCK_NAME and not path.name.endswith(PARTIAL_SUFFIX)


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _download(address: str, path: Path, size: int) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        with described_errors(write_error, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            data, _ = buckets.read_object(address)
            partial.write_bytes(data)
            partial.replace(path)
    except FileNotFoundError:
        logger.debug("%s was removed while the folder was fetched", address)
    finally:
        with suppress(OSError):  # the original error is more informative
            partial.unlink()


def _state_path(address: str) -> Path:
    return _root() / _STATES / f"{address.replace('://', '/')}.json"


def _read_state(address: str) -> dict[str, list[object]]:
    """Return size, time and ETag of the files that were fetched or uploaded, by name."""
    try:
        state = json.loads(_state_path(address).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_state(address: str, state: dict[str, list[object]]) -> None:
    file_at(_state_path(address)).write(json.dumps(state, sort_keys=True).encode())
