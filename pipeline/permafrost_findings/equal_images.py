"""Findings about a packed store: images with equal bytes, and what that means for classes, splits and counts.

    EQUAL_IMAGES["equal_in_splits"](pairs)      # yields (level, message), as the rules of findings.py do

Packing has the SHA-256 of every image. Images that were stored again in other bytes are not equal here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import quote
from permafrost.core.records import NO_LABEL
from permafrost.sources.data_preview import Finding

if TYPE_CHECKING:
    from permafrost.sources.data_preview import Remark
    from permafrost.store.reader import Store

_BLOCK_ROWS = 65_536
_NAMED = 3
_COPIES, _MOSTLY_COPIES = 0.01, 0.5
"""Minimum fractions of all records for a note and a warning about copies."""
_MIN_WARNING_SHARE = 0.001
"""Fraction of the records of a split, or of all, below which pairs are a note."""


@dataclass(frozen=True, kw_only=True)
class EqualImages:
    """Rows of a store whose images have equal bytes, next to each other in the order of their digests.

    Some 24 bytes a row are held while rows are sorted, and then those rows only that have a copy.
    """

    store: Store
    rows: NDArray[np.int64]
    """Rows with a copy, i64 [n]: copies in the order of the index, one image after another."""
    images: NDArray[np.int32]
    """Number of the image of each of these rows, ascending, i32 [n]."""

    @property
    def num_copies(self) -> int:
        """Number of records beyond the first one of each image."""
        return int((self.images[1:] == self.images[:-1]).sum())

    def differ(self, values: NDArray[Any], keep: NDArray[np.bool_] | None = None) -> Pairs:
        """Return pairs of neighbors that are one image and have different values.

        Args:
            values: A whole number for each of the rows, [n].
            keep: Rows that have a value, bool [n]; None for all.
        """
        rows, images = self.rows, self.images
        if keep is not None and not keep.all():
            rows, images, values = rows[keep], images[keep], values[keep]
        at = np.flatnonzero((images[1:] == images[:-1]) & (values[1:] != values[:-1]))
        _, first = np.unique(images[at], return_index=True)
        return Pairs(num_images=len(first), rows=np.stack([rows[at], rows[at + 1]], 1)[first])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two rows for each image that is found under two values."""

    num_images: int
    rows: NDArray[np.int64]
    """i64 [images, 2]."""


def equal_images(store: Store) -> EqualImages:
    """Find the rows of a store whose images have equal bytes.

    Args:
        store: Store of images.
    """
    digests = store.index.image_digests()
    # the bytes of the mapped file, 32 for each row
    table = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, 32)[digests.offset :]
    heads = table[: len(digests), :8].copy().view(np.uint64).ravel()
    order = np.argsort(heads, kind="stable")
    is_pair = np.zeros(max(len(order) - 1, 0), bool)
    for start in range(0, len(is_pair), _BLOCK_ROWS):
        block = order[start : start + _BLOCK_ROWS + 1]
        at = np.flatnonzero(heads[block[1:]] == heads[block[:-1]])
        is_pair[start + at] = (table[block[at]] == table[block[at + 1]]).all(1)
    del heads
    has_copy = np.zeros(len(order), bool)
    has_copy[:-1] |= is_pair
    has_copy[1:] |= is_pair
    images = np.zeros(len(order), np.int32)
    np.cumsum(~is_pair, out=images[1:])
    return EqualImages(store=store, rows=order[has_copy], images=images[has_copy])


# ---- rules -----------------------------------------------------------------------------------------


def find_equal_in_splits(equal: EqualImages) -> Iterator[Remark]:
    """Find images that are in two splits."""
    names = list(equal.store.manifest.records)
    pairs = equal.differ(_splits_of(equal.store, equal.rows))
    if not pairs.num_images:
        return
    sizes = equal.store.manifest.records
    affected = {int(code) for code in np.unique(_splits_of(equal.store, pairs.rows.ravel()))}
    smallest = min(sizes[names[code]] for code in affected)
    examples = _examples(equal.store, pairs, lambda row: names[_splits_of(equal.store, row)[0]])
    yield (
        "warning" if pairs.num_images > _MIN_WARNING_SHARE * smallest else "note",
        f"images are in more than one split, byte for byte ({pairs.num_images:,}; {examples}), so that a result on one "
        "split is partly about images of another; keep each image in one of them",
    )


def find_equal_in_classes(equal: EqualImages) -> Iterator[Remark]:
    """Find images that have two classes in a store with one label for each record."""
    index = equal.store.index
    if index.has_many_labels:
        return
    labels = index.values("label", equal.rows)
    pairs = equal.differ(labels, labels != NO_LABEL)
    if not pairs.num_images:
        return
    classes = equal.store.manifest.classes
    examples = _examples(
        equal.store, pairs, lambda row: quote(classes[index.values("label", row)[0]])
    )
    yield (
        "warning" if pairs.num_images > _MIN_WARNING_SHARE * index.num_rows else "note",
        f"images have several classes, byte for byte ({pairs.num_images:,}; {examples}), of which one record has one; "
        "correct the labels, or list all classes of an image in one record (data.labels)",
    )


def find_copies(equal: EqualImages) -> Iterator[Remark]:
    """Find images that are stored several times, if there are many."""
    copies, total = equal.num_copies, equal.store.index.num_rows
    if copies < _COPIES * total or copies < _NAMED:
        return
    examples = _examples(equal.store, equal.differ(equal.rows), None)
    yield (
        "warning" if copies >= _MOSTLY_COPIES * total else "note",
        f"records are copies of others, byte for byte ({copies:,} of {total:,}; {examples}), so that counts of records "
        "are not counts of images",
    )


EQUAL_IMAGES: dict[str, Callable[[EqualImages], Iterator[Remark]]] = {
    "equal_in_splits": find_equal_in_splits,
    "equal_in_classes": find_equal_in_classes,
    "equal_images": find_copies,
}
"""Rules by the name of their findings."""


def find_equal_images(store: Store) -> tuple[Finding, ...]:
    """Return the findings of a packed store about images with equal bytes; none for rows of a table.

    Args:
        store: Finished store.
    """
    if not store.form.has_places:
        return ()
    equal = equal_images(store)
    return tuple(
        Finding(name=name, level=level, message=message)
        for name, rule in EQUAL_IMAGES.items()
        for level, message in rule(equal)
    )


def _splits_of(store: Store, rows: NDArray[np.int64]) -> NDArray[np.int16]:
    """Return the place of each row's split in the store's manifest."""
    shards = store.manifest.shards
    codes = np.empty(len(shards), np.int16)
    places = {name: place for place, name in enumerate(store.manifest.records)}
    for name, numbers in shards.splits.items():
        codes[numbers] = places[name]
    return codes[store.index.shard_numbers(rows)]


_Word: TypeAlias = Callable[[NDArray[np.int64]], str]


def _examples(store: Store, pairs: Pairs, word: _Word | None) -> str:
    """Name the first pairs, each record with a word about it."""
    texts = []
    for rows in pairs.rows[:_NAMED]:
        keys = [quote(unquote(key), 200)[1:-1] for key in store.index.keys(rows)]
        if word is not None:
            keys = [f"{key} ({word(rows[place : place + 1])})" for place, key in enumerate(keys)]
        texts.append(" and ".join(keys))
    return "such as " + "; ".join(texts)
