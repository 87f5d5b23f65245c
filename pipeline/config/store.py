"""Where a store lies, what a teacher pass writes, which records a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where a store lies and how it is written; of a store that exists, only `path` matters to readers."""

    path: str = "stores/demo"
    backend: Literal["zarr", "webdataset"] = "zarr"
    """Of teacher columns."""
    shard_size: int = 512
    """Records a shard: the unit of work, retry and checksum."""
    seed: int = 0
    """Of the global permutation that decides which record goes to which shard."""
    image_size: int | None = None
    """Side in pixels of the canonical frame; null takes the images' own size where all have one, else 256.
    (Frames that are re-encoded need it before the images are read: 256, unless the source knows.)"""
    format: Literal["original", "jpeg95", "raw"] = "original"
    """Of the images: the files' own bytes, or the frame as a JPEG of quality 95 or as plain pixels."""
    teacher: tuple[str, ...] = ()
    """Which passes to read, where the store holds several: folder names, or the 8 digits at their ends."""

    def __post_init__(self) -> None:
        require(self.path != "", "store.path is empty; give the folder to write")
        require(
            "://" not in self.path,
            f"store.path must be a local or mounted folder, got {self.path!r}; object storage is not supported yet",
        )
        require(0 <= self.seed < 2**63, f"store.seed must be >= 0, got {self.seed}")
        require(
            self.image_size is None or 8 <= self.image_size <= 4096,
            f"store.image_size must be in [8, 4096] or null, got {self.image_size}",
        )
        require(self.shard_size >= 1, f"store.shard_size must be >= 1, got {self.shard_size}")


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """What a teacher pass computes and stores."""

    payloads: tuple[Literal["logits", "map", "at", "cat", "feature", "ked_z"], ...] = (
        "logits",
        "map",
    )
    """at: where each stage is active, for method=at; cat: the maps of all classes, for method=cat_kd;
    feature: the pooled feature before the classifier, for method=crd and method=sskd;
    ked_z: the logits of each superfeature of an additive teacher, for method=ked."""
    map_dtype: Literal["float32", "float16", "int8"] = "float16"
    """Of maps divided by their max-abs. A map that is far above its own mean in a few places loses most in int8."""
    cat_size: int = 2
    """Cells a side to which cat is pooled. A student's views move these cells, which the size of the features
    (7 for a ResNet at 224 pixels) does more exactly than the 2 that CAT-KD compares."""
    ked_dtype: Literal["float16", "int8"] = "float16"
    """Of ked_z, with one scale a superfeature; int8 halves it and pays from about 200 classes on."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the teacher's forward pass (autocast); explanations are computed in float32 from its features."""
    batch_size: int = 64
    """Records a teacher forward; constant, since it may change the last bits of the result."""
    min_fidelity: float = 0.999
    """Lowest cosine between a map and its stored form that may be written."""

    def __post_init__(self) -> None:
        require("logits" in self.payloads, "annotate.payloads must contain logits")
        require(
            len(set(self.payloads)) == len(self.payloads),
            f"annotate.payloads names one twice: {self.payloads}",
        )
        require(self.cat_size >= 1, f"annotate.cat_size must be >= 1, got {self.cat_size}")
        require(self.batch_size >= 1, f"annotate.batch_size must be >= 1, got {self.batch_size}")
        require(
            0 <= self.min_fidelity <= 1,
            f"annotate.min_fidelity must be in [0, 1], got {self.min_fidelity}",
        )


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Which records of the training split a run reads; the store itself always holds the whole set."""

    shots: int | None = None
    """Records of each class, at least that many where a record has many labels; null takes all."""
    seed: int = 0
    """Apart from `seed`, so that the shots stay fixed while initialisation varies."""
    holdout: int = 0
    """Records of each class kept out of training for validation; taken before the shots."""

    def __post_init__(self) -> None:
        require(
            self.shots is None or self.shots >= 1,
            f"subset.shots must be >= 1 or null, got {self.shots}",
        )
        require(self.holdout >= 0, f"subset.holdout must be >= 0, got {self.holdout}")
