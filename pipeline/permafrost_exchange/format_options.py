"""Formats of targets that another tool has made (`format=`), which `ingest` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from permafrost.config.models import CENTER_CROP_FRACTION
from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.core.errors import require

TargetFrame = Literal["full", "center_crop", "unknown"]
JoinKind = Literal["path", "stem", "key", "position", "image"]


@dataclass(frozen=True, kw_only=True)
class TargetFormatConfig(Options):
    """Base class of the options of all formats."""

    section: ClassVar[str] = "format"
    joins: ClassVar[tuple[JoinKind, ...]] = ("path", "stem", "key", "position", "image")
    """Ways in which its names can mean records, the usual one first."""

    kind: str = ""
    frame: TargetFrame | None = None
    """Part of each image that the teacher received. full: the whole image. center_crop: the square of
    format.crop_fraction in its middle. unknown: not recorded; students are trained on such targets only with
    store.unknown_views=true. null: that of the format, and it must be stated for a format without one."""
    crop_fraction: Annotated[float, Gt(0), Le(1)] = CENTER_CROP_FRACTION
    """Side of the square of format.frame=center_crop, relative to the image's shorter side."""
    join: JoinKind | None = None
    """Meaning of a target's name. path: the last folders of a path that both have, without suffix. stem: the name of a
    file. key: the record's key. position: the number of the record in its split, sorted by folder and file. image:
    SHA-256 of the image's file. null: the usual one of the format."""
    split: str = "train"
    """Split whose records are counted for format.join=position."""
    dtype: Literal["float32", "float16", "int8"] = "float16"
    """Storage dtype of maps and features, relative to their largest value. Logits and embeddings keep the precision of
    the files: float16, or float32 for all others."""

    def _check_together(self) -> None:
        require(
            self.join is None or self.join in self.joins,
            f"format.join={self.join} is not possible with format={self.kind}, whose targets are named by "
            f"{' or '.join(self.joins)}",
        )


@dataclass(frozen=True, kw_only=True)
class _ClassTargetsConfig(TargetFormatConfig):
    """Options of formats that store the probabilities of some classes."""

    classes: Annotated[int, Ge(2)] = 1000
    """Number of the teacher's classes."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Temperature of the softmax whose probabilities are stored. Students are trained at this temperature."""


@dataclass(frozen=True, kw_only=True)
class _ViewTargetsConfig(TargetFormatConfig):
    """Options of formats with targets of several views of each image."""

    views: Annotated[int | None, Ge(1)] = None
    """Number of views of each record to take, the first ones; null takes as many as the first record has."""


# ---- one dataclass per format --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ArraysConfig(TargetFormatConfig):
    """NumPy arrays with one row per record: an .npz file, or an .npy file with a list of keys."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.arrays:ArrayReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("key", "path", "stem", "image", "position")

    kind: Literal["npz"] = "npz"
    names: Annotated[str | None, Role.FILE] = None
    """Text file with the name of each row, one per line; null takes the array `keys` of the .npz file."""
    fields: dict[str, str] = field(default_factory=dict)
    """Mapping from what is stored (logits, probabilities, pooled, map, target_class, class_maps, attention_<stage>,
    features_<stage>, features_pooled) to the names of arrays; empty takes all arrays of these names, and pooled for an
    .npy file."""
    explainer: str | None = None
    """Explainer of the array `map`, with its options as in "gradcam sign=signed", that of a plug-in, or other for maps
    that only the teacher can make."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig(TargetFormatConfig):
    """Embeddings of clip-retrieval: img_emb/img_emb_<n>.npy next to metadata/metadata_<n>.parquet."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.embeddings:EmbeddingReader"

    kind: Literal["embeddings"] = "embeddings"
    column: str = "image_path"
    """Column of the metadata with the name of each row."""


@dataclass(frozen=True, kw_only=True)
class ListColumnsConfig(TargetFormatConfig):
    """Parquet files with a column of lists, as data sets of Hugging Face have them."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.list_columns:ListColumnReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("key", "path", "stem", "image", "position")

    kind: Literal["parquet"] = "parquet"
    column: str = "key"
    """Column with the name of each row."""
    fields: dict[str, str] = field(default_factory=dict)
    """Mapping from what is stored (logits, probabilities, pooled, map, target_class) to columns of lists, which are
    nested for maps; empty takes all columns of these names."""
    explainer: str | None = None
    """Explainer of the column `map`, as for format=npz."""
    cache: Annotated[str, Role.FILE, Role.CACHE] = "data"
    """Folder into which the columns are copied once, from which they are read."""


@dataclass(frozen=True, kw_only=True)
class E2KDFilesConfig(TargetFormatConfig):
    """Frozen explanations of e2KD's own code: <number>.pt with the output and its GradCAM or B-cos map."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.e2kd_files:E2KDReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("position",)

    kind: Literal["e2kd"] = "e2kd"
    index_map: Annotated[str | None, Role.FILE] = None
    """Text file with one position per line, that of the record of each number; null if they are the same. Records that
    were held out shift the numbers of those after them."""
    member: Annotated[int | None, Ge(0)] = None
    """Teacher to take of a file that has those of an ensemble, from 0; null for files of one teacher."""


@dataclass(frozen=True, kw_only=True)
class FKDConfig(_ViewTargetsConfig, _ClassTargetsConfig):
    """Soft labels of FKD and FerKD: crops, flips and the largest probabilities, a torch file per image."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.fkd:FKDReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("path", "stem")

    kind: Literal["fkd"] = "fkd"
    renormalized: bool = False
    """The largest probabilities share the whole mass (marginal_renorm), and the other classes have none."""


@dataclass(frozen=True, kw_only=True)
class ImageNetPlusConfig(_ViewTargetsConfig, _ClassTargetsConfig):
    """Reinforced data sets of apple/ml-dr (ImageNet+ and its kin): <number>.pth.tar next to config.pth.tar."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.reinforced:ReinforcedReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("position",)

    kind: Literal["imagenet_plus"] = "imagenet_plus"
    rest: Literal["smooth", "zeros"] = "smooth"
    """Probability of the classes that are not stored (densify in that code). smooth: the rest, evenly. zeros: none, and
    the stored probabilities pass through another softmax, which flattens them."""


@dataclass(frozen=True, kw_only=True)
class DataCompDRConfig(_ViewTargetsConfig):
    """Embeddings of views of DataCompDR: WebDataset tars with .paug.json, .npz or .pth.gz, and .json with a SHA-256."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.datacompdr:DataCompDRReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("image", "key", "stem")

    kind: Literal["datacompdr"] = "datacompdr"
    size: Annotated[int, Ge(8)] = 224
    """Side of the teacher's views in pixels, in which translations are measured."""


@dataclass(frozen=True, kw_only=True)
class TheiaConfig(TargetFormatConfig):
    """Dense features of Theia: tars of safetensors with `embedding` and `cls_token`, a folder per teacher."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.theia:TheiaReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("stem", "key", "path")

    kind: Literal["theia"] = "theia"


@dataclass(frozen=True, kw_only=True)
class TinyViTConfig(_ClassTargetsConfig):
    """Logits of TinyViT's saved epochs: rank<r>-keys.txt and rank<r>-values.bin. Their views cannot be replayed."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.tinyvit:TinyViTReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("stem", "key", "path", "position")

    kind: Literal["tinyvit"] = "tinyvit"


@dataclass(frozen=True, kw_only=True)
class ReLabelConfig(_ClassTargetsConfig):
    """Label maps of ReLabel: a torch file per image with the largest scores of each of 15x15 cells."""

    implementation: ClassVar[str] = "permafrost_exchange.formats.relabel:ReLabelReader"
    joins: ClassVar[tuple[JoinKind, ...]] = ("path", "stem")

    kind: Literal["relabel"] = "relabel"
    transposed: bool = True
    """The first axis of a map runs along the width of the image, as ReLabel's own students read it. `teacher=` compares
    both."""


TARGET_FORMATS: Family[type[TargetFormatConfig]] = Family(
    {
        cls.kind: cls
        for cls in (
            ArraysConfig,
            EmbeddingsConfig,
            ListColumnsConfig,
            E2KDFilesConfig,
            FKDConfig,
            ImageNetPlusConfig,
            DataCompDRConfig,
            TheiaConfig,
            TinyViTConfig,
            ReLabelConfig,
        )
    }
)
