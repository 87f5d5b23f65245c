"""Make a pass of targets that exist: logits, maps, features or embeddings that another tool has written.

    permafrost ingest format=npz path=targets.npz store.path=stores/photos format.frame=center_crop
    permafrost ingest format=fkd path=FKD_soft_label_500_crops store.path=stores/imagenet format.views=50
    permafrost ingest format=e2kd path=frozen/fit store.path=stores/imagenet format.frame=center_crop \\
        teacher=torchvision teacher.name=resnet34 teacher.weights=resnet34.pth

Every record gets the target of its name, and the pass is as those of precompute. With teacher=, the network that made
the targets is run on a sample of the same views, and what it says is compared with them before anything is stored.

Reads   the files of `path`, and the index of <store.path>; images only with teacher=
Writes  <store.path>/teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.models import ModelConfig
from permafrost.core.errors import require
from permafrost.storage.lock import folder_lock
from permafrost.store.facts import UNKNOWN, Fact, FactSheet, write_sheets
from permafrost.store.reader import Store, TeacherPass
from permafrost.verbs.next_commands import NextCommands
from permafrost_exchange.options import IngestConfig


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """The pass, and how much of it this call has made."""

    ingested_pass: str
    """Name of the pass, and its bytes per record."""
    records: int
    """Number of records with targets."""
    ingested_records: int
    """Number of those that this call has written; 0 if the pass was finished."""
    targets_without_record: int
    agreement: str = ""
    """Agreement with `teacher=`, empty if none was named."""
    facts: dict[str, FactSheet] = field(default_factory=dict)
    """Facts about the targets, and about what is known of their teacher."""
    next: str = ""

    def printed(self) -> dict[str, Any]:
        """Return the values for the terminal."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        blocks = {subject: sheet.block() for subject, sheet in values.pop("facts").items()}
        return {**values, **blocks, "next": values["next"]}


def ingest_files(config: IngestConfig) -> IngestResult:
    """Write a pass of the targets, or finish one.

    Raises:
        UserError: If the targets cannot be read, or do not fit the store. Finished shards are kept.
    """
    from permafrost.loading.target_sheet import target_sheet
    from permafrost_exchange.ingestion import ingest_targets  # imports torch
    from permafrost_exchange.passport import check_ingested, check_pass, describe_passport

    require(config.path != "", "path is empty; set it to the file or folder of the targets")
    path = config.store.folder.absolute()
    store = Store(path)
    with (
        folder_lock(path),
        ExecutorChoice(config.executor, config.cluster) as choice,
    ):
        executor = choice.for_records(store.num_records())
        has_teacher = isinstance(config.teacher, ModelConfig)
        check = partial(check_ingested, config, executor) if has_teacher else None
        done = ingest_targets(config, store, executor, check)
        opened = store.open_pass(
            done.name, stored_views=bool(store.passes_named(done.name, stored_views=True))
        )
        manifest = opened.manifest
        if isinstance(config.teacher, ModelConfig) and not done.written:  # of an earlier call
            options = (config.passport, config.cluster, executor)
            manifest = check_pass(store, opened, config.teacher, *options)
    sheets = {"teacher": sheet_of_targets(opened), "targets": target_sheet(opened)}
    write_sheets(opened.folder, sheets)
    return IngestResult(
        facts=sheets,
        ingested_pass=f"{done.name} ({opened.bytes_per_record:,.0f} bytes per record)",
        records=done.records,
        ingested_records=done.written,
        targets_without_record=done.without_record,
        agreement=describe_passport(manifest),
        next=NextCommands(store, config.store.folder.root).distill("my-student", opened),
    )


def sheet_of_targets(made: TeacherPass) -> FactSheet:
    """Describe what is known of the teacher of targets that another tool has written."""
    described = made.manifest.teacher
    values = {
        "network": (str(described["architecture"].get("name")), "format"),
        "targets": (f"sha256 {str(described['weights_sha256'])[:12]}", "file"),
        "part of image": (str(described.get("frame")), "format.frame"),
        "normalization": (UNKNOWN, UNKNOWN),
        "classes": (f"{made.num_classes:,}", "file"),
    }
    facts = [Fact(name=name, value=text, source=source) for name, (text, source) in values.items()]
    return FactSheet(subject="teacher", facts=tuple(facts))
