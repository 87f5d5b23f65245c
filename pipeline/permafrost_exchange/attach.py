"""Join a shared pass to a store of the same images, which may have been packed elsewhere.

    permafrost attach from=shared store.path=stores/mine

Records are found by the SHA-256 of their images: of the files, or with share's pixels=true of the decoded frames. Other
images are refused. The fields are those of the shared pass, bit for bit.

Reads   a folder that `permafrost share` has written, and the index of <store.path>
Writes  <store.path>/teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from __future__ import annotations

from dataclasses import dataclass

from permafrost.cluster.executors import ExecutorChoice
from permafrost.core.errors import require
from permafrost.storage.lock import folder_lock
from permafrost.store.reader import Store
from permafrost.verbs.next_commands import NextCommands
from permafrost_exchange.options import AttachConfig


@dataclass(frozen=True, kw_only=True)
class AttachResult:
    """The pass, and how much of it this call has made."""

    attached_pass: str
    records: int
    """Number of records with targets."""
    attached_records: int
    """Number of those that this call has written; 0 if the pass was finished."""
    joined_by: str
    """Digests by which records were found: of files or of pixels."""
    next: str = ""


def attach_targets(config: AttachConfig) -> AttachResult:
    """Write a shared pass into a store.

    Raises:
        UserError: If the folder is damaged, or the images are others.
    """
    from permafrost_exchange.share_reader import attach_pass  # imports torch

    require(
        config.path != "", "from is empty; set it to a folder that permafrost share has written"
    )
    path = config.store.folder.absolute()
    store = Store(path)
    with (
        folder_lock(path),
        ExecutorChoice(config.executor, config.cluster) as choice,
    ):
        done = attach_pass(config, store, choice.for_records(store.num_records()))
        opened = store.open_pass(
            done.name, stored_views=bool(store.passes_named(done.name, stored_views=True))
        )
    return AttachResult(
        attached_pass=done.name,
        records=done.records,
        attached_records=done.written,
        joined_by=done.joined_by,
        next=NextCommands(store, config.store.folder.root).distill("my-student", opened),
    )
