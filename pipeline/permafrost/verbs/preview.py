"""Show how data are understood before anything is packed: splits, classes, labels, files, and all findings.

    permafrost preview data=image_folder data.path=photos
    permafrost preview data=webdataset data.path=tars preview.all=true executor=ray
    permafrost preview data=image_table data.path=photos.csv data.label=species
    permafrost preview data=image_folder data.path=photos against=stores/photos      (before they are appended)

A finding has a name and a level. `precompute` makes the same preview before it packs, and stops at an error
unless data.accept=[name] says that the data are as you mean them.

Reads   the names of all records, and the headers of preview.files of them
Writes  nothing, except that images inside of Parquet files are copied to data.cache
Rerun   the same command shows the same
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.data import DataConfig, ImageFolderDataConfig, NoDataConfig, PreviewConfig
from permafrost.core.errors import ConfigError, printable, require
from permafrost.core.records import Source
from permafrost.sources.bursts import find_bursts
from permafrost.sources.data_preview import Preview, preview_source
from permafrost.sources.findings import accept_hint, add_findings
from permafrost.sources.source import ListedData, list_data, named_repeats
from permafrost.sources.splits import TRAIN
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.facts import Finding
from permafrost.store.generations import describe_changes
from permafrost.store.listing import Listing, listing_files
from permafrost.store.reader import Store
from permafrost.store.shard_plan import check_keys


@dataclass(frozen=True, kw_only=True)
class PreviewResult:
    """Preview of the data, and the command that packs them."""

    preview: Preview
    next: str = ""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        lines = {"data": self.preview.sheet().block()}
        if table := class_table(self.preview):
            lines["records of classes"] = table
        return {**lines, "findings": _describe(self.preview), "next": self.next}


def preview_data(config: PreviewConfig) -> PreviewResult:
    """List the records in a temporary folder, read headers, and find problems.

    Raises:
        ConfigError: If no data are named, or if they cannot be listed.
    """
    require(
        not isinstance(config.data, NoDataConfig),
        "preview needs data=, as in data=image_folder data.path=photos",
    )
    with (
        _scratch(config.scratch) as folder,
        listing_files(folder) as files,
        ExecutorChoice(config.executor, config.cluster) as choice,
    ):
        store = None if config.against is None else Store(config.against)
        listed = list_data(config.data, files, 0, choice.for_records, store)
        if store is not None:
            listed = listed.compared_with(store, files, 0)
        preview = preview_source(
            config.data,
            listed,
            choice.for_records(listed.listing.num_records if config.preview.all else 0),
            files.folder,
            files=config.preview.limit,
        )
        others = _find_repeated_keys(listed.source, listed.listing)
        others += _find_changes(config.data, listed)
    preview = add_findings(preview)
    preview = replace(preview, findings=(*others, *preview.findings))
    return PreviewResult(preview=preview, next=_next_command(config, preview))


def _find_repeated_keys(source: Source, listing: Listing) -> list[Finding]:
    """Find records with the same key, which the plan of a store would refuse."""
    if not listing.num_records:
        return [
            Finding(
                name="no_records", level="error", message="there are no records; check data.path"
            )
        ]
    try:
        with named_repeats(source, listing):
            check_keys(listing)
    except ConfigError as error:
        return [Finding(name="repeated_keys", level="error", message=str(error))]
    return []


def _find_changes(data: DataConfig, listed: ListedData) -> list[Finding]:
    """Find records that differ from those that a store has, at which an append stops."""
    if listed.comparison is None:
        return []
    changes = describe_changes(data, listed.comparison, listed.source, listed.listing)
    message = (
        f"records that the store has are not as they were packed: {'; '.join(changes)}; restore them, or keep the "
        "packed ones with store.changed=keep"
    )
    return [Finding(name="changed_records", level="error", message=message)] if changes else []


def _next_command(config: PreviewConfig, preview: Preview) -> str:
    """Return the command that packs the data, or appends them to the store of `against`; empty if it would stop."""
    words = config.command[1:]
    typed = [word for word in words if word.startswith(("data=", "data."))]
    has_experiment = any(word.startswith("experiment=") for word in words)
    if not typed or has_experiment or preview.with_level("error"):
        return ""
    if preview.comparison is not None:
        if not len(preview.comparison.new):
            return ""
        typed += [f"store.path={config.against}", "store.append=true"]
        return shlex.join(["permafrost", "precompute", *typed, "teacher=none"])
    labeled = preview.counts.labeled
    if (
        getattr(config.data, "test_fraction", None) == 0
        and {split for split, _ in labeled} == {TRAIN}
        and max(labeled.values()) > 1
    ):
        photographs = [each for each, _ in preview.sample.photographs]
        typed.append("data.test_fraction=0.2")
        if isinstance(config.data, ImageFolderDataConfig) and len(
            set(find_bursts(photographs))
        ) < len(photographs):
            typed = list(dict.fromkeys([*typed, "data.group=burst", "data.keep_groups=true"]))
    stem = Path(str(getattr(config.data, "path", ""))).stem
    name = stem if re.fullmatch(r"[\w-]+", stem) else "my-store"
    return shlex.join(
        ["permafrost", "precompute", *typed, f"store.path=stores/{name}", "teacher=none"]
    )


@contextmanager
def _scratch(folder: str | None) -> Iterator[RootedPath]:
    if folder is not None:
        file_at(Path(folder).absolute()).make_folder()
    with tempfile.TemporaryDirectory(prefix="permafrost-preview-", dir=folder) as created:
        yield RootedPath.of(Path(created))


_TABLE_CLASSES = 20
"""Largest number of classes whose counts are printed."""


def class_table(preview: Preview) -> str:
    """Return the number of records of each class by split, a line each; empty for many classes, and for none."""
    names, splits = preview.classes, sorted(preview.counts.records)
    if not 1 < len(names) <= _TABLE_CLASSES:
        return ""
    width = max(len(printable(name)) for name in names)
    rows = [f"  {'':{width}}  " + "  ".join(f"{split:>8}" for split in splits)]
    rows += [
        f"  {printable(name):{width}}  "
        + "  ".join(f"{preview.count(split, label):>{max(8, len(split))},}" for split in splits)
        for label, name in enumerate(names)
    ]
    return "\n".join(["", *rows])


def _describe(preview: Preview) -> str:
    """List the findings, a line each."""
    rows = [
        f"  {finding.level:<8} {finding.name}: {printable(finding.message)}"
        for finding in preview.findings
    ]
    if preview.with_level("error"):
        rows.append(f"  precompute stops at errors{accept_hint(preview)}")
    return "\n".join(["", *rows]) if rows else "none"
