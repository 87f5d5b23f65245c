"""Reading of a finished store: checked manifests, the mapped index, shards opened on demand.

Not here: repairs. A reader raises an error at damage; `permafrost precompute` writes what is missing or damaged again.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.config.explainers import explainer_line
from permafrost.config.models import Picture
from permafrost.core.errors import FileError, UserError, quote, require
from permafrost.storage.addresses import Bucket
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath, rooted
from permafrost.store.commit_markers import (
    COMMITS_FOLDER,
    PASS_MARKER_SCHEMA,
    marker_path,
    read_marker,
)
from permafrost.store.entries import REPAIR, ManifestError, StoreMismatchError
from permafrost.store.fields import PassFields, StoredShard, Values, WebDatasetFields
from permafrost.store.index import RecordIndex, RowNumbers
from permafrost.store.manifest import (
    CANONICAL_VIEW,
    INGESTED,
    MANIFEST_NAME,
    TEACHERS_FOLDER,
    PassManifest,
    StoreManifest,
    joined_identity,
    read_pass_manifest,
    read_store_manifest,
)
from permafrost.store.projections import Projection, open_projection
from permafrost.store.record_form import ImageForm, RecordForm, RowForm
from permafrost.store.row_reader import Rows
from permafrost.store.shards import JoinedShards, PassShardTable, ShardEntry, ShardTable
from permafrost.store.zarr_fields import ZarrFields

_BLOCK = 2**16
"""Rows of the index that are looked at together."""
_MAX_NAMED = 8
"""Number of passes that an error describes."""

logger = logging.getLogger("permafrost.store")

BACKENDS: dict[str, type[PassFields]] = {"zarr": ZarrFields, "webdataset": WebDatasetFields}
"""Formats of the shards of a pass, by their name in `store.backend`."""


class Store:
    """Images, their index and the teacher passes over them."""

    def __init__(self, path: str | Path | RootedPath) -> None:
        """Open a store by its manifest.

        Args:
            path: Folder of the store, which links may not lead out of, unless the path allows them, or its address.

        Raises:
            ManifestError: If there is no store, or if its manifest is damaged or of another version.
        """
        self.folder = rooted(path) if isinstance(path, str) else RootedPath.of(path)
        self.manifest: StoreManifest = read_store_manifest(self.folder)
        self._later: tuple[str, ...] = ()
        """Names of classes after those of the manifest, which a network does not know."""
        self._left_out: set[RootedPath] = set()
        self._read_manifests: dict[RootedPath, tuple[object, PassManifest]] = {}
        self._joined: dict[RootedPath, JoinedPass] = {}

    @property
    def path(self) -> Path | Bucket:
        """Folder of the store as its user named it. Its files are opened by `folder`."""
        return self.folder.root

    @property
    def shards(self) -> ShardTable:
        """Image shards, in the order of the index."""
        return self.manifest.shards

    @cached_property
    def index(self) -> RecordIndex:
        """One row per record, in the order of the shards, mapped into memory."""
        return RecordIndex(self.folder, self.manifest, len(self.manifest.classes + self._later))

    @property
    def num_generations(self) -> int:
        """Number of generations: 1, and 1 for each append."""
        return len(self.manifest.generations) or 1

    def __repr__(self) -> str:
        """Describe its records and classes, and its passes, unless a bucket would have to be asked for them."""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.manifest.records.items())
        text = (
            f"{type(self).__name__} {self.path}: {splits}; {len(self.manifest.classes):,} classes"
        )
        if self.folder.is_remote:
            return f"<{text}>"
        return f"<{text}; passes: {', '.join(f.name for f in self.pass_folders()) or 'none'}>"

    def part(self, start: int, stop: int) -> Store:
        """Return the generations from `start` to `stop`, exclusive, as a store."""
        if (start, stop) == (0, self.num_generations):
            return self
        return self._with_manifest(self.manifest.part(start, stop), self._later)

    def _with_manifest(self, manifest: StoreManifest, later: tuple[str, ...]) -> Store:
        other = copy(self)
        other.__dict__ = self.__getstate__() | {
            "manifest": manifest,
            "_later": later,
            "_read_manifests": self._read_manifests,
        }
        return other

    def known_to(self, classes: Sequence[str]) -> Store:
        """Return the store as a network of its first classes knows it: labels of the classes after them are unknown.

        Args:
            classes: Names of the network's classes. If the store does not begin with them, or has no others, it is
                returned as it is.
        """
        named = self.manifest.classes
        if not 0 < len(classes) < len(named) or named[: len(classes)] != tuple(classes):
            return self
        manifest = replace(self.manifest, classes=tuple(classes))
        return self._with_manifest(manifest, named[len(classes) :] + self._later)

    def warn_of_later_classes(self, network: str, rows: RowNumbers, effect: str) -> None:
        """Log the classes that a network does not know, in the store of `known_to`, if any of these rows has one.

        Args:
            network: The network, with a verb before its classes.
            rows: Rows of the index that it is used on.
            effect: What is done with the records.
        """
        numbers, counts = np.unique(self.index.later_labels(rows), return_counts=True)
        if named := [
            f"{quote(self._later[number])} ({count:,} records)"
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
            if number >= 0
        ]:
            logger.warning("%s does not know %s: %s", network, ", ".join(named), effect)

    def part_with(self, fingerprint: str | None) -> Store:
        """Return the generations that a fingerprint is of: one, or the first ones; all of them if it is of none."""
        parts = self.manifest.generations  # none in a store of one
        for number, part in enumerate(parts):
            if part.fingerprint == fingerprint:
                return self.part(number, number + 1)
        stops = (
            stop
            for stop in range(2, len(parts))
            if joined_identity(parts[:stop])["fingerprint"] == fingerprint
        )
        return next((self.part(0, stop) for stop in stops), self)

    def known_classes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of classes that there were when each of these rows was packed, i64 [n]."""
        parts = self.manifest.packed_parts()
        ends = self.index.shards.starts[np.cumsum([part.shards for part in parts])]
        numbers = np.searchsorted(ends, rows, side="right")
        return np.array([part.classes for part in parts], np.int64)[numbers]

    def part_of_pass(self, folder: RootedPath) -> TeacherPass:
        """Open the pass of a folder over the generations that it covers, without those that follow it."""
        return TeacherPass(self.part_with(self.pass_manifest(folder).store_fingerprint), folder)

    def _open(self, folder: RootedPath) -> TeacherPass:
        """Open the pass of a folder with those that follow it over further generations."""
        if (first := self.part_of_pass(folder)).store is self:
            return first
        following = {
            manifest.store_fingerprint: path
            for path, manifest in self._manifests().items()
            if manifest.follows == first.manifest.fingerprint
        }
        folders = [folder]
        for generation in self.manifest.packed_parts()[first.store.num_generations :]:
            if generation.fingerprint not in following:
                break
            folders.append(following[generation.fingerprint])
        manifests = [self.pass_manifest(path) for path in folders]
        joined = self._joined.get(folder)
        if joined is None or [*map(id, manifests)] != [id(part.manifest) for part in joined.parts]:
            joined = JoinedPass(self, [first, *map(self.part_of_pass, folders[1:])])
            self._joined[folder] = joined
        return joined

    def rows_of_shard(self, number: int) -> range:
        """Return the rows of the index that a shard has.

        Args:
            number: Number of the shard in the index.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        return range(start, stop)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself, so it receives no rows.
        return {
            "folder": self.folder,
            "manifest": self.manifest,
            "_later": self._later,
            "_left_out": self._left_out,
            "_read_manifests": {},
            "_joined": {},
        }

    @cached_property
    def form(self) -> RecordForm:
        """Form of the records: images or rows of numbers."""
        canonical = self.manifest.canonical
        return RowForm(self.manifest.columns or ()) if canonical is None else ImageForm(canonical)

    @cached_property
    def has_larger_images(self) -> bool:
        """True if the store has the original images, and any of them is larger than the canonical frame."""
        if (frame := self.manifest.canonical) is None or frame.format != "original":
            return False
        for start in range(0, self.index.num_rows, _BLOCK):
            sizes = self.index.take(
                ("height", "width"), range(start, min(start + _BLOCK, self.index.num_rows))
            )
            if (sizes["height"] > frame.height).any() or (sizes["width"] > frame.width).any():
                return True
        return False

    def picture_of(self, picture: Picture) -> Picture:
        """Return a picture as this store shows it: from its own frames if it has no larger images to cut it from."""
        is_cut = picture.frames is None and self.has_larger_images
        return replace(picture, frames=None if is_cut else self.size)

    def warn_of_other_picture(self, picture: Picture) -> None:
        """Log that this store shows a picture otherwise than the store of its training."""
        if (shown := self.picture_of(picture)) != picture:
            logger.warning(
                "%s shows images as %s, and the network's training as %s: its numbers may differ",
                self.folder,
                shown,
                picture,
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the canonical frame, or (1, columns) for a table."""
        return self.form.size

    def num_records(self, split: str | None = None) -> int:
        """Return the number of records of a split, or of all, from the manifest alone.

        Args:
            split: Name of the split; None counts all records.
        """
        records = self.manifest.records
        return sum(records.values()) if split is None else records.get(split, 0)

    def pass_folders(self, *, stored_views: bool = False) -> list[RootedPath]:
        """Return the folders of the committed teacher passes, sorted by name.

        Args:
            stored_views: Select passes of stored views, for replay, instead of passes of the canonical view.
        """
        has_views, damaged = self._committed_passes()
        for folder, error in damaged.items():
            if folder not in self._left_out:
                self._left_out.add(folder)
                logger.warning("%s is left out: %s", folder.name, error)
        return [folder for folder, stored in has_views.items() if stored == stored_views]

    def _committed_passes(self) -> tuple[dict[RootedPath, bool], dict[RootedPath, UserError]]:
        """Return whether each committed pass has stored views, and the errors of those that cannot be read.

        Passes that follow one over an earlier generation are parts of that one.
        """
        damaged: dict[RootedPath, UserError] = {}
        manifests = self._manifests(damaged)
        firsts = {None, *(manifest.fingerprint for manifest in manifests.values())}
        left = [folder for folder, made in manifests.items() if made.follows not in firsts]
        if not damaged and set(left) - self._left_out:
            self._left_out.update(left)
            logger.warning(
                "the pass that they follow over appended records was deleted, so delete them, too: rm -r %s",
                " ".join(map(str, left)),
            )
        has_views = {
            folder: manifest.views["sampler"] != CANONICAL_VIEW
            for folder, manifest in manifests.items()
            if manifest.follows is None
        }
        return has_views, damaged

    def _manifests(
        self, damaged: dict[RootedPath, UserError] | None = None
    ) -> dict[RootedPath, PassManifest]:
        """Return the manifests of all committed passes.

        Args:
            damaged: Where the errors of those that cannot be read are added.
        """
        manifests: dict[RootedPath, PassManifest] = {}
        for folder in file_at(self.folder / TEACHERS_FOLDER).paths():
            try:
                if file_at(folder / MANIFEST_NAME).exists():
                    manifests[folder] = self.pass_manifest(folder)
            except (ManifestError, FileError) as error:
                if damaged is not None:
                    damaged[folder] = error
        return manifests

    def pass_manifest(self, folder: RootedPath) -> PassManifest:
        """Return the manifest of a committed pass, which is read once as long as its file is the same.

        Args:
            folder: Folder of the pass.

        Raises:
            ManifestError: If it is missing or damaged.
        """
        path = folder / MANIFEST_NAME
        stamp = file_at(path).stamp() if file_at(path).exists() else None
        before, manifest = self._read_manifests.get(folder, (None, None))
        if manifest is None or before != stamp:
            manifest = read_pass_manifest(folder)
            self._read_manifests[folder] = stamp, manifest
        return manifest

    def require_readable(self, names: Sequence[str]) -> None:
        """Check that a pass that may be meant can be read.

        Args:
            names: Names of passes, as in `passes_named`; empty for any pass of the store.

        Raises:
            ManifestError: If it is damaged; FileError if it cannot be read.
        """
        for folder, error in self._committed_passes()[1].items():
            if not names or any(_is_named(folder.name, name) for name in names):
                raise error

    def hint_at_unfinished(self, *names: str) -> str:
        """Return a hint at the missing manifests of unfinished passes, for messages; empty if there are none.

        Args:
            *names: Names of the passes, as in `passes_named`; without names, all passes.
        """
        unfinished = [
            str(folder / MANIFEST_NAME)
            for folder in file_at(self.folder / TEACHERS_FOLDER).paths()
            if (not names or any(_is_named(folder.name, name) for name in names))
            and file_at(folder).is_folder()
            and not file_at(folder / MANIFEST_NAME).exists()
        ]
        return f" ({', '.join(unfinished)} missing: that pass is unfinished)" if unfinished else ""

    def passes_named(self, name: str, *, stored_views: bool = False) -> list[RootedPath]:
        """Return the folders of the passes whose name, or its part before or after the last hyphen, is `name`.

        Args:
            name: Name of the pass or a part of it.
            stored_views: Select passes of stored views, for replay, instead of passes of the canonical view.
        """
        folders = self.pass_folders(stored_views=stored_views)
        return [folder for folder in folders if _is_named(folder.name, name)]

    def open_pass(self, name: str, *, stored_views: bool = False) -> TeacherPass:
        """Open the pass whose folder is `name`, or the only one with that name before or after the last hyphen.

        Args:
            name: Name of the pass or a part of it.
            stored_views: Select passes of stored views, for replay, instead of passes of the canonical view.

        Raises:
            StoreMismatchError: If none or several passes have that name, or the pass was computed on another store.
            ManifestError: If the manifest of the pass is damaged.
        """
        self.require_readable([name])
        matches = self.passes_named(name, stored_views=stored_views)
        if len(matches) != 1:
            folders = self.pass_folders(stored_views=stored_views)
            raise StoreMismatchError(
                f"{self.path} has {'several' if matches else 'no'} "
                f"{_kind(stored_views, 'passes' if matches else 'pass')} {name!r}"
                f"{'' if matches else self._hints(stored_views, name)}; set store.teacher (in Python, "
                f"the argument teacher=) to one of: {self._describe_passes(folders)}"
            )
        return self._open(matches[0])

    def _describe_passes(self, folders: Sequence[RootedPath]) -> str:
        """List passes with the weights and the outputs by which they can be told apart."""
        lines = []
        for folder in folders[:_MAX_NAMED]:
            made = self._open(folder).manifest
            outputs = (f.name for f in made.fields if not f.name.endswith(("_scale", "_class")))
            details = filter(None, [made.made_with.get("weights", ""), *outputs])
            lines.append(f"{folder.name} ({', '.join(details)})")
        return "; ".join([*lines, *(folder.name for folder in folders[_MAX_NAMED:])]) or "none"

    def usable_passes(self) -> list[TeacherPass]:
        """Open the passes of the canonical view, without damaged ones and those of other data."""
        passes = []
        for folder in self.pass_folders():
            with suppress(UserError):
                passes.append(self.open_pass(folder.name))
        return passes

    def open_passes(
        self, names: Sequence[str] = (), *, stored_views: bool = False
    ) -> list[TeacherPass]:
        """Open the named passes, in that order.

        Args:
            names: Names of the passes, as in `open_pass`; empty opens the only pass that the store contains.
            stored_views: Select passes of stored views, for replay, instead of passes of the canonical view.

        Raises:
            StoreMismatchError: If there is no pass, if none is named and there are several, or as in `open_pass`.
            ManifestError: If the manifest of a pass is damaged.
        """
        self.require_readable(names)
        if not (folders := self.pass_folders(stored_views=stored_views)):
            how = "and views=random" if stored_views else ""
            raise StoreMismatchError(
                f"{self.path} has no {_kind(stored_views)}{self._hints(stored_views)}; "
                f"run permafrost precompute with a teacher {how}".rstrip()
            )
        if not names and len(folders) > 1:
            raise StoreMismatchError(
                f"{self.path} has several {_kind(stored_views, 'passes')}; set store.teacher (in Python, "
                f"the argument teacher=) to one or more of: {self._describe_passes(folders)}"
            )
        return [
            self.open_pass(name, stored_views=stored_views) for name in names or [folders[0].name]
        ]

    def resolve_passes(
        self,
        names: Sequence[str],
        recorded: Sequence[tuple[str, ...]] = (),
        *,
        stored_views: int | None = None,
    ) -> list[TeacherPass]:
        """Open the passes that a run reads: a run keeps to those that it has read, whatever the store gets later.

        Args:
            names: Names of the passes, as in `open_pass`. If it is empty, the recorded passes are opened, otherwise the
                only pass of the store.
            recorded: Full names of the passes that the run, or each student of a sweep, has read before.
            stored_views: None for canonical passes; otherwise the number of views by which one of several passes of
                stored views is selected.

        Returns:
            The passes; [] if none is named or recorded and the store has none or several.

        Raises:
            StoreMismatchError: If a name fits no pass or several, or if the store no longer has a recorded pass.
        """
        replayed = stored_views is not None
        present = [folder.name for folder in self.pass_folders(stored_views=replayed)]
        if not names and len(recorded) == 1:
            if missing := [name for name in recorded[0] if name not in present]:
                raise StoreMismatchError(
                    f"this run reads {', '.join(missing)}, which {self.path} no longer has"
                    f"{self.hint_at_unfinished(*missing)}; run precompute with that teacher again, or choose another "
                    "run= and name a pass with store.teacher="
                )
            names = recorded[0]
        self.require_readable(names)
        known = {name for group in recorded for name in group if name in present}
        passes = []
        for name in names or present:
            fitting = [full for full in known if _is_named(full, name)]
            chosen = fitting[0] if len(fitting) == 1 else name
            passes.append(self.open_pass(chosen, stored_views=replayed))
        if not names and len(passes) > 1 and replayed:
            passes = [teacher for teacher in passes if teacher.num_views == stored_views]
        return passes if names or len(passes) == 1 else []

    def _hints(self, stored_views: bool, *names: str) -> str:
        """Return hints at passes of the other views and at unfinished ones, for messages."""
        others = [
            folder.name
            for folder in self.pass_folders(stored_views=not stored_views)
            if not names or any(_is_named(folder.name, name) for name in names)
        ]
        kind = "no stored views" if stored_views else "stored views, for mode=replay"
        verb = "has" if len(others) == 1 else "have"
        hint = f" ({', '.join(others)} {verb} {kind})" if others else ""
        return hint + self.hint_at_unfinished(*names)

    def compared_with(self, replayed: Iterable[TeacherPass]) -> list[TeacherPass]:
        """Open the canonical passes that students of stored views are compared with.

        Views that another tool has made (`ingest`) may have no canonical pass; they are left out.

        Raises:
            StoreMismatchError: If the store has no canonical pass of a teacher that precompute has run.
        """
        return [
            self.canonical_of(teacher)
            for teacher in replayed
            if not is_ingested(teacher) or self._canonical_folders(teacher)
        ]

    def _canonical_folders(self, replayed: TeacherPass) -> dict[RootedPath, PassManifest]:
        """Return the canonical passes of the teacher of a pass."""
        expected = (replayed.manifest.teacher, replayed.manifest.explainer)
        manifests = {folder: self.pass_manifest(folder) for folder in self.pass_folders()}
        return {
            folder: manifest
            for folder, manifest in manifests.items()
            if (manifest.teacher, manifest.explainer) == expected
        }

    def canonical_of(self, replayed: TeacherPass) -> TeacherPass:
        """Open the canonical pass of the teacher of a pass of stored views, with logits if there is one.

        Precompute writes one before the stored views.

        Raises:
            StoreMismatchError: If the store has no canonical pass of that teacher.
        """
        if not (same := self._canonical_folders(replayed)):
            raise StoreMismatchError(
                f"{self.path} has no canonical pass of the teacher of {replayed.name}; run permafrost precompute "
                "with it"
            )
        with_logits = [folder for folder, manifest in same.items() if manifest.has_logits]
        return self._open((with_logits or list(same))[0])


def logits_first(passes: Iterable[TeacherPass]) -> list[TeacherPass]:
    """Order passes so that the first one, which a student is compared with, has logits if any of them has."""
    return sorted(passes, key=lambda teacher: not teacher.manifest.has_logits)


def is_ingested(teacher: TeacherPass) -> bool:
    """Return whether another tool has made the targets of a pass (`ingest`)."""
    architecture = teacher.manifest.teacher.get("architecture")
    return isinstance(architecture, dict) and architecture.get("kind") == INGESTED


def _is_named(full_name: str, name: str) -> bool:
    """Return whether a pass has a name, in full, or before or after the last hyphen."""
    return name in (full_name, *full_name.rsplit("-", 1))


def _kind(stored_views: bool, noun: str = "pass") -> str:
    return f"teacher {noun} of stored views" if stored_views else f"teacher {noun}"


class TeacherPass:
    """Fields of one teacher over a store.

    Args:
        store: The store.
        folder: Folder of the pass in the store.

    Raises:
        ManifestError: If the pass is not committed, or its manifest is damaged.
        StoreMismatchError: If it was computed on other data, shards or frames than those of the store.
    """

    def __init__(self, store: Store, folder: RootedPath) -> None:
        self.store, self.folder = store, folder
        self.manifest: PassManifest = store.pass_manifest(folder)
        expected = store.manifest.dataset.fingerprint
        require(
            self.manifest.dataset_fingerprint == expected,
            f"{folder} was computed on data {self.manifest.dataset_fingerprint[:12]}, but the store contains "
            f"{expected[:12]}; remove the folder and run permafrost precompute again",
            StoreMismatchError,
        )
        require(
            self.manifest.store_fingerprint == store.manifest.fingerprint,
            f"{folder} was computed on other shards of the same data, or on other frames; "
            "remove the folder and run permafrost precompute again",
            StoreMismatchError,
        )
        if odd := sorted(set(self.fields.shared_files()) ^ set(self.manifest.files)):
            raise self._other_files(odd)
        require(
            self.manifest.selection is not None or self.shards.covers(store.shards),
            f"{folder} was computed on other shards of the same data; "
            "remove the folder and run permafrost precompute again",
            StoreMismatchError,
        )

    def _other_files(self, odd: list[str]) -> ManifestError:
        return ManifestError(
            f"{self.folder / MANIFEST_NAME} does not list the files of its fields: {', '.join(odd[:3])}; "
            "remove the folder and run permafrost precompute again"
        )

    @property
    def shards(self) -> PassShardTable:
        """Shards that it covers, in the order of its arrays."""
        return self.manifest.shards

    @property
    def num_generations(self) -> int:
        """Number of generations that it covers."""
        return self.store.num_generations

    @property
    def is_partial(self) -> bool:
        """True if it may lack records of the store, or has them in other rows."""
        return self.manifest.selection is not None

    @property
    def name(self) -> str:
        """Name of the folder: <teacher>-<fp8>."""
        return self.folder.name

    @cached_property
    def projections(self) -> dict[str, Projection]:
        """Projection of each field that stores components of the teacher's channels."""
        manifest = self.manifest
        return {
            field: open_projection(self.folder, manifest, field) for field in manifest.projections
        }

    @property
    def num_classes(self) -> int:
        """Number of the teacher's classes, which may differ from the classes of the data."""
        return int(self.manifest.teacher["classes"])

    @property
    def bytes_per_record(self) -> float:
        """Mean number of bytes of one record with all its views."""
        return self.shards.total_bytes / max(self.shards.num_rows, 1)

    @property
    def explainer(self) -> str | None:
        """Explainer that produced its maps, with its options, as `explainer_line` writes it; None without maps."""
        explained = self.manifest.explainer
        return explainer_line(explained) if "kind" in explained else None

    @property
    def views(self) -> dict[str, Any]:
        """Views that it covers and the way they were drawn; passes with equal views have the same matrices."""
        return self.manifest.views

    @property
    def num_views(self) -> int:
        """Number V of views."""
        return int(self.manifest.views["count"])

    @cached_property
    def fields(self) -> PassFields:
        """Backend that stores the fields."""
        most = (
            self.store.manifest.rows_per_shard
            if self.manifest.selection is None
            else max(self.shards.most_rows, 1)
        )
        return BACKENDS[self.manifest.backend](
            self.folder, self.manifest.fields, len(self.shards), most, self.num_views
        )

    def pass_of_shard(self, shard: ShardEntry) -> TeacherPass:
        """Return the pass whose folder may have an image shard, which is this one unless several are joined."""
        return self

    def shard_keys(self, shard: ShardEntry) -> list[str]:
        """Return the keys of the image shard's records that the pass covers, in the shard's order."""
        if self.manifest.selection is None:
            return self.store.index.shard_keys(self.store.shards.number_of(shard.name))
        if self.shards.number_of(shard.name) < 0:
            return []
        keys: list[str] = self._marker(shard)["key"].to_pylist()
        return keys

    def rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        """Return each record's row in `read_shard`, -1 if it is not covered: i64 [records of the image shard]."""
        if self.manifest.selection is None:
            return np.arange(shard.records)
        covered = {key: row for row, key in enumerate(self.shard_keys(shard))}
        keys = self.store.index.shard_keys(self.store.shards.number_of(shard.name))
        return np.array([covered.get(key, -1) for key in keys], np.int64)

    def covers_shard(self, shard: ShardEntry) -> bool:
        """Return whether it covers every record of an image shard; reads no commit marker."""
        if self.manifest.selection is None:
            return True
        position = self.shards.number_of(shard.name)
        return position >= 0 and self.shards[position].keys_sha256 == shard.keys_sha256

    def read_shard(self, shard: ShardEntry) -> Values:
        """Read every field of one shard: [covered records, V, *shape].

        Raises:
            ManifestError: If a file is missing or damaged.
        """
        return self.pass_of_shard(shard).fields.read_shard(self.stored_shard(shard))

    def open_shard(self, shard: ShardEntry, fields: Container[str]) -> dict[str, Rows]:
        """Open the given fields of one shard, large ones as rows that are read on demand.

        Raises:
            ManifestError: If a file is missing or damaged.
        """
        return self.pass_of_shard(shard).fields.open_shard(self.stored_shard(shard), fields)

    @property
    def map_cells(self) -> str:
        """Rows and columns of its maps, as in 7x7, empty without any."""
        shapes = [spec.shape for spec in self.manifest.fields if spec.name == "map"]
        return "x".join(map(str, shapes[0][-2:])) if shapes else ""

    def fields_of(self, output_name: str) -> list[str]:
        """Return the fields of an output without their scales; empty if the pass does not contain it.

        Args:
            output_name: Name such as maps, attention, class_maps, features or pooled.
        """
        stem = "map" if output_name == "maps" else output_name
        return [
            spec.name
            for spec in self.manifest.fields
            if spec.name == stem
            or (spec.name.startswith(f"{stem}_") and not spec.name.endswith("_scale"))
        ]

    def stored_shard(self, shard: ShardEntry) -> StoredShard:
        """Describe where the rows of an image shard are stored in this pass, and their checksums.

        Raises:
            ManifestError: If the shard's commit marker is missing or damaged, or does not fit the manifest.
        """
        if (marker := marker_path(self.folder, shard.name)).name not in self._markers:
            raise ManifestError(f"{marker} is missing; {REPAIR}")
        position = self.shards.number_of(shard.name)
        entry = self.shards[position]
        if odd := {file.path for file in entry.files} ^ set(
            self.fields.shard_files(position, shard.name)
        ):
            raise self._other_files(sorted(odd))
        keys = self.shard_keys(shard)
        require(
            len(keys) == entry.rows,
            f"{self.folder}: shard {shard.name} has {entry.rows} rows for {len(keys)} records; "
            "run permafrost verify",
            ManifestError,
        )
        described = StoredShard(
            position=position,
            name=shard.name,
            keys=keys,
            files={file.path: file for file in entry.files},
        )
        if not self.fields.inner_chunks_of_a_row():
            return described
        checksums = self._marker(shard)["chunk_crc32c"].combine_chunks()
        flat = checksums.flatten().to_numpy(zero_copy_only=False)
        require(
            not keys or len(flat) % len(keys) == 0,
            f"{marker} has uneven rows; run permafrost verify",
            ManifestError,
        )
        shape = (len(keys), -1) if keys else (0, self.fields.inner_chunks_of_a_row())
        return replace(described, chunk_crc32c=flat.reshape(shape))

    @cached_property
    def _markers(self) -> frozenset[str]:
        """Names of the commit markers, listed once in place of a question for each."""
        return file_at(self.folder / COMMITS_FOLDER).file_names()

    def _marker(self, shard: ShardEntry) -> pa.Table:
        digest = self.shards.marker_sha256(self.shards.number_of(shard.name))
        return read_marker(marker_path(self.folder, shard.name), PASS_MARKER_SCHEMA, digest)[0]

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the table of shards itself.
        return {"store": self.store, "folder": self.folder, "manifest": self.manifest}


class JoinedPass(TeacherPass):
    """Fields of one teacher over the first generations of a store, each of which has a pass of its own.

    Args:
        store: The store.
        parts: The pass over the first generation, and those that follow it.
    """

    def __init__(self, store: Store, parts: Sequence[TeacherPass]) -> None:
        self.store, self.folder, self.parts = store, parts[0].folder, parts
        table = JoinedShards([part.manifest.shards for part in parts])
        self.manifest = replace(parts[0].manifest, shards=table)

    @property
    def num_generations(self) -> int:
        """Number of the first generations that it covers."""
        return sum(part.num_generations for part in self.parts)

    @property
    def is_partial(self) -> bool:
        return super().is_partial or self.num_generations < self.store.num_generations

    def pass_of_shard(self, shard: ShardEntry) -> TeacherPass:
        number = self.store.shards.number_of(shard.name)
        place = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[min(place, len(self.parts) - 1)]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Number of the shard after the last one of each part."""
        return np.cumsum([len(part.store.shards) for part in self.parts])

    def shard_keys(self, shard: ShardEntry) -> list[str]:
        return [] if self._is_later(shard) else self.pass_of_shard(shard).shard_keys(shard)

    def rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        if self._is_later(shard):
            return np.full(shard.records, -1)
        return self.pass_of_shard(shard).rows_of(shard)

    def covers_shard(self, shard: ShardEntry) -> bool:
        return not self._is_later(shard) and self.pass_of_shard(shard).covers_shard(shard)

    def _is_later(self, shard: ShardEntry) -> bool:
        """Return whether a shard is of a generation after those that the pass covers."""
        return self.store.shards.number_of(shard.name) >= int(self._ends[-1])

    def stored_shard(self, shard: ShardEntry) -> StoredShard:
        return self.pass_of_shard(shard).stored_shard(shard)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"parts": self.parts}
