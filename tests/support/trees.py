"""Files of a folder and their bytes."""

from __future__ import annotations

from pathlib import Path


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def all_files(folder: Path) -> list[Path]:
    """All nonempty files below a folder, which excludes the lock."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
