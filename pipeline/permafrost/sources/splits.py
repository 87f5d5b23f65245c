"""Assignment of records to splits."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from permafrost.core.errors import ConfigError, quote
from permafrost.core.records import Record
from permafrost.sources.classes import is_unknown
from permafrost.sources.tally import Tally

SPELLED_SPLITS = "names taken for splits"
"""Topic of a tally: folders, cells and names of tars that spell a split in another way."""
TRAIN = "train"
"""Name of the split for training."""
TEST = "test"
"""Name of the split for evaluation, into which data.test_fraction draws."""
UNKNOWN_SPLIT = ""
"""Split of a record that the data leave open, until one is drawn."""


_SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val",),
    "valid": ("valid",),
    "validation": ("validation",),
    "dev": ("dev", "development"),
    "test": ("test", "testing", "tst"),
    "eval": ("eval", "evaluation"),
}
_SPLIT_OF = {spelling: split for split, spellings in _SPLITS.items() for spelling in spellings}
_GENERIC = frozenset(
    {"", "set", "data", "dataset", "images", "image", "imgs", "img", "split", "seg"}
)
"""Words other than the split in names such as train_set, test-images and seg_train."""


def is_split_name(name: str) -> bool:
    """Return whether files may be named after this split: letters, digits, - and _."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) is not None


@lru_cache(maxsize=4096)
def known_split(name: str) -> str | None:
    """Return the split that a folder, a cell or the beginning of a tar's name spells, None if it spells none.

    Any case is accepted, and the usual words next to the split: Training, TEST, val_set, seg_train, trainset.
    """
    text = unicodedata.normalize("NFC", name).strip().lower()
    words = [word for word in re.split(r"[\s_.-]+", text) if word not in _GENERIC]
    if len(words) != 1:
        return None
    (word,) = words
    return _SPLIT_OF.get(word) or _SPLIT_OF.get(re.sub(r"(?<=.)(data|images|set)$", "", word))


def split_of(
    value: str, names: Mapping[str, str], error: Callable[[str], ConfigError], tally: Tally
) -> str:
    """Return the split that a table's cell denotes.

    Args:
        value: Text of the cell.
        names: Option data.split_names; empty takes the values as they are, and the usual spellings as their split
            (`known_split`).
        error: Function that builds the exception for an invalid cell from its message.
        tally: Receives other spellings of a split.

    Raises:
        ConfigError: If the cell denotes no split, or one that files cannot be named after.
    """
    if value not in names and is_unknown(value):
        raise error(f"{quote(value)} is not a split")
    if names and value not in names:
        raise error(
            f"data.split_names has no {quote(value)}; it has: {', '.join(map(quote, names))}"
        )
    split = names[value] if names else known_split(value) or value
    if not is_split_name(split):
        raise error(
            f"the split {quote(split)} must have only letters, digits, - and _; rename it with data.split_names"
        )
    if split != value and not names:
        tally.add(SPELLED_SPLITS, value, split)
    return split


def split_off_test(
    records: Iterable[Record],
    fraction: float,
    unit_of: Callable[[Record], str] | None = None,
    split: str = TRAIN,
    *,
    is_exact: bool = False,
) -> Iterator[Record]:
    """Move the records of a split whose key's hash falls below `fraction` to split test, and its others to split train.

    This is a pure function of each key, so adding or removing records does not move others. Where `is_exact` is
    set, drawn_splits.py corrects the shares of small classes once all records are listed.

    Args:
        records: Records of all splits.
        fraction: Fraction of the records to move; 0 moves none.
        unit_of: Function from a record to the name of the unit that is moved as a whole; None moves single records.
        split: The split, TRAIN or UNKNOWN_SPLIT.
        is_exact: Record the hashes, so that small classes get exact shares. Tables and the sets of libraries, whose
            results are published, keep the hashes' own draw.

    Raises:
        ConfigError: If the records of split train already have a split test.
    """
    if fraction == 0:
        yield from records
        return
    for record in records:
        if record.split == TEST and split == TRAIN:
            raise ConfigError(
                f"data.test_fraction={fraction}, but the data already have a split {TEST}; set data.test_fraction=0"
            )
        if record.split != split:
            yield record
            continue
        position = _position(record.key if unit_of is None else unit_of(record))
        drawn = replace(record, split=TEST if position < fraction else TRAIN)
        yield replace(drawn, position=position) if is_exact else drawn


def _position(unit: str) -> float:
    """Return the hash of a key or a unit as a number in [0, 1)."""
    digest = hashlib.blake2b(unit.encode(), digest_size=6, person=b"test_fraction").digest()
    return int.from_bytes(digest, "big") / 2**48
