"""Join of the names of targets with the records of a store.

Names are compared as Arrow columns, without an object per record, in one process: at a million records that is some
200 MB for a few seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store
from permafrost_exchange.format_options import JoinKind
from permafrost_exchange.target_reader import ListedTargets, TargetError

_SHOWN = 3
"""Names of an error."""


class JoinedTargets(NamedTuple):
    """Targets of the records of a store."""

    numbers: NDArray[np.int64]
    """Place of each record's target among the names, i64 [records of the store]; -1 for none."""
    names: pa.Array
    """Names of all targets."""
    places: pa.Array
    """Texts by which the reader finds them again."""
    without_record: int
    """Number of targets that are of no record."""


def join_targets(
    store: Store,
    listing: Iterator[ListedTargets],
    kind: JoinKind,
    split: str,
    *,
    repeats: bool = False,
) -> JoinedTargets:
    """Find the target of each record.

    Args:
        store: The store.
        listing: The targets.
        kind: Meaning of the names.
        split: Split whose records are counted for kind="position".
        repeats: True if a name may be listed several times, of which the first target is taken.

    Raises:
        TargetError: If names are equal where they must differ, or no record has a target.
        ConfigError: If the store has no such split.
    """
    if not (parts := [[pa.array(texts, pa.large_string()) for texts in part] for part in listing]):
        raise TargetError("path= has no targets")
    names, places = (pa.concat_arrays(arrays) for arrays in zip(*parts, strict=True))
    listed, names_compared = len(names), names
    if kind == "position":
        numbers = _join_positions(store, names, split, repeats=repeats)
    else:
        records, targets = _comparable(store, names, kind)
        if not repeats:
            _require_different(targets, names, kind, "targets")
        if kind != "image":  # records of equal images have the same target
            _require_different(records, _keys(store), kind, "records")
        indices = pc.index_in(records, value_set=targets)
        numbers = indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        names_compared = targets
    if repeats:
        listed = pc.count_distinct(names_compared).as_py()
    matched = np.unique(numbers[numbers >= 0])
    if not len(matched):
        examples = ", ".join(map(repr, names[:_SHOWN].to_pylist()))
        keys = ", ".join(map(repr, store.index.keys(range(min(_SHOWN, store.index.num_rows)))))
        raise TargetError(
            f"none of {len(names):,} targets is of a record of {store.path}: by format.join={kind} they are called "
            f"{examples}, and the store has {keys}; set format.join= to another meaning, or correct path="
        )
    return JoinedTargets(numbers, names, places, listed - len(matched))


def _keys(store: Store) -> pa.Array:
    return store.index.key_column(np.arange(store.index.num_rows))


def _keys_as_named(store: Store, names: pa.Array) -> pa.Array:
    """Return the key of each record, without its split before it where the names of targets leave that out."""
    keys = _keys(store)
    bare = pa.concat_arrays(
        pc.replace_substring_regex(
            keys.slice(store.rows_of_shard(number).start, shard.records),
            f"^{re.escape(shard.split)}(-|_|%2F)",
            "",
        )
        for number, shard in enumerate(store.shards)
    )
    is_bare = pc.and_(pc.invert(pc.is_in(keys, names)), pc.is_in(bare, names))
    return pc.if_else(is_bare, bare, keys)


def _record_paths(store: Store) -> pa.Array:
    """Return the path of each record, which its key escapes."""
    keys = _keys(store)
    paths = pc.replace_substring(pc.replace_substring(keys, "%2F", "/"), "%2E", ".")
    odd = pc.match_substring(paths, "%")
    if pc.any(odd).as_py():
        places = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
        restored = [unquote(text) for text in keys.take(pa.array(places)).to_pylist()]
        mask = odd if isinstance(odd, pa.Array) else odd.combine_chunks()
        paths = pc.replace_with_mask(paths, mask, pa.array(restored, pa.large_string()))
    return paths


_SUFFIXES = r"(?i)\.(jpe?g|png|bmp|gif|webp|tiff?|ppm|pgm|npy|npz|pt|pth|tar|json|safetensors|jp2|jxl|avif)$"


def _without_suffix(paths: pa.Array) -> pa.Array:
    """Return paths without the suffix of a file, composed: macOS writes an accent as a separate character."""
    paths = pc.utf8_normalize(paths, form="NFC")
    return pc.replace_substring_regex(paths, _SUFFIXES, "")


def _comparable(store: Store, names: pa.Array, kind: JoinKind) -> tuple[pa.Array, pa.Array]:
    """Return texts of records and of targets that are equal where a target is of a record."""
    if kind == "key":
        return _keys_as_named(store, names), names
    if kind == "image":
        return _image_digests(store, names)
    records = _without_suffix(_record_paths(store))
    targets = _without_suffix(pc.replace_substring(names, "\\", "/"))
    depths = (pc.min(pc.count_substring(column, "/")).as_py() for column in (records, targets))
    depth = 1 + min(each or 0 for each in depths) if kind == "path" else 1
    return _tail(records, depth), _tail(targets, depth)


def _tail(paths: pa.Array, depth: int) -> pa.Array:
    """Return the last folders and the name of each path."""
    folders = f"(?:[^/]+/){{{depth - 1}}}"
    return pc.replace_substring_regex(paths, f"^.*?({folders}[^/]+)$", r"\1")


def hex_column(digests: pa.Array) -> pa.Array:
    """Return digests of 32 bytes as texts of 64 hexadecimal digits."""
    data = np.frombuffer(digests.buffers()[1], np.uint8)[32 * digests.offset :][: 32 * len(digests)]
    offsets = np.arange(len(digests) + 1, dtype=np.int64) * 64
    return pa.LargeStringArray.from_buffers(
        len(digests), pa.py_buffer(offsets), pa.py_buffer(data.tobytes().hex().encode())
    )


def _image_digests(store: Store, names: pa.Array) -> tuple[pa.Array, pa.Array]:
    if not pc.all(pc.equal(pc.utf8_length(names), 64)).as_py():
        raise TargetError(
            f"format.join=image needs names that are SHA-256 in 64 digits, and {names[0].as_py()!r} is one of them"
        )
    return hex_column(store.index.image_digests()), pc.utf8_lower(names)


def _require_different(values: pa.Array, names: pa.Array, kind: JoinKind, noun: str) -> None:
    """Raise TargetError if values are equal, except for equal targets of one image."""
    if pc.count_distinct(values).as_py() == len(values) or kind == "image":
        return
    counts = pc.value_counts(values)
    repeated = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    first = repeated[0].as_py()
    places = np.flatnonzero(pc.equal(values, first).to_numpy(zero_copy_only=False))[:_SHOWN]
    shown = ", ".join(map(repr, names.take(pa.array(places)).to_pylist()))
    raise TargetError(
        f"by format.join={kind}, {len(repeated):,} names mean several {noun}, such as {shown}, which are all "
        f"{first!r}; set format.join= to a meaning that tells them apart"
    )


def _join_positions(
    store: Store, names: pa.Array, split: str, *, repeats: bool
) -> NDArray[np.int64]:
    """Join numbers with the records of a split, sorted by folder and file as ImageFolder of torchvision sorts them."""
    try:
        positions = pc.cast(names, pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise TargetError(f"format.join=position needs names that are numbers ({error})") from error
    covered = np.asarray(rows_of_split(store.index, split))
    paths = _record_paths(store).take(pa.array(covered))
    is_bare = pc.equal(paths, _without_suffix(paths))
    # Folders are compared before files, and a name without suffix as if it had one.
    endings = pc.if_else(
        is_bare, pa.scalar(".", pa.large_string()), pa.scalar("", pa.large_string())
    )
    folders = pc.replace_substring(paths, "/", "\x01")
    sortable = pc.binary_join_element_wise(folders, endings, pa.scalar("", pa.large_string()))
    order = pc.sort_indices(sortable).to_numpy().astype(np.int64)
    different, firsts, counts = np.unique(positions, return_index=True, return_counts=True)
    if different.min(initial=0) < 0 or (not repeats and len(different) != len(positions)):
        odd = int(different[0] if different[0] < 0 else different[counts > 1][0])
        raise TargetError(
            f"format.join=position: number {odd} is {'below 0' if odd < 0 else 'named twice'}; a number means one "
            "record, from 0"
        )
    require(
        positions.max(initial=0) < len(covered),
        f"format.join=position: there are targets up to number {positions.max():,}, and split {split} has "
        f"{len(covered):,} records, so a number does not mean the same record here and there; pack all records "
        "that the numbers were counted on, or set format.split=",
        TargetError,
    )
    numbers = np.full(store.index.num_rows, -1, np.int64)
    numbers[covered[order][different]] = firsts
    return numbers
