"""Findings about equal and similar images, and what they mean for classes, splits and counts.

    EQUAL_IMAGES["equal_in_splits"](pairs)      # yields (level, message), as the rules of findings.py do

Packing has the SHA-256 and a thumbnail of every image. Equal images have the same bytes, or the same pixels: those with
equal thumbnails are decoded and compared. Similar ones have nearly the same thumbnail, as a copy at another size or
quality has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import UserError, quote
from permafrost.core.records import NO_LABEL
from permafrost.sources.bursts import GAP, find_bursts
from permafrost.sources.data_preview import Preview, Remark
from permafrost.sources.splits import TEST, TRAIN
from permafrost.store.facts import UNKNOWN, Fact, Finding
from permafrost.store.image_decoding import THUMBNAIL_SIDE, decode_pixels
from permafrost.store.reader import Store
from permafrost.store.shard_records import content_of
from permafrost.store.thumbnails import read_thumbnails
from permafrost_findings.thresholds import (
    MAX_BITS,
    MAX_MEAN_DIFFERENCE,
    MIN_CONTRAST,
    MIN_COPIES_SHARE,
    MIN_EQUAL_SHARE,
    MIN_SIMILAR_SHARE,
    MOSTLY_COPIES_SHARE,
)

_BLOCK_ROWS, _BLOCK_PAIRS = 65_536, 4096
_NAMED = 3
_ROTATIONS = (0, 16, 32, 48)
"""Bits by which hashes are rotated before they are sorted, so that similar ones are neighbors in one of the orders."""
_MAX_DECODED, _MAX_COMPARED = 500, 100_000
"""Largest numbers of pairs whose images are decoded, and whose thumbnails are compared."""
_REMEDY = (
    "keep a burst in one split: of a folder with data.group=burst data.keep_groups=true, of a table with a column of "
    "groups (data.group)"
)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EqualImages:
    """Rows of a store with equal images, next to each other.

    Some 40 bytes a row are held while rows are sorted, and then those rows only that have a copy.
    """

    store: Store
    rows: NDArray[np.int64]
    """Rows with a copy, i64 [n]: one image after another."""
    images: NDArray[np.int32]
    """Number of the image of each of these rows, ascending, i32 [n]."""
    similar: NDArray[np.int64]
    """Pairs of rows of different splits with similar images that are not equal, i64 [pairs, 2]."""
    has_thumbnails: bool = True
    """False if images were compared by their bytes alone."""

    @property
    def num_copies(self) -> int:
        """Number of records beyond the first one of each image."""
        return int((self.images[1:] == self.images[:-1]).sum())

    def differ(self, values: NDArray[Any], keep: NDArray[np.bool_] | None = None) -> _Rows:
        """Return two neighbors of each image that has different values, i64 [images, 2].

        Args:
            values: A whole number for each of the rows, [n].
            keep: Rows that have a value, bool [n]; None for all.
        """
        rows, images = self.rows, self.images
        if keep is not None and not keep.all():
            rows, images, values = rows[keep], images[keep], values[keep]
        at = np.flatnonzero((images[1:] == images[:-1]) & (values[1:] != values[:-1]))
        _, first = np.unique(images[at], return_index=True)
        return np.stack([rows[at], rows[at + 1]], 1)[first]


def equal_images(store: Store) -> EqualImages:
    """Find the rows of a store with equal images, and pairs of rows of different splits with similar ones.

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
    has_copy = np.zeros(len(order), bool)
    has_copy[:-1] |= is_pair
    has_copy[1:] |= is_pair
    images = np.zeros(len(order), np.int32)
    np.cumsum(~is_pair, out=images[1:])
    rows, images = order[has_copy], images[has_copy]
    hashes = hashes_of(store)
    if hashes is None:
        return EqualImages(
            store=store,
            rows=rows,
            images=images,
            similar=np.empty((0, 2), np.int64),
            has_thumbnails=False,
        )
    exact, means = hashes
    candidates = neighbor_pairs(exact, lambda a, b: (exact[a] == exact[b]) & (heads[a] != heads[b]))
    del order, is_pair, has_copy
    of_pixels = [
        pair for pair in candidates[:_MAX_DECODED].tolist() if _have_equal_pixels(store, *pair)
    ]
    rows, images = _joined(rows, images, np.array(of_pixels, np.int64).reshape(-1, 2))
    splits = _splits_of(store, np.arange(store.index.num_rows))
    pairs = similar_pairs(means, lambda a, b: splits[a] != splits[b])
    pairs = pairs[_are_similar(_thumbnails_of(store, pairs), pairs)]
    image_of = dict(zip(rows.tolist(), images.tolist(), strict=True)) if len(pairs) else {}
    similar = [
        [one, other]
        for one, other in pairs.tolist()
        if image_of.get(one, one) != image_of.get(other, -1)
    ]
    return EqualImages(
        store=store, rows=rows, images=images, similar=np.array(similar, np.int64).reshape(-1, 2)
    )


def _joined(
    rows: NDArray[np.int64], images: NDArray[np.int32], pairs: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return rows and their images, with pairs of rows that are one image, too."""
    if not len(pairs):
        return rows, images
    alone = np.setdiff1d(pairs, rows)
    most = int(images.max(initial=-1)) + 1
    rows = np.concatenate([rows, alone])
    images = np.concatenate([images, most + np.arange(len(alone), dtype=np.int32)])
    place = np.argsort(rows, kind="stable")
    ends = images[place[np.searchsorted(rows, pairs, sorter=place)]]
    groups = np.arange(int(images.max()) + 1, dtype=np.int32)
    for _ in ends:  # each round joins one more pair of a chain at least
        np.minimum.at(groups, ends.ravel(), groups[ends].min(axis=1).repeat(2))
    images = groups[images]
    order = np.argsort(images, kind="stable")
    return rows[order], images[order]


def neighbor_pairs(
    values: NDArray[np.uint64], keep: Callable[[_Rows, _Rows], NDArray[np.bool_]]
) -> _Rows:
    """Return the pairs of rows that follow one another in the order of their values and are kept, i64 [n, 2]."""
    order = np.argsort(values, kind="stable")
    pairs = [np.empty((0, 2), np.int64)]
    for start in range(0, max(len(order) - 1, 0), _BLOCK_ROWS):
        block = order[start : start + _BLOCK_ROWS + 1]
        pairs.append(np.stack([block[:-1], block[1:]], 1)[keep(block[:-1], block[1:])])
    return np.concatenate(pairs)


def similar_pairs(
    hashes: NDArray[np.uint64], keep: Callable[[_Rows, _Rows], NDArray[np.bool_]]
) -> _Rows:
    """Return pairs of rows, of those that are kept, whose hashes differ in a few bits, i64 [n, 2], the lower row first.

    They are neighbors in the order of the hashes rotated by some bits, of which there are few for each row.
    """

    def are_near(one: _Rows, other: _Rows) -> NDArray[np.bool_]:
        differing = (hashes[one] ^ hashes[other]).view(np.uint8).reshape(-1, 8)
        are_close = np.unpackbits(differing, axis=1).sum(1) <= MAX_BITS
        return np.asarray(are_close & keep(one, other))

    turned = [
        hashes << np.uint64(bits) | hashes >> np.uint64(64 - bits) if bits else hashes
        for bits in _ROTATIONS
    ]
    pairs = np.concatenate([neighbor_pairs(values, are_near) for values in turned])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    return pairs[:: len(pairs) // _MAX_COMPARED + 1]


def hash_thumbnails(thumbnails: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hash thumbnails u8 [n, 256].

    Returns:
        A hash u64 [n] of all values, and a bit for each cell of a grid of 8x8 that is brighter than their mean.
    """
    exact = np.zeros(len(thumbnails), np.uint64)
    words = np.ascontiguousarray(thumbnails).view(np.uint64).T
    for word in np.ascontiguousarray(words):
        exact = (exact ^ word) * _MIX
        exact ^= exact >> np.uint64(29)
    wide = thumbnails.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE).astype(np.uint16)
    rows = wide[:, ::2] + wide[:, 1::2]
    cells = (rows[..., ::2] + rows[..., 1::2]).reshape(-1, (THUMBNAIL_SIDE // 2) ** 2)
    bits = np.packbits(cells > cells.mean(axis=1, keepdims=True), axis=1)
    return exact, bits.view(np.uint64).ravel()


def hashes_of(store: Store) -> tuple[NDArray[np.uint64], NDArray[np.uint64]] | None:
    """Return the hashes of `hash_thumbnails` of all records of a store; None if it lacks thumbnails."""
    parts = []
    for number in range(len(store.shards)):
        thumbnails = read_thumbnails(store, number)
        if thumbnails is None:
            return None
        parts.append(hash_thumbnails(thumbnails))
    if not parts:
        return None
    exact, means = zip(*parts, strict=True)
    return np.concatenate(exact), np.concatenate(means)


def _thumbnails_of(store: Store, pairs: _Rows) -> NDArray[np.uint8]:
    """Return the thumbnails of the rows of pairs, u8 [n, 2, 256]."""
    rows, places = np.unique(pairs, return_inverse=True)
    ends = np.searchsorted(rows, store.shards.starts)
    parts = [np.empty((0, THUMBNAIL_SIDE**2), np.uint8)]
    for number, (start, stop) in enumerate(pairwise(ends.tolist())):
        if stop > start:
            thumbnails = read_thumbnails(store, number)
            assert thumbnails is not None  # as in hashes_of
            parts.append(thumbnails[rows[start:stop] - store.rows_of_shard(number).start])
    return np.concatenate(parts)[places.reshape(-1, 2)]


def _are_similar(thumbnails: NDArray[np.uint8], pairs: _Rows) -> NDArray[np.bool_]:
    """Return which pairs of thumbnails u8 [n, 2, 256] are nearly the same, and not flat."""
    is_similar = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _BLOCK_PAIRS):
        block = slice(start, start + _BLOCK_PAIRS)
        values = thumbnails[block].astype(np.float32)
        values -= values.mean(axis=2, keepdims=True)
        difference = np.abs(values[:, 0] - values[:, 1]).mean(1)
        is_flat = values.std(axis=2).min(axis=1) < MIN_CONTRAST
        is_similar[block] = (difference <= MAX_MEAN_DIFFERENCE) & ~is_flat
    return is_similar


def _have_equal_pixels(store: Store, *rows: int) -> bool:
    pictures = []
    for row in rows:
        data = content_of(store, row)
        try:
            pictures.append(decode_pixels(data))
        except UserError:
            return False
    return bool(np.array_equal(pictures[0], pictures[1]))


# ---- rules -----------------------------------------------------------------------------------------


def find_equal_in_splits(equal: EqualImages) -> Iterator[Remark]:
    """Find images that are in two splits."""
    pairs = equal.differ(_splits_of(equal.store, equal.rows))
    if len(pairs):
        yield (
            "warning"
            if len(pairs) > MIN_EQUAL_SHARE * _smallest_split(equal.store, pairs)
            else "note",
            f"images are in more than one split, with equal pixels ({len(pairs):,}; "
            f"{_examples(equal.store, pairs)}), so that a result on one split is partly about images of another; "
            f"{_REMEDY}",
        )


def _smallest_split(store: Store, pairs: _Rows) -> int:
    """Return the number of records of the smallest split that has a row of the pairs."""
    sizes = list(store.manifest.records.values())
    return min(int(sizes[code]) for code in np.unique(_splits_of(store, pairs.ravel())).tolist())


def find_similar_in_splits(equal: EqualImages) -> Iterator[Remark]:
    """Find images of a split that look like those of another one."""
    count = len(equal.similar)
    if count >= _NAMED and count >= MIN_SIMILAR_SHARE * _smallest_split(equal.store, equal.similar):
        yield (
            "warning",
            f"images of different splits look alike ({count:,} pairs; {_examples(equal.store, equal.similar)}), as "
            f"copies at another size or quality do, and frames of one video; {_REMEDY}",
        )


def find_equal_in_classes(equal: EqualImages) -> Iterator[Remark]:
    """Find images that have two classes in a store with one label for each record."""
    index = equal.store.index
    if index.has_many_labels:
        return
    labels = index.values("label", equal.rows)
    pairs = equal.differ(labels, labels != NO_LABEL)
    if len(pairs):
        classes = equal.store.manifest.classes
        examples = _examples(
            equal.store, pairs, lambda row: quote(classes[index.values("label", row)[0]])
        )
        yield (
            "warning" if len(pairs) > MIN_EQUAL_SHARE * index.num_rows else "note",
            f"images have several classes, with equal pixels ({len(pairs):,}; {examples}), of which one record "
            "has one; correct the labels, or list all classes of an image in one record (data.labels)",
        )


def find_copies(equal: EqualImages) -> Iterator[Remark]:
    """Find images that are stored several times, if there are many."""
    copies, total = equal.num_copies, equal.store.index.num_rows
    if copies >= max(_NAMED, MIN_COPIES_SHARE * total):
        yield (
            "warning" if copies >= MOSTLY_COPIES_SHARE * total else "note",
            f"records are copies of others, with equal pixels ({copies:,} of {total:,}; "
            f"{_examples(equal.store, equal.differ(equal.rows))}), so that counts of records are not counts of images",
        )


EQUAL_IMAGES: dict[str, Callable[[EqualImages], Iterator[Remark]]] = {
    "equal_in_splits": find_equal_in_splits,
    "similar_in_splits": find_similar_in_splits,
    "equal_in_classes": find_equal_in_classes,
    "equal_images": find_copies,
}
"""Rules by the name of their findings."""


def find_equal_images(store: Store) -> tuple[Finding | Fact, ...]:
    """Return the findings of a packed store about equal images, and the fact; none for rows of a table.

    Args:
        store: Finished store.
    """
    if not store.form.has_places:
        return ()
    equal = equal_images(store)
    shared = len(equal.differ(_splits_of(store, equal.rows)))
    similar = f"{len(equal.similar):,}" if equal.has_thumbnails else UNKNOWN
    fact = Fact(
        name="equal images",
        value=f"in several splits {shared:,}, similar {similar}; copies in all {equal.num_copies:,}",
        source=f"all {store.index.num_rows:,}",
        warning=""
        if equal.has_thumbnails
        else "compared by their bytes alone, as thumbnails are missing or damaged; a new store.path makes them",
    )
    findings = (
        Finding(name=name, level=level, message=message)
        for name, rule in EQUAL_IMAGES.items()
        for level, message in rule(equal)
    )
    return fact, *findings


def find_equal_in_sample(preview: Preview) -> Iterator[Remark | Fact]:
    """Find images of different splits that look alike among those that a preview has decoded."""
    sample = preview.sample
    if preview.is_packed_next or len(sample.thumbnails) < _NAMED:
        return
    keys, splits, data = zip(*sample.thumbnails, strict=True)
    thumbnails = np.frombuffer(b"".join(data), np.uint8).reshape(len(keys), -1)
    codes = np.unique(splits, return_inverse=True)[1]
    exact, means = hash_thumbnails(thumbnails)
    pairs = similar_pairs(means, lambda a, b: codes[a] != codes[b])
    pairs = pairs[_are_similar(thumbnails[pairs], pairs)]
    equal = int((exact[pairs[:, 0]] == exact[pairs[:, 1]]).sum())
    yield Fact(
        name="equal images",
        value=f"in several splits {equal:,}, similar {len(pairs) - equal:,}",
        source=f"thumbnails of {len(keys):,} decoded of {preview.num_records:,}",
    )
    if len(pairs):
        names = "; ".join(
            " and ".join(f"{quote(unquote(keys[row]), 200)[1:-1]} ({splits[row]})" for row in pair)
            for pair in pairs[:_NAMED].tolist()
        )
        yield (
            "note" if len(pairs) < max(MIN_SIMILAR_SHARE * len(keys), _NAMED) else "warning",
            f"images of different splits look alike ({len(pairs):,} pairs among the {len(keys):,} that were decoded; "
            f"such as {names}); packing compares all of them",
        )


def find_bursts_in_splits(preview: Preview) -> Iterator[Remark]:
    """Find photographs of split test whose burst split train has, too, among those whose headers were read."""
    read = [] if getattr(preview.data, "group", None) else preview.sample.photographs
    rows = list(zip(find_bursts([photograph for photograph, _ in read]), read, strict=True))
    trained = {first: path for first, ((path, *_), split) in rows if split == TRAIN}
    tested = [(first, path) for first, ((path, *_), split) in rows if split == TEST]
    if shared := [f"{path} and {trained[first]}" for first, path in tested if first in trained]:
        yield (
            "note" if len(shared) < _NAMED else "warning",
            f"{len(shared):,} of {len(tested):,} images of split test that were read were taken within {GAP} s of one "
            f"of train, or are its copies by name (such as {quote(shared[0], 200)[1:-1]}), so results on test are "
            f"partly about pictures of train; {_REMEDY}",
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


def _examples(store: Store, pairs: _Rows, word: _Word | None = None) -> str:
    """Name the first pairs, each record with a word about it: its split, if none is given."""
    splits, texts = list(store.manifest.records), []
    say = word or (lambda row: splits[_splits_of(store, row)[0]])
    for rows in pairs[:_NAMED]:
        keys = [quote(unquote(key), 200)[1:-1] for key in store.index.keys(rows)]
        keys = [f"{key} ({say(rows[place : place + 1])})" for place, key in enumerate(keys)]
        texts.append(" and ".join(keys))
    return "such as " + "; ".join(texts)
