"""What flows: a record on its way into a store, a batch on its way out of one.

Shape letters: B batch, K classes, V stored views, E explained classes, A map channels,
h w map grid, H W canonical frame, d columns of a table, n boxes of one record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


NO_LABEL = -1
NO_GROUP = -1
MAX_GROUP = 2**31 - 1
"""The index stores groups as int32."""
NO_SIZE = -1
"""Height and width of a table's row."""
NO_CLASS = -1
"""Pads `explained_class` where a record explains fewer than E classes."""

WhenMoved = Literal["warp", "keep", "refuse"]
"""What a field means under a view that is not the stored one."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A labelled rectangle in normalised canonical coordinates: the frame's outer edges are -1, 1.

    A source may list boxes in pixels instead (Record.boxes_in_pixels); x1 and y1 are exclusive then.
    """

    label: int
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One input as its source lists it; the bytes are read later, shard by shard."""

    key: str
    """Names the record for ever: unique, at most 200 bytes, no dots or slashes."""
    split: str
    label: int = NO_LABEL
    labels: tuple[int, ...] = ()
    """Of a set with many labels a record; empty where they are not known."""
    group: int = NO_GROUP
    boxes: tuple[Box, ...] = ()
    boxes_in_pixels: bool = False
    """The boxes are in pixels of the original, upright image; packing normalises them."""
    content: tuple[Any, ...] = ()
    """What its source needs to read it (a seed, a relative path and its size): JSON values, part of
    the fingerprint, so never an absolute path."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The bytes of one record."""

    image: bytes
    """The file; of a table the row, as store/table_rows.py writes it."""
    suffix: str
    """Of that member in the tar: lower case, without a dot, jpg for jpeg."""
    mask: bytes | None = None
    """PNG, uint8 [H, W]; 0 is background."""
    offset: int = -1
    """Of the image in the tar that it was read from, where there is one; like `mask_offset`."""
    mask_offset: int = -1


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One stored field of a teacher pass: an array [records, V, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "int8", "int32"]
    codec: Literal["raw", "maxabs"] = "raw"
    when_moved: WhenMoved = "keep"
    frame: Literal["full", "center_crop"] | None = None
    """Of a spatial field: what part of the canonical frame the teacher saw; None where not spatial."""
    crop_fraction: float | None = None
    """Of the original's shorter side that a centre crop shows; None where `frame` is no crop."""
    axes: tuple[str, ...] = ()
    """Name of each axis of `shape`, for readers of the arrays; empty where none was given."""


VIEW_FIELD = FieldSpec(
    name="canonical_from_view", shape=(3, 3), dtype="float32", axes=("row", "column")
)
"""Of a pass of stored views: the matrix of each view, [records, V, 3, 3]."""


@dataclass(frozen=True, kw_only=True)
class StoredTargets:
    """One teacher pass, as read from disk for the records of a batch; nothing is warped yet."""

    teacher: str
    logits: Tensor
    """f32 [B, K], raw."""
    explained_class: Tensor | None = None
    """i64 [B, E]; NO_CLASS pads."""
    maps: Tensor | None = None
    """f32 [B, E, A, h, w] on the teacher's grid, max-abs 1 (or all zero)."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Fields of other payloads, where they are asked for, f32 on the teacher's grids: at_<stage> [B, h, w],
    cat [B, K, r, r]; or of no place, feature [B, d], ked_z [B, M, K]."""
    extra_is_spatial: bool = True
    """Whether these fields have a place in the frame, and move with it."""
    map_from_canonical: Tensor | None = None
    """f32 [B, 3, 3]: places all these grids in the canonical frame; None where they lie in the batch's own
    view, which the teacher has seen (replay)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """One teacher pass, as the loss wants it: on the student's view and grid."""

    teacher: str
    logits: Tensor
    """f32 [B, K]."""
    explained_class: Tensor | None = None
    """i64 [B, E]."""
    maps: Tensor | None = None
    """f32 [B, E, A, h, w], after the warp."""
    map_valid: Tensor | None = None
    """bool [B, E]: False where the warped map is zero or no class is explained."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What else the loss reads, f32 on the teacher's own grids, after the warp: at_<stage> [B, h, w],
    cat [B, K, h, w], review_<level> [B, C, h, w], ft [B, C, h, w]; or of no place, feature [B, d], ked_z [B, M, K],
    ked_hidden [B, M, width]."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What becomes of a batch's images after the warp, for all who look at them; nothing of it lies on a device."""

    magnitude: int | None = None
    """Of RandAugment; None leaves it out."""
    seeds: tuple[int, ...] = ()
    """Of each record's RandAugment."""
    mixup_lambda: float | None = None
    """In [0, 1]: the share of a record's own image, and of its own label; the rest is that of the record before
    it in the batch. None mixes nothing."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records of one step. Inputs are whole canonical frames, which are warped on the training device, or rows of a
    table, which have no views.
    """

    keys: tuple[str, ...]
    record_index: Tensor
    """i64 [B]: row in the run's selection."""
    inputs: Tensor
    """u8 [B, 3, H, W]; of a table f32 [B, d]."""
    canonical_from_view: Tensor | None
    """f32 [B, 3, 3]; None where the view is the whole frame at its own size, and of a table."""
    view_index: Tensor
    """i64 [B]: the stored view replayed, -1 for a fresh one."""
    original_size: Tensor
    """f32 [B, 2]: height and width of the original images, whose proportions the frame has not; of a table NO_SIZE."""
    labels: Tensor
    """i64 [B], NO_LABEL where unknown; f32 [B, K] in a store with many labels a record, 1 for each of a
    record's classes, a row of zeros where unknown (labels.py)."""
    groups: Tensor
    """i64 [B]; NO_GROUP where unknown."""
    masks: Tensor | None = None
    """u8 [B, 1, H, W], canonical."""
    boxes: tuple[Tensor, ...] = ()
    """f32 [n, 5] a record: label, x0, y0, x1, y1, canonical."""
    targets: tuple[StoredTargets, ...] = field(default=())
    appearance: Appearance | None = None
    """None leaves images as the warp gives them, as in every evaluation."""

    @property
    def is_table(self) -> bool:
        """Whether the inputs are rows of a table."""
        return self.inputs.ndim == 2


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """In place of a teacher's targets: where the object of one class of each record is."""

    explained_class: Tensor
    """i64 [B, 1]; NO_CLASS where a record has no label."""
    regions: Tensor
    """bool [B, H, W] in the record's view; nowhere where it is not known."""


class Source(Protocol):
    """A picklable set of records."""

    name: str
    revision: int
    """Raised whenever the same options and records give other bytes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) that all images have; None where they differ or are unknown."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of a table's columns; None where records are images."""

    def records(self) -> list[Record]:
        """Every record, in any order; planning sorts them by key."""

    def read(self, record: Record) -> Content:
        """The record's bytes."""

    def where(self, record: Record) -> str:
        """Its file, for messages."""
