"""Files of a folder and their bytes.

A store's origin is left out: it is no part of the store, and differs between stores of the same data. The facts about
its data and the thumbnails are no part of it either, but are the same for the same data.
"""

from __future__ import annotations

from pathlib import Path

from permafrost.storage.lock import LOCK_NAME
from permafrost.store.commit import ORIGIN_NAME
from permafrost.store.facts import FACTS_NAME
from permafrost.store.manifest import TEACHERS_FOLDER
from permafrost.store.thumbnails import THUMBNAILS_FOLDER


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Bytes of the files without origin and facts, which may be those of before if an append was killed."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (ORIGIN_NAME, FACTS_NAME) and not _is_of_pass(path)
    }


def all_files(folder: Path) -> list[Path]:
    """All nonempty files of stores below a folder, which excludes the lock, the origin, the facts and thumbnails."""
    outside = (ORIGIN_NAME, FACTS_NAME)
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in outside and path.parent.name != THUMBNAILS_FOLDER
    )
    return sorted(path for path in files if path.stat().st_size)


def _is_of_pass(path: Path) -> bool:
    """Return whether a file is the lock of a pass, or has the facts about one, which are also those of a machine."""
    return path.name in (FACTS_NAME, LOCK_NAME) and path.parent.parent.name == TEACHERS_FOLDER
