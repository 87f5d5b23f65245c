"""The task that annotates one shard: read its frames, run the teacher, write the fields and their commit marker.

The task is picklable, opens no files until it is called, and commits the shard with its commit marker. Running it again
writes the same bytes. The number of threads that torch uses is fixed, as it may change the last bits of a sum.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.samples import TeacherTask
from permafrost.annotation.stored_views import DrawnViews, StoredViews, read_arrays
from permafrost.core.errors import device_errors
from permafrost.core.interrupts import check_interrupted
from permafrost.core.records import NO_LABEL, TOP_CLASS
from permafrost.core.tasks import ShardResult, Subject, count_wait, task_context
from permafrost.core.uploads import put_off
from permafrost.loading.transfer import pinned_for
from permafrost.models.compute import device_name, torch_threads
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import marker_path
from permafrost.store.commit_pass import is_annotated, write_pass_shard
from permafrost.store.deaths import ShardDeaths
from permafrost.store.fields import PassFields
from permafrost.store.frames import FrameBatch, ShardFrames, labels_of_rows
from permafrost.store.projections import read_projections
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry


@dataclass(frozen=True, kw_only=True)
class AnnotateShard(TeacherTask):
    """Task that writes the rows of a ShardEntry in the pass's fields, and their commit marker."""

    folder: RootedPath
    fields: PassFields
    fingerprint: str
    classes: Sequence[str]
    decode_threads: int = 1
    views: StoredViews | None = None
    """Stored views and their records, None for the canonical view of all records."""
    store_fingerprint: str = ""
    """Fingerprint of the generation that the pass is over; empty for the whole store."""

    @property
    def subject(self) -> Subject:
        return Subject(str(self.store_path), self.folder.name)

    def marker(self, shard: ShardEntry) -> RootedPath:
        """Return the path of a shard's commit marker."""
        return marker_path(self.folder, shard.name)

    def is_done(self, shard: ShardEntry) -> bool:
        """Return whether a shard has its commit marker and the files that it lists."""
        return is_annotated(self.folder, "", shard.name)

    def __call__(self, shard: ShardEntry) -> ShardResult[Correct]:
        started = time.monotonic()
        begun = self._ahead.pop(shard.name, None)
        decoding = begun or self._mark(shard, ShardDeaths(self.folder, shard.name))
        # The number of threads may change the last bits of a sum, so it is fixed.
        with (
            torch_threads(self.num_threads),
            device_errors(self.config.memory_advice),
            decoding.marked,
        ):
            if begun is None:
                # A copy, without the teacher that this process has built.
                alone = partial(replace(self).annotate_alone, shard, decoding.keys)
                decoding.deaths.find_cause(decoding.keys, alone)
                self._begin(decoding)
            batches = self._batches(decoding)
            values, fidelity = self._annotator.annotate(batches, decoding.keys, decoding.views)
            write = partial(
                write_pass_shard,
                self.fields,
                self._position(shard),
                shard.name,
                decoding.keys,
                values,
                fidelity,
                self.fingerprint,
                device=device_name(self._annotator.device),
            )
            with count_wait("write", decoding.waits):
                put_off(write, ExitStack())
        correct = count_correct(
            self._store, shard, values, self.teacher.classes in (None, len(self.classes))
        )
        return ShardResult(
            name=shard.name,
            records=len(decoding.keys),
            seconds=time.monotonic() - started,
            waits=decoding.waits,
            report=correct,
        )

    def _mark(self, shard: ShardEntry, deaths: ShardDeaths) -> _Decoding:
        """Mark a shard as one at which this process may die, before anything of it is decoded."""
        keys, views = self._store.index.shard_keys(self._store.shards.number_of(shard.name)), None
        if self.views is not None:
            keys = [keys[row] for row in self.views.rows_of(self._store, shard)]
            views = self.views.draw(self._store, shard)
        marked = ExitStack()
        marked.enter_context(deaths)
        return _Decoding(shard, keys, views, deaths, marked)

    def _begin(self, decoding: _Decoding) -> None:
        """Prepare to decode a shard in batches at fixed positions, a few of them ahead of the teacher."""
        frames = ShardFrames(self._store, decoding.shard, self._rows(decoding.shard))
        device, input_size = self._annotator.device, self._annotator.input_size
        size, count = self.config.records_per_batch, len(decoding.keys)
        # An original image has a window for each view, so a batch of them is decoded in as many parts.
        views = decoding.views
        parts = views.count if views is not None and views.cuts_originals else 1
        others = task_context().others

        def read(rows: slice) -> Callable[[], list[NDArray[np.generic]]]:
            cut = None if views is None else views.to_cut(rows)
            call = partial(read_arrays, frames.select(rows), cut, input_size)
            return call if others is None else others.begin(call)

        def submit(start: int, stop: int) -> list[Future[Any]]:
            starts = range(start, stop, max(1, size // parts))
            slices = [slice(at, min(at + starts.step, stop)) for at in starts]
            batch = [self._pool.submit(read(rows)) for rows in slices]
            # The parts are ahead of it in the queue.
            return [*batch, self._pool.submit(_joined, batch, device)]

        decoding.submissions = (
            submit(start, min(start + size, count)) for start in range(0, count, size)
        )
        decoding.ahead = 1 + -(-self.decode_threads // parts) if others is None else others.ahead

    def _submit_following(self) -> None:
        """Submit a batch of the shard that follows, unless a process has died at it."""
        context = task_context()
        for decoding in self._ahead.values():
            decoding.submit()
        if context.upcoming is None or self._ahead:
            return
        shard: ShardEntry = context.upcoming
        if (deaths := ShardDeaths(self.folder, shard.name)).count == 0:
            context.dropped.callback(self._drop_following)
            self._ahead[shard.name] = self._mark(shard, deaths)
            self._begin(self._ahead[shard.name])
            self._ahead[shard.name].submit()

    def _drop_following(self) -> None:
        """Cancel the shard that follows, after an error."""
        for decoding in self._ahead.values():
            decoding.cancel()
            decoding.marked.close()
        self._ahead.clear()

    def _batches(self, decoding: _Decoding) -> Iterator[FrameBatch]:
        """Iterate over a shard's frames, and go on to those of the shard that follows where they are submitted."""
        try:
            while len(decoding.waiting) < decoding.ahead and decoding.submit():
                pass
            while decoding.waiting:
                check_interrupted()
                with count_wait("decode", decoding.waits):
                    batch = decoding.waiting.popleft()[-1].result()
                if not decoding.submit():
                    self._submit_following()
                yield batch
        finally:
            decoding.cancel()

    def annotate_alone(self, shard: ShardEntry, keys: list[str], key: str) -> None:
        """Decode and annotate one record of a shard, without writing anything.

        Args:
            shard: Shard of the record.
            keys: Keys of all records of the shard that the pass covers.
            key: Key of the record.
        """
        row = keys.index(key)
        with torch_threads(self.num_threads):
            frames = ShardFrames(self._store, shard, self._rows(shard))
            self._annotator.annotate([frames.read(row, row + 1)], [key])

    def _rows(self, shard: ShardEntry) -> NDArray[np.int64] | None:
        """Rows of the shard that the pass covers, None for all."""
        return None if self.views is None else self.views.rows_of(self._store, shard)

    def _position(self, shard: ShardEntry) -> int:
        """Position of the shard among those that the pass covers."""
        if self.views is not None:
            return self.views.position(self._store, shard)
        return self._store.shards.number_of(shard.name)

    @cached_property
    def _store(self) -> Store:
        return Store(self.store_path).part_with(self.store_fingerprint)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.decode_threads, "decode")

    @cached_property
    def _ahead(self) -> dict[str, _Decoding]:
        """Shard that follows, by name, once its first batches are decoded."""
        return {}

    @cached_property
    def _annotator(self) -> TeacherAnnotator:
        return TeacherAnnotator(
            self.teacher, self.classes, self.explainer, self.config, self._store.size
        ).with_projections(read_projections(self.folder))


@dataclass
class _Decoding:
    """A shard that is decoded."""

    shard: ShardEntry
    keys: list[str]
    """Keys of its records that the pass covers."""
    views: DrawnViews | None
    deaths: ShardDeaths
    marked: ExitStack
    """Context in which a death of this process counts as one at the shard."""
    ahead: int = 1
    """Number of batches that are submitted and not taken, at most, together with those of the shard that follows."""
    submissions: Iterator[list[Future[Any]]] = field(default_factory=lambda: iter(()))
    """Batches that are not submitted yet, each submitted when it is taken: parts of it, and the whole last."""
    waiting: deque[list[Future[Any]]] = field(default_factory=deque)
    waits: dict[str, float] = field(default_factory=dict)
    """As in ShardResult."""

    def submit(self) -> bool:
        """Submit the next batch, and return whether there was one."""
        if (batch := next(self.submissions, None)) is not None:
            self.waiting.append(batch)
        return batch is not None

    def cancel(self) -> None:
        """Cancel what is waiting, and wait for what has begun."""
        for future in chain(*self.waiting):
            if not future.cancel():
                future.exception()


def _joined(parts: Sequence[Future[list[NDArray[Any]]]], device: torch.device) -> FrameBatch:
    """Concatenate the parts of a batch, in memory that is ready for the device."""
    batch = FrameBatch(*map(_concatenated, zip(*[part.result() for part in parts], strict=True)))
    return batch._replace(frames=pinned_for(batch.frames, device))


def _concatenated(parts: Sequence[NDArray[Any]]) -> Tensor:
    """Concatenate parts, and copy a single read-only one, as of another process, for torch."""
    (first, *others) = parts
    return torch.from_numpy(np.concatenate(parts) if others or not first.flags.writeable else first)


class Correct(NamedTuple):
    """Number of labeled records, and of those among them that the teacher classifies correctly.

    Where records have many labels, they are the denominator 2 TP + FP + FN and the numerator 2 TP of F1, over all known
    pairs of a record and a class.
    """

    labeled: int
    correct: int


def count_correct(
    store: Store, shard: ShardEntry, values: Mapping[str, NDArray[np.generic]], is_known: bool
) -> Correct:
    """Count the labeled records of a shard, and those among them that the teacher classifies correctly, or for F1.

    Args:
        store: Store of the shard.
        shard: The shard, all of whose records the values cover.
        values: Fields of the pass; only logits [n, V, K] or top_class [n, V, k] are read.
        is_known: True if the teacher's outputs are classes of the store, the first ones or all of them.

    Returns:
        The counts; zeros for a pass without logits (of all classes, for many labels), stored views, and classes that
        are not those of the store.
    """
    rows = store.rows_of_shard(store.shards.number_of(shard.name))
    if (stored := values.get("logits", values.get(TOP_CLASS))) is None:
        return Correct(0, 0)
    fits = is_known and stored.shape[:2] == (len(rows), 1)
    if not fits or (store.index.has_many_labels and "logits" not in values):
        return Correct(0, 0)
    if store.index.has_many_labels:
        truth = labels_of_rows(store, rows).numpy()[:, : stored.shape[-1]]
        logits: NDArray[Any] = values["logits"][:, 0, : truth.shape[1]]
        predicted = (logits >= 0) & ~np.isnan(truth)
        hits = int((predicted & (truth == 1)).sum())
        return Correct(int(predicted.sum() + (truth == 1).sum()), 2 * hits)
    labels = store.index.values("label", rows)
    labeled = labels != NO_LABEL
    largest = stored[:, 0].argmax(axis=1) if "logits" in values else stored[:, 0, 0]
    return Correct(int(labeled.sum()), int((labeled & (largest == labels)).sum()))
