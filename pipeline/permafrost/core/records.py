"""Records on their way into a store, their keys, the fields that a pass stores of them, and the source of records."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import quote

from permafrost.core.errors import ConfigError, require, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_KEY_BYTES = 200
"""Largest length of a record's key in UTF-8."""
NO_LABEL = -1
"""Label of a record without one."""
NO_GROUP = -1
"""Group of a record without one. Lower numbers are groups that are kept together and get no scores, as bursts."""
MAX_GROUP = 2**31 - 1
"""Largest group number, because the index stores groups as int32."""
NO_SIZE = -1
"""Placeholder for the height and width of a row of a table."""
NO_POSITION = -1.0
"""Value of `Record.position` for a record whose split the data name."""
NO_CLASS = -1
"""Padding of `target_class` for records that explain fewer than E classes."""
IMPOSSIBLE_LOGIT = -65504.0
"""Logit of a class with probability 0, the lowest finite float16: its softmax is 0 at any temperature below 600."""
NONE = (NO_CLASS,)
"""Labels of a record that is known to have none of many labels."""


N = TypeVar("N", int, "NDArray[Any]")


def mark_unknown(label: N) -> N:
    """Return the number, below NO_CLASS, that stands in a list of labels for a class of which nothing is known.

    The function is its own inverse.
    """
    return NO_CLASS - 1 - label


def labels_of_states(states: Sequence[bool | None]) -> tuple[int, ...]:
    """Return the labels of a record as `Record.labels`.

    Args:
        states: For each class whether the record has it, None where that is unknown.
    """
    if all(state is None for state in states):
        return ()
    labels = (
        mark_unknown(label) if state is None else label
        for label, state in enumerate(states)
        if state is None or state
    )
    return tuple(labels) or NONE


def label_of_box(labels: Sequence[int]) -> int:
    """Return the label of a box that has none, in a record of many labels: the record's only class.

    Args:
        labels: `Record.labels`.

    Raises:
        ValueError: If the record has no class, or several.
    """
    classes = [label for label in labels if label > NO_CLASS]
    require(
        len(classes) == 1,
        f"a box without a label belongs to the only class of its record, but this record has {len(classes)} of "
        "them; give each box a `label`, or leave the box out",
        ValueError,
    )
    return classes[0]


WhenMoved = Literal["warp", "warp_covered", "keep", "refuse"]
"""Treatment of a field under a view other than the stored one. warp: warped with the view, with zeros outside of the
frame. warp_covered: warped with the view, and cells outside of the frame are left out of the loss. keep: the same in
every view. refuse: undefined in another view."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Labeled rectangle in normalized canonical coordinates: the outer edges of the frame are at -1 and 1.

    A source may list boxes in pixels instead (Record.boxes_in_pixels). In that case x1 and y1 are exclusive.
    """

    label: int
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """Input as listed by its source. The bytes are read later, shard by shard."""

    key: str
    """Permanent name of the record: unique, at most 200 bytes, without dots or slashes."""
    split: str
    label: int = NO_LABEL
    labels: tuple[int, ...] = ()
    """Labels of the record in a multi-label data set: its classes, and `mark_unknown` of those of which nothing is
    known. Empty if nothing is known of any class, NONE if the record has none."""
    group: int = NO_GROUP
    weight: float | None = None
    """Weight of the record's loss; None for 1 in data without weights."""
    boxes: tuple[Box, ...] = ()
    boxes_in_pixels: bool = False
    """True if the boxes are in pixels of the original, upright image; packing normalizes them."""
    content: tuple[Any, ...] = ()
    """JSON values that the source needs to read the record (a seed, a relative path and its size). They are part
    of the fingerprint and therefore never contain an absolute path. Lists arrive as tuples at the source."""
    position: float = field(default=NO_POSITION, compare=False)
    """Hash in [0, 1) by which the split was drawn; NO_POSITION if the data name the split."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Bytes of one record."""

    image: bytes
    """Image file, or the row of a table as store/codecs.py writes it."""
    suffix: str
    """Suffix of the image's member in the tar: lower case, without a dot, jpg for jpeg."""
    mask: bytes | None = None
    """Mask as PNG, uint8 [H, W]; 0 is background."""
    offset: int = -1
    """Byte offset of the image in the tar that it was read from; -1 where there is no tar. The same holds for
    `mask_offset` and the mask."""
    mask_offset: int = -1


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """Description of one stored field of a teacher pass, an array [records, V, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "int8", "uint16", "int32"]
    codec: Literal["raw", "maxabs"] = "raw"
    when_moved: WhenMoved = "keep"
    frame: Literal["full", "center_crop"] | None = None
    """Part of the canonical frame that the teacher received; None for fields that are not spatial."""
    crop_fraction: float | None = None
    """Fraction of the original's shorter side that a center crop covers; None where `frame` is not a crop."""
    margin: float = 0.0
    """Width of the black border that was added on each side of that part before the teacher received it, in units of
    its side. The grid covers the border, too."""
    mirrored: bool = False
    """True if the first axis of `shape` has two entries, those of the image and those of its horizontal flip."""
    before_relu: bool = False
    """True if the network's next layer is a ReLU, so that its output there is max(0, value)."""
    axes: tuple[str, ...] = ()
    """Name of each axis of `shape`, for readers of the arrays; empty where no names were given."""


WINDOW_FIELD = FieldSpec(name="canonical_from_window", shape=(4,), dtype="float32", axes=("value",))
"""Field of a pass of stored views that holds the window of each view, [records, V, 4]: scales in x and y, negative for
a flip, then shifts in x and y (loading/windows.py)."""
MOVE_FIELD = FieldSpec(
    name="moves", shape=(1, 2, 3), dtype="float32", axes=("move", "row", "column")
)
"""Field of a pass of stored views whose windows are moved: matrix of each operation, [records, V, moves, 2, 3], whose
third row is 0, 0, 1. Those of policies follow from their values."""
VIEW_FIELD = FieldSpec(
    name="canonical_from_view", shape=(3, 3), dtype="float32", axes=("row", "column")
)
"""Field of a pass of stored views without windows that holds the matrix of each view, [records, V, 3, 3]. A pass whose
views change pixels, too, stores the first two rows, [records, V, 2, 3]; the third one is 0, 0, 1."""
PIXEL_FIELD = "pixel_values"
"""Field of a pass of stored views that change pixels: their values, float16 [records, V, C] (loading/recipes.py)."""
MIXTURE_FIELD = FieldSpec(name="mixture", shape=(5,), dtype="float16", axes=("value",))
"""Field of a pass of stored mixtures: the weight lambda of the record's own image and the box x0, y0, x1, y1 of the
second one (loading/mixtures.py)."""
PARTNER_FIELD = FieldSpec(name="partner_row", shape=(1,), dtype="int32", axes=("record",))
"""Field of a pass of stored mixtures: row of the second record in the shard. Its view is that of the same number."""
VIEW_FIELDS = (
    *(VIEW_FIELD.name, WINDOW_FIELD.name, MOVE_FIELD.name),
    *(PIXEL_FIELD, MIXTURE_FIELD.name, PARTNER_FIELD.name),
)
"""Fields that describe a stored view."""


FEATURES = "features"
"""Output of whole features, and the beginning of the names of its fields."""

FOLD = "fold"
"""Field of a pass of teacher=folds: the fold whose network has annotated the record."""

TOP_LOGITS, TOP_CLASS, REST_LOGITS = "top_logits", "top_class", "rest_logits"
"""Fields of a pass that stores the largest logits in place of all: the values of TopLogits."""


class Source(Protocol):
    """Picklable set of records."""

    name: str
    revision: int
    """Revision of the source's code, incremented whenever the same options and records yield other bytes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) of all images; None where sizes differ or are unknown."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of a table's columns; None where records are images."""

    def records(self) -> Iterator[Record]:
        """Yield all records once, in any order, without a list of all of them. Planning orders them by key.

        Raises:
            ConfigError: If the data contradict the options.
        """

    def read(self, record: Record) -> Content:
        """Return the bytes of a record.

        Raises:
            RecordError: If they cannot be used.
            UserError: If the file has changed since it was listed.
        """

    def where(self, record: Record) -> str:
        """Return the location of a record, such as its file, for messages."""


class ImageSource:
    """Base of a source of images, with what most of them have in common."""

    revision = 1
    frame_size: tuple[int, int] | None = None
    columns: tuple[str, ...] | None = None


_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]*")
LONG_KEY_HEAD = 150
"""Number of leading bytes that are kept of a key that is too long."""


def are_numbers(classes: Sequence[str]) -> bool:
    """Return whether names of classes are their numbers from 0, which say nothing of what they are."""
    return bool(classes) and list(classes) == list(map(str, range(len(classes))))


def describe_other_names(names: Sequence[str], classes: Sequence[str]) -> str:
    """Say how a list of classes differs from that of a store.

    Args:
        names: Names of the other list, in its order.
        classes: Names of the store's classes.
    """
    lists = {"also has": (classes, names), "lacks": (names, classes)}
    differing = [
        f"{verb} {shorten(list((Counter(one) - Counter(other)).elements()), 5)}"
        for verb, (one, other) in lists.items()
        if Counter(one) - Counter(other)
    ]
    return f"the store {' and '.join(differing) or 'has them in another order'}"


def escape_key(path: str) -> str:
    """Escape a relative path to a record's key: ASCII letters, digits, - and _, the rest percent-escaped UTF-8.

    `urllib.parse.unquote` restores the path, except for a key above the limit, which ends in a hash.

    Raises:
        ConfigError: If the path is not UTF-8.
    """
    if _PLAIN_PATH.fullmatch(path) and len(path) <= LONG_KEY_HEAD // 3:
        return path.replace("/", "%2F").replace(".", "%2E")  # as below, in a fifth of the time
    try:
        escaped = quote(path, safe="", errors="strict")
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        cause = (
            "is not UTF-8; rename the file or its folder"
            if encoding == "utf-8"
            else f"cannot be read as {encoding}, the encoding of this process; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
        raise ConfigError(f"the file name {path!r} {cause}") from None
    # quote() does not escape these two.
    escaped = escaped.replace(".", "%2E").replace("~", "%7E")
    return escaped if len(escaped) <= MAX_KEY_BYTES else _shorten(escaped)


def _shorten(escaped: str) -> str:
    head = escaped[:LONG_KEY_HEAD]
    if (last_escape := head.rfind("%")) > LONG_KEY_HEAD - len("%2E"):
        head = head[:last_escape]
    return f"{head}-{hashlib.blake2b(escaped.encode(), digest_size=16).hexdigest()}"
