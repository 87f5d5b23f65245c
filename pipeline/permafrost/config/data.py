"""Sources of the input records (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from permafrost.config.file_data import DataConfig, FileDataConfig
from permafrost.config.options import Role
from permafrost.config.plugins import Family
from permafrost.config.table_data import SklearnTableDataConfig, TableDataConfig
from permafrost.core.errors import require

# ---- one dataclass per source --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig(DataConfig):
    """Embedded demo set (permafrost/sources/demo.py)."""

    implementation: ClassVar[str] = "permafrost.sources.demo:DemoSource"

    kind: Literal["demo"] = "demo"
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the splits and of the drawn images."""
    image_size: int = 32
    """Side of an image in pixels."""
    test_digits: Annotated[int, Ge(1)] = 350
    """Digits in the test splits."""
    train_digits: Annotated[int, Ge(1)] = 700
    """Digits in split train, taken from those that are in no test split."""
    teacher_digits: Annotated[int | None, Ge(1)] = None
    """Digits that the teacher is trained on, taken from those that are in no test split; null takes all of
    them."""
    teacher_placements: Annotated[int, Ge(1)] = 3
    """Number of times that each digit is pasted into an image for the teacher's training split."""
    train_placements: Annotated[int, Ge(1)] = 1
    """Number of images per digit in split train."""
    test_placements: Annotated[int, Ge(1)] = 2
    """Number of images per digit in each test split."""
    min_digit_size: int = 12
    """Smallest side of a pasted digit in pixels."""
    max_digit_size: int = 20
    """Largest side of a pasted digit in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.test_digits + max(self.train_digits, self.teacher_digits or 1) <= 1797,
            "data.test_digits leaves too few of the 1797 digits for data.train_digits or "
            f"data.teacher_digits: {self.test_digits}, {self.train_digits}, {self.teacher_digits}",
        )
        require(
            8 <= self.min_digit_size <= self.max_digit_size <= self.image_size <= 80,
            "data needs 8 <= min_digit_size <= max_digit_size <= image_size <= 80, got "
            f"{self.min_digit_size}, {self.max_digit_size}, {self.image_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DigitsDataConfig(DataConfig):
    """Handwritten 8x8 digits of scikit-learn (permafrost/sources/digits.py)."""

    implementation: ClassVar[str] = "permafrost.sources.digits:DigitsSource"

    kind: Literal["digits"] = "digits"
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.4
    """Fraction of the 1,797 digits that form split test, chosen by a hash of the key."""


@dataclass(frozen=True, kw_only=True)
class ImageFolderDataConfig(FileDataConfig):
    """Folder of images: <path>/<class>/.../image, or <path>/<split>/<class>/.../image."""

    implementation: ClassVar[str] = "permafrost.sources.image_folder:ImageFolderSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["image_folder"] = "image_folder"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder of the images."""
    splits: dict[str, str] = field(default_factory=dict)
    """Mapping from folder to split; other folders are left out. If empty, top-level folders named train, val,
    valid, validation or test are the splits, provided that all of them have such names (if only some do, that
    is an error). Otherwise all records belong to split train."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class folder per line, in label order; null sorts the folders by name."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of split train that is moved to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder of the images")


@dataclass(frozen=True, kw_only=True)
class ImageTableDataConfig(FileDataConfig):
    """CSV or Parquet file with one row per image; options name its columns."""

    implementation: ClassVar[str] = "permafrost.sources.image_table:ImageTableSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["image_table"] = "image_table"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """CSV or Parquet file."""
    root: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """Folder that image and mask paths are relative to; null takes the folder of the table."""
    image: str = "path"
    """Column of the image's path."""
    label: str | None = "label"
    """Column of the class: its name, or the label itself if all values are numbers. null: no labels."""
    labels: str | None = None
    """Column of several classes per record: a list (Parquet) or class names separated by spaces (CSV)."""
    group: tuple[str, ...] = ()
    """Columns whose combination is the group, the first varying slowest, such as [y, place] for Waterbirds.
    Whole numbers are used as they are; other values are numbered in sorted order."""
    split: str | None = None
    """Column of the split; null puts all records into split train."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Mapping from values of that column to splits; empty takes the values as they are."""
    boxes: str | None = None
    """Column of boxes in pixels: a list of {x0, y0, x1, y1} and optionally label (JSON text in a CSV). x1 and
    y1 are exclusive."""
    mask: str | None = None
    """Column of the mask's path; 0 is the background."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name per line, in label order; null takes the sorted names of the label column, or
    the numbers up to the largest label."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of split train that is moved to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the CSV or Parquet file")
        require(
            self.label is None or self.labels is None,
            f"data.label={self.label} and data.labels={self.labels} exclude each other; set one to null",
        )


@dataclass(frozen=True, kw_only=True)
class WebDatasetDataConfig(FileDataConfig):
    """WebDataset tar files: a folder, a glob, or http(s) addresses with a {000000..000009} range."""

    implementation: ClassVar[str] = "permafrost.sources.webdataset:WebDatasetSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["webdataset"] = "webdataset"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder, glob or address of the tars."""
    split: str | None = None
    """Split of all tars; null takes the part of a tar's name before the number, as in train-000000.tar."""
    label_key: str = "label"
    """Key of the label in a sample's .json, used if there is no .cls."""
    key_prefix: Literal["none", "split", "shard"] = "split"
    """Prefix that makes a sample's key unique over all tars."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name per line; null takes classes.txt next to the tars, or else the numbers."""
    reference: Annotated[Literal["auto", "always", "never"], Role.OUTSIDE_DATASET] = "auto"
    """Index the tars in place instead of packing copies of their images. auto does so if the tars are local,
    each mixes the classes, and store.format is original."""
    cache: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = "data"
    """Folder into which http(s) tars are downloaded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "a folder, a glob or an address of tars")
        require(
            not self.path.startswith("pipe:"),
            f"data.path={self.path} would run a command; name files or http(s) addresses",
        )


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataConfig(FileDataConfig):
    """Data set of torchvision, downloaded if torchvision offers a download."""

    implementation: ClassVar[str] = "permafrost.sources.torchvision_sets:TorchvisionSource"

    kind: Literal["torchvision"] = "torchvision"
    name: Literal[
        "cifar10", "cifar100", "mnist", "fashion_mnist", "voc2007", "voc2012", "sun397", "imagenet"
    ] = "cifar10"
    """Name of the data set."""
    root: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = "data"
    """Folder in which torchvision keeps its data sets."""
    download: Annotated[bool, Role.OUTSIDE_DATASET] = True
    """Download the data set if it is missing and torchvision can download it."""
    test_fraction: Annotated[float, Ge(0), Lt(1), Role.OUTSIDE_DATASET] = 0.0
    """Fraction of the records that becomes split test in a set without one, such as SUN397."""


@dataclass(frozen=True, kw_only=True)
class TinyImageNetDataConfig(FileDataConfig):
    """Tiny ImageNet (200 classes, 64x64) with its boxes, as unpacked from tiny-imagenet-200.zip."""

    implementation: ClassVar[str] = "permafrost.sources.tiny_imagenet:TinyImageNetSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["tiny_imagenet"] = "tiny_imagenet"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder tiny-imagenet-200."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder tiny-imagenet-200")


SOURCES: Family[type[DataConfig]] = Family(
    {
        cls.kind: cls
        for cls in (
            DemoDataConfig,
            DigitsDataConfig,
            ImageFolderDataConfig,
            ImageTableDataConfig,
            WebDatasetDataConfig,
            TorchvisionDataConfig,
            TinyImageNetDataConfig,
            TableDataConfig,
            SklearnTableDataConfig,
        )
    }
)
