"""Teacher passes that a run reads, recorded with the run, so that a pass that is added to the store changes nothing.

    runs/<run>/passes.json   {<fingerprint of a store>: {<request>: [<pass>, ...]}}

A request is what the options name, such as "passes resnet56", or "passes" if they name none. What it means is decided
when the run first reads the store, and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.runs.folder import PASSES_NAME, run_folder
from permafrost.storage.files import exists
from permafrost.storage.signed_files import damaged, read_json, write_json
from permafrost.store.entries import StoreMismatchError

if TYPE_CHECKING:
    from permafrost.store.reader import Store, TeacherPass


def name_passes(
    run: str, store: Store, names: Sequence[str], *, stored_views: int | None = None
) -> tuple[str, ...]:
    """Return the full names of the passes that a run reads from a store, and record them with the run.

    Args:
        run: Name of the run, or its address in a bucket.
        store: The store.
        names: Those of store.teacher: full names, or parts of them. If it is empty, the passes that the run has read
            before are used, otherwise the only pass of the store.
        stored_views: None for canonical passes; otherwise the number of views by which one of several passes of stored
            views is selected.

    Returns:
        The names; () if none is named or recorded and the store has none or several.

    Raises:
        StoreMismatchError: If a name fits no pass or several, or if the store no longer has a recorded pass.
    """
    request = pass_request(names, stored_views)
    replayed = stored_views is not None
    present = [folder.name for folder in store.pass_folders(stored_views=replayed)]
    recorded = recorded_passes(run, store, request, present)
    if recorded:
        return recorded
    store.require_readable(names)
    passes = [store.open_pass(name, stored_views=replayed) for name in names or present]
    if not names and len(passes) > 1 and replayed:
        passes = [teacher_pass for teacher_pass in passes if teacher_pass.num_views == stored_views]
    if not names and len(passes) != 1:
        return ()
    full = tuple(teacher_pass.name for teacher_pass in passes)
    if full != tuple(names):
        record_passes(run, store, request, full)
    return full


def first_made_pass(
    run: str, store: Store, weights_sha256: str, passes: Sequence[TeacherPass]
) -> list[TeacherPass]:
    """Find the pass that a run reads of those made with the given weights: the recorded one, otherwise the first.

    Args:
        run: Name of the run, or its address in a bucket.
        store: Store of the passes.
        weights_sha256: SHA-256 of the teacher's weights.
        passes: Passes to choose from.

    Returns:
        A list of that pass; empty if none was made with these weights.

    Raises:
        StoreMismatchError: If the recorded pass is not among them.
    """
    by_name = {p.name: p for p in passes if p.manifest.teacher["weights_sha256"] == weights_sha256}
    if not by_name:
        return []
    request = f"pass of the weights {weights_sha256[:16]}"
    recorded = recorded_passes(run, store, request, list(by_name))
    if not recorded:
        recorded = (next(iter(by_name)),)
        record_passes(run, store, request, recorded)
    return [by_name[recorded[0]]]


def logits_first(passes: Sequence[TeacherPass]) -> list[TeacherPass]:
    """Order passes so that the first one, which a student is compared with, has logits if any of them has."""
    return sorted(passes, key=lambda teacher: not teacher.manifest.has_logits)


def pass_request(names: Sequence[str] = (), stored_views: int | None = None) -> str:
    """Describe what the options name, as in passes.json. The arguments are those of `name_passes`."""
    kind = "passes" if stored_views is None else f"passes of {stored_views} stored views"
    return " ".join([kind, *names])


def recorded_passes(
    run: str, store: Store, request: str, present: Sequence[str]
) -> tuple[str, ...]:
    """Return the passes that a run's request means, () if it was not made before.

    Args:
        run: Name of the run, or its address in a bucket.
        store: Store of the passes.
        request: The request, from `pass_request`.
        present: Names of the passes that it may mean.

    Raises:
        StoreMismatchError: If one of the recorded passes is missing.
    """
    recorded = _read(run).get(store.manifest.fingerprint, {}).get(request, [])
    missing = [name for name in recorded if name not in present]
    if missing:
        raise StoreMismatchError(
            f"{_path(run)} says that the run reads {', '.join(missing)}, which {store.path} no longer has"
            f"{store.hint_at_unfinished(*missing)}; run "
            "precompute with that teacher again, or choose another run= and name a pass with store.teacher="
        )
    return tuple(recorded)


def record_passes(run: str, store: Store, request: str, passes: Sequence[str]) -> None:
    """Record which passes a run's request means from now on.

    Args:
        run: Name of the run, or its address in a bucket.
        store: Store of the passes.
        request: The request, from `pass_request`.
        passes: Full names of the passes.
    """
    values = _read(run)
    requests = values.setdefault(store.manifest.fingerprint, {})
    if requests.get(request) != list(passes):
        requests[request] = list(passes)
        write_json(_path(run), values)


def _path(run: str) -> Path:
    return run_folder(run) / PASSES_NAME


def _read(run: str) -> dict[str, dict[str, list[str]]]:
    """Read passes.json. Raises DamagedFileError for wrong digests and types."""
    path = _path(run)
    if not exists(path):
        return {}
    advice = "delete it, and name the passes that this run reads with store.teacher="
    values: dict[str, dict[str, list[str]]] = read_json(path, advice)
    for requests in values.values():
        lists = list(requests.values()) if isinstance(requests, dict) else [None]
        if not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in lists
        ):
            raise damaged(path, "it has an entry that is not a list of names", advice)
    return values
