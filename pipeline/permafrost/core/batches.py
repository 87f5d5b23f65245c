"""Batches: what a loader hands to a network and a loss, with the targets of the teacher passes.

Shape letters: B batch, K classes, V stored views, E target classes, A map channels, h w map grid, H W canonical
frame, d columns of a table, n boxes of one record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from permafrost.core.errors import ConfigError
from permafrost.core.records import FieldSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The k largest logits of each record, and the sum of all others at some temperatures."""

    values: Tensor
    """The largest logits in descending order, f32 [B, k]."""
    classes: Tensor
    """Their classes, i64 [B, k]."""
    rest: Tensor
    """log sum exp(logit / tau) over the other K - k classes at each temperature, f32 [B, T]; undefined if k = K."""
    temperatures: tuple[float, ...]
    """The T temperatures."""
    num_classes: int
    """Number K of classes."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class StoredTargets:
    """Targets of one teacher pass as read from disk for the records of a batch, before any warp."""

    teacher: str
    logits: Logits | None
    """Raw logits, None if the pass has none."""
    target_class: Tensor | None = None
    """Target classes, i64 [B, E], padded with NO_CLASS."""
    maps: Tensor | None = None
    """Explanation maps as stored, f16, f32 or int8 in steps of 1/127, [B, E, A, h, w] on the teacher's grid, with
    max-abs 1 (or all zero). `geometry.decode_maps` decodes them on their device."""
    map_scale: Tensor | None = None
    """Largest absolute value of each map in the explainer's units, f32 [B, E]; None if it was not read."""
    intermediates: dict[str, Tensor] = field(default_factory=dict)
    """Requested fields of other outputs as stored, which `geometry.decode_intermediates` decodes. Spatial fields on
    the teacher's grids: attention_<stage> [B, h, w], class_maps [B, K, r, r], features_<stage> [B, C, h, w]. Fields
    without spatial axes: pooled [B, d]. Mirrored ones have an axis of two after the first."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Scales of the intermediates that are stored relative to their max-abs, f32, with the first dimensions of the
    values."""
    specs: dict[str, FieldSpec] = field(default_factory=dict)
    """Description of each of the intermediates, including how it is warped with a view."""
    map_from_canonical: Tensor | None = None
    """Matrices f32 [B, 3, 3] that place all these grids in the canonical frame. None where the grids are those of
    the batch's own view, because the teacher was run on that view (replay)."""

    def require_maps(self) -> tuple[Tensor, Tensor]:
        """Return the target classes and the maps, which a pass may lack.

        Raises:
            ConfigError: If it stores none.
        """
        if self.maps is None or self.target_class is None:
            raise ConfigError(
                f"{self.teacher} stores no maps; make a pass with maps among annotate.outputs"
            )
        return self.target_class, self.maps


Border: TypeAlias = Literal["black", "edge"]
"""Content of a window beyond its image: black, or its edge continued."""


@dataclass(frozen=True)
class Rendering:
    """Rules by which views show images."""

    border: Border = "black"
    """Content of views beyond the image."""
    interpolation: Literal["bilinear", "nearest"] = "bilinear"
    """Interpolation between the pixels of windows whose content is moved."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation between the pixels of frames that are sampled."""

    @classmethod
    def of(cls, views: Mapping[str, Any]) -> Rendering:
        """Return the rules of a pass from the entry `views` of its manifest."""
        return cls(
            "edge" if views.get("border") == "edge" else "black",
            "nearest" if views.get("interpolation") == "nearest" else "bilinear",
        )


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Operations that move what the windows of some views show. What lies outside of a window is black."""

    rows: Tensor
    """Views that they move, i64 [n], those with more operations first."""
    window_from_view: Tensor
    """Matrix of each of them, f32 [n, 3, 3]: where a point of the view was in the window."""
    between: tuple[Tensor, ...] = ()
    """Matrices f32 [m, 3, 3] of the first m of them: where a point was before the last operation, before the last two,
    and so on, of those that have more operations. It has to be inside, from -1 to 1, or the point is black: what one
    operation moves out of the view, no later one brings back."""


@dataclass(frozen=True, kw_only=True)
class GridPlacement:
    """Place of a teacher's grids in the views of a batch."""

    source_from_view: Tensor
    """Matrices from the views to the grids, f32 [B, 3, 3]."""
    moves: Moves | None = None
    """Moves of the views' windows, outside of which nothing is covered."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of one teacher in the form that the loss requires: in the student's view and on its grid."""

    teacher: str
    logits: AnyLogits | None
    """Logits f32 [B, K], the largest ones, those of both records of mixtures, or None for a pass without logits."""
    intermediates: dict[str, Tensor] = field(default_factory=dict)
    """Other fields that the loss reads, f32. Spatial fields on the teacher's own grids, after the warp:
    attention_<stage> [B, h, w], class_maps [B, K, h, w], features_<stage> [B, C, h, w]. Fields without spatial axes:
    pooled [B, d]."""
    coverage: dict[str, Tensor] = field(default_factory=dict)
    """Fraction of each cell that is inside of what the teacher received, f32 [B, 1, h, w], of each of the intermediates
    that were moved and whose cells outside are left out of the loss."""
    placements: dict[str, GridPlacement] = field(default_factory=dict)
    """Places of these fields in the view, from which `geometry.coverage_on` computes the coverage on any other grid."""
    mixture: Mixture | None = None
    """Mixture of the images to which these stored targets belong, of which `mix_targets` makes those of the mixtures.
    None for targets of the very images that the student is shown."""
    specs: dict[str, FieldSpec] = field(default_factory=dict)
    """Description of the intermediates that come from a pass."""


NO_TARGETS = Targets(teacher="", logits=None)
"""Targets of a loss that reads labels only."""


@dataclass(frozen=True, kw_only=True)
class ExplainedTargets(Targets):
    """Targets of certain classes, which the student explains."""

    target_class: Tensor
    """Target classes, i64 [B, E]."""


@dataclass(frozen=True, kw_only=True)
class MapTargets(ExplainedTargets):
    """Targets with explanation maps."""

    maps: Tensor
    """Explanation maps, f32 [B, E, A, h, w], after the warp."""
    map_valid: Tensor
    """Validity of the maps, bool [B, E]: False where the warped map is zero or no class is explained."""

    @classmethod
    def of(cls, targets: Targets, target_class: Tensor, maps: Tensor) -> MapTargets:
        """Add the maps of these classes to targets."""
        valid = maps.flatten(2).any(dim=2) & (target_class >= 0)
        return cls(**vars(targets), target_class=target_class, maps=maps, map_valid=valid)

    def first_classes(self, count: int) -> MapTargets:
        """Return the targets with the maps of the first `count` target classes of each record only."""
        return replace(
            self,
            target_class=self.target_class[:, :count],
            maps=self.maps[:, :count],
            map_valid=self.map_valid[:, :count],
        )


@dataclass(frozen=True, kw_only=True)
class MixedMapTargets(MapTargets):
    """Targets with the maps of both records of each mixture."""

    class_weights: Tensor
    """Weight of each target class in the sum over those of its record, f32 [B, E], 0 for padding."""
    cell_weights: Tensor
    """Weight of each cell of the maps of both networks, f32 [B, E, 1, h, w]."""


PixelChangeName: TypeAlias = Literal[
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grayscale",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "gaussian_blur",
    "random_erasing",
]
"""Operation on pixels."""


@dataclass(frozen=True, kw_only=True)
class PixelChange:
    """One operation on the pixels of some records of a batch. Lengths are relative to the side of the image."""

    name: PixelChangeName
    rows: Tensor
    """Records that it changes, i64 [n]."""
    values: Tensor
    """Parameters per record, f32 [n, d]: a factor, an angle, a threshold, a number of bits, a standard deviation, or
    the corners x0, y0, x1, y1 in [0, 1] and the value of an erased rectangle."""
    largest: float = 0.0
    """Largest standard deviation that blur may draw, which decides the size of its kernel."""
    blanks_maps: bool = False
    """True if the maps of targets are 0 in an erased rectangle."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Mixture of each image of a batch with a second one: w * image + (1 - w) * second.

    The weight w of a pixel is lambda (MixUp), or the fraction of the pixel that is outside of a box (CutMix). In any
    grid, the mean of w over the cells is lambda.
    """

    partners: Tensor
    """Row of the second image in the batch, or in `Batch.second`, i64 [B]."""
    shares: Tensor
    """Weight lambda of a record's own image and targets, f32 [B] in [0, 1]."""
    boxes: Tensor
    """Box x0, y0, x1, y1 of the second image in [0, 1], f32 [B, 4], without area for MixUp."""


@dataclass(frozen=True, kw_only=True)
class PixelAugment:
    """Pixel augmentation of a batch after the warp, for all networks that read the batch."""

    changes: tuple[PixelChange, ...] = ()
    """Drawn or replayed operations of `augment.operations` that change pixels, in order of application."""
    mixture: Mixture | None = None
    """Second image of each record, and its place, after these operations; None mixes none."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records of one step.

    Inputs are whole canonical frames, which are warped on the training device, windows of the original images, or rows
    of a table, which have no views.
    """

    keys: tuple[str, ...]
    record_index: Tensor
    """Row of each record in the run's selection, i64 [B]."""
    inputs: Tensor
    """Canonical frames, u8 [B, 3, H, W] with channels last in memory, the windows of the views in place of them
    (`has_windows`), or rows of a table, f32 [B, d]."""
    canonical_from_view: Tensor | None
    """Matrices of the views, f32 [B, 3, 3]: the product of window and moves. None for tables, and where the view is the
    whole frame at its own size."""
    view_index: Tensor
    """Index of the replayed stored view, i64 [B]; -1 for a fresh view."""
    original_size: Tensor
    """Height and width of the original images, f32 [B, 2], because the frame does not preserve their aspect ratio.
    NO_SIZE for tables."""
    labels: Tensor
    """Ground-truth labels: i64 [B], NO_LABEL where unknown. In a multi-label store f32 [B, K], with 1 for each class
    of a record, and a row of NaN where unknown (label_forms.py)."""
    groups: Tensor
    """Groups, i64 [B]; NO_GROUP where unknown."""
    masks: Tensor | None = None
    """Masks in the canonical frame, u8 [B, 1, H, W]."""
    boxes: tuple[Tensor, ...] = ()
    """Boxes per record, f32 [n, 5]: label, x0, y0, x1, y1 in canonical coordinates. They stay in the host's memory."""
    host_labels: Tensor | None = None
    """The labels in the host's memory, if `labels` are on a device."""
    targets: tuple[StoredTargets, ...] = field(default=())
    moves: Moves | None = None
    """Operations that move what the windows of views show; None if nothing moves, or without windows."""
    has_windows: bool = False
    """True if the inputs are the windows of the views, cut from the original images."""
    rendering: Rendering = field(default_factory=Rendering)
    """Rules by which the view shows its image."""
    pixel_augment: PixelAugment | None = None
    """Pixel augmentation after the warp. None applies none, as in every evaluation."""
    second: Batch | None = None
    """Second records of stored mixtures in their views, without targets. None where they are records of this batch, and
    where nothing is mixed."""
    rendered: Tensor | None = None
    """Images of the view with its pixel augmentation, f32 [B, 3, h, w] at any size, so that networks of that size do
    not render it again. None where it was not rendered."""

    @property
    def labels_on_host(self) -> Tensor:
        """The labels, without waiting for the device if the batch was moved there by `move_batch`."""
        return self.labels if self.host_labels is None else self.host_labels

    @property
    def has_places(self) -> bool:
        """True if the inputs have positions in a plane, which rows of numbers have not."""
        return self.inputs.ndim == 4


Logits: TypeAlias = "Tensor | TopLogits"
"""Logits of a teacher: f32 [B, K], or the largest ones."""


@dataclass(frozen=True, kw_only=True)
class MixedLogits:
    """Stored logits of both records of each mixture."""

    first: Logits
    """Logits of the record itself."""
    second: Logits
    """Logits of its partner."""
    shares: Tensor
    """Weight of the first ones, f32 [B]; the second ones have the rest."""


AnyLogits: TypeAlias = "Logits | MixedLogits"
"""Logits of images or of mixtures of two."""


@dataclass(frozen=True, kw_only=True)
class MixedLabels:
    """Labels of both records of each mixture."""

    first: Tensor
    """Labels of the record itself, in the form of `Batch.labels`."""
    second: Tensor
    """Labels of its partner."""
    shares: Tensor
    """Weight of the first ones, f32 [B]; the second ones have the rest."""


AnyLabels: TypeAlias = "Tensor | MixedLabels"
"""Labels of images, in the form of `Batch.labels`, or of mixtures of two."""


@overload
def require_logits(logits: Logits | None) -> Logits: ...


@overload
def require_logits(logits: AnyLogits | None) -> AnyLogits: ...


def require_logits(logits: AnyLogits | None) -> AnyLogits:
    """Return logits that a pass may lack.

    Raises:
        ConfigError: If the pass stores none.
    """
    if logits is None:
        raise ConfigError(
            "the pass stores no logits; make one with logits among annotate.outputs, or choose a method without them"
        )
    return logits


def top_class(logits: Logits) -> Tensor:
    """Return the class of each record's largest logit, i64 [B]."""
    return logits.classes[:, 0] if isinstance(logits, TopLogits) else logits.argmax(dim=1)


def require_all_logits(logits: AnyLogits | None, what: str) -> Tensor:
    """Return logits f32 [B, K].

    Args:
        logits: Logits of a pass.
        what: What needs all of them, for the message.

    Raises:
        ConfigError: If only the largest ones are stored, or none, or each record has those of two.
    """
    logits = require_logits(logits)
    if isinstance(logits, MixedLogits):
        raise ConfigError(
            f"{what} needs the logits of one image, and augment.mix shows two; set augment.mix=[]"
        )
    if isinstance(logits, TopLogits):
        raise ConfigError(
            f"{what} needs the logits of all {logits.num_classes} classes, but the pass stores the "
            f"{logits.values.shape[1]} largest ones; make one with annotate.logits=all"
        )
    return logits


def require_maps(targets: Targets) -> MapTargets:
    """Return targets with maps, which a pass may lack.

    Raises:
        ConfigError: If it stores none.
    """
    if not isinstance(targets, MapTargets):
        raise ConfigError(
            f"{targets.teacher} stores no maps; make a pass with maps among annotate.outputs, or choose a method "
            "without them"
        )
    return targets
