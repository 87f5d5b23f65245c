"""The store that the networks of a run were trained from, for commands that name the run only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from permafrost.config.builder import build_config
from permafrost.config.store import StoreOptions
from permafrost.core.errors import require
from permafrost.runs.folder import CONFIG_NAME, STUDENTS, RunFolder, saved_options
from permafrost.storage.files import file_at
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store


def store_of_run(run: str, options: dict[str, Any]) -> str:
    """Return the store.path of a run's students, or else of its teacher.

    Args:
        run: Name of the run.
        options: Plain values of the section `store`, whose path is not set.

    Raises:
        ConfigError: If the run has trained nothing, if its students name several stores, or if the store is not there.
        DamagedFileError: If a config of the run is damaged.
    """
    folder = RunFolder(run).path
    fingerprints = _fingerprints(folder, "distill", f"{STUDENTS}/*/distill")
    fingerprints = fingerprints or _fingerprints(folder, "teach")
    require(
        len(fingerprints) > 0,
        f"{folder} has no network that was trained from a store; correct run=, or name the store, as in "
        "store.path=stores/photos",
    )
    require(
        len(fingerprints) == 1,
        f"the students of run={run} were trained from several stores ({', '.join(fingerprints)}); name one with "
        "store.path=",
    )
    ((path, expected),) = fingerprints.items()
    place = build_config(StoreOptions, options | {"path": path}, "store").folder
    require(
        file_at(place / MANIFEST_NAME).exists(),
        f"run={run} was trained from the store {path}, where there is none now; say where it is with store.path=",
    )
    store = Store(place)
    require(
        all(store.part_with(each).manifest.fingerprint == each for each in expected),
        f"run={run} was trained from the store {path}, but another store is there now; say where the old one is with "
        f"store.path=, or type store.path={path} to read the new one",
    )
    return path


def _fingerprints(folder: Path, *patterns: str) -> dict[str, set[str]]:
    """Return the fingerprints of the stores that trainings of a run have read, by store.path."""
    fingerprints: dict[str, set[str]] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(f"{pattern}/{CONFIG_NAME}")):
            values = saved_options(path.parent)
            fingerprints.setdefault(values["store"]["path"], set()).add(values["inputs"]["store"])
    return fingerprints
