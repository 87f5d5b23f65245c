"""Where a store lies, what a teacher pass writes, which records a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le, Lt

from pipeline.config.options import Options, Role
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Options):
    """Where a store lies and how it is written; of a store that exists, only `path` matters to readers."""

    section: ClassVar[str] = "store"

    path: Annotated[str, Role.FILE, Role.OUTSIDE_IDENTITY] = "stores/demo"
    backend: Annotated[Literal["zarr", "webdataset"], Role.OUTSIDE_IDENTITY] = "zarr"
    """Storage format of the teacher fields."""
    shard_size: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 512
    """Records a shard: the unit of work, retry and checksum."""
    seed: Annotated[int, Ge(0), Lt(2**63), Role.OUTSIDE_IDENTITY] = 0
    """Of the global permutation that decides which record goes to which shard."""
    image_size: Annotated[int | None, Ge(8), Le(4096), Role.OUTSIDE_IDENTITY] = None
    """Side in pixels of the canonical frame; null takes the images' own size where all have one, else 256.
    (Frames that are re-encoded need it before the images are read: 256, unless the source knows.)"""
    format: Annotated[Literal["original", "jpeg95", "raw"], Role.OUTSIDE_IDENTITY] = "original"
    """Of the images: the files' own bytes, or the frame as a JPEG of quality 95 or as plain pixels."""
    teacher: tuple[str, ...] = ()
    """Which passes to read, where the store holds several: folder names, or the 8 digits at their ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.path != "", "store.path is empty; give the folder to write")
        require(
            "://" not in self.path,
            f"store.path must be a local or mounted folder, got {self.path!r}; object storage is not supported yet",
        )


class PayloadInfo(NamedTuple):
    """A payload that a teacher pass may store."""

    implementation: str
    """See Options.implementation."""
    fits_tables: bool
    """Whether a teacher of a table's rows gives it."""
    options: tuple[str, ...] = ()
    """Options of PassOptions that it reads."""


_PACKAGE = "pipeline.annotation.payloads"
PAYLOADS: dict[str, PayloadInfo] = {
    "logits": PayloadInfo(f"{_PACKAGE}.logits:LogitsPayload", True),
    "map": PayloadInfo(f"{_PACKAGE}.explanation_map:MapPayload", False, ("map_dtype",)),
    "attention": PayloadInfo(f"{_PACKAGE}.intermediates:AttentionPayload", False),
    "class_maps": PayloadInfo(
        f"{_PACKAGE}.intermediates:ClassMapPayload", False, ("class_map_size",)
    ),
    "pooled": PayloadInfo(f"{_PACKAGE}.pooled_feature:FeaturePayload", False),
    "superfeature_logits": PayloadInfo(
        f"{_PACKAGE}.superfeature_logits:SuperfeaturePayload", True, ("superfeature_dtype",)
    ),
}


@dataclass(frozen=True, kw_only=True)
class PassOptions(Options):
    """What a teacher pass computes and stores."""

    section: ClassVar[str] = "annotate"

    payloads: tuple[str, ...] = ("logits", "map")
    """attention: where each stage is active, for method=at; class_maps: the maps of all classes, for method=cat_kd;
    feature: the pooled feature before the classifier, for method=crd and method=sskd;
    superfeature_logits: the logits of each superfeature of an additive teacher, for method=ked."""
    map_dtype: Literal["float32", "float16", "int8"] = "float16"
    """Of maps divided by their max-abs. A map that is far above its own mean in a few places loses most in int8."""
    class_map_size: Annotated[int, Ge(1)] = 2
    """Cells a side to which cat is pooled. A student's views move these cells, which the size of the features
    (7 for a ResNet at 224 pixels) does more exactly than the 2 that CAT-KD compares."""
    superfeature_dtype: Literal["float16", "int8"] = "float16"
    """Of superfeature_logits, with one scale a superfeature; int8 halves it and pays from about 200 classes on."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the teacher's forward pass (autocast); explanations are computed in float32 from its features."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Records a teacher forward; constant, since it may change the last bits of the result."""
    min_fidelity: Annotated[float, Ge(0), Le(1)] = 0.999
    """Lowest cosine between a map and its stored form that may be written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.payloads if name not in PAYLOADS]
        require(
            not unknown,
            f"annotate.payloads must be of {', '.join(PAYLOADS)}; got {', '.join(unknown)}",
        )
        require("logits" in self.payloads, "annotate.payloads must contain logits")
        require(
            len(set(self.payloads)) == len(self.payloads),
            f"annotate.payloads names one twice: {self.payloads}",
        )


@dataclass(frozen=True, kw_only=True)
class SubsetOptions(Options):
    """Which records of the training split a run reads; the store itself always holds the whole set."""

    section: ClassVar[str] = "subset"

    shots: Annotated[int | None, Ge(1)] = None
    """Records of each class, at least that many where a record has many labels; null takes all."""
    seed: int = 0
    """Apart from `seed`, so that the shots stay fixed while initialization varies."""
    holdout: Annotated[int, Ge(0)] = 0
    """Records of each class kept out of training for validation; taken before the shots."""
