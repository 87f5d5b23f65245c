"""Where inputs come from (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.config.cells_data import CellsDataConfig
from pipeline.config.file_data import DataConfig, FileDataConfig
from pipeline.config.options import Role
from pipeline.config.table_data import SklearnedableDataConfig, TableDataConfig
from pipeline.core.errors import require

# ---- one dataclass per source --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig(DataConfig):
    """The embedded demo set (pipeline/sources/demo.py)."""

    implementation: ClassVar[str] = "pipeline.sources.demo:DemoSource"

    kind: Literal["demo"] = "demo"
    seed: Annotated[int, Ge(0)] = 0
    image_size: int = 32
    """Pixels a side."""
    test_digits: Annotated[int, Ge(1)] = 350
    train_digits: Annotated[int, Ge(1)] = 700
    """Of the digits that no test has."""
    teacher_digits: Annotated[int | None, Ge(1)] = None
    """Likewise; null takes them all."""
    teacher_placements: Annotated[int, Ge(1)] = 3
    """Pastes of each digit."""
    train_placements: Annotated[int, Ge(1)] = 1
    test_placements: Annotated[int, Ge(1)] = 2
    min_digit_size: int = 12
    max_digit_size: int = 20

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
    """scikit-learn's handwritten digits, 8x8 (pipeline/sources/digits.py)."""

    implementation: ClassVar[str] = "pipeline.sources.digits:DigitsSource"

    kind: Literal["digits"] = "digits"
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.4
    """Of the 1,797, those that go to split test, chosen by a hash of the key."""


@dataclass(frozen=True, kw_only=True)
class ImageFolderDataConfig(FileDataConfig):
    """<path>/<class>/.../image, or <path>/<split>/<class>/.../image."""

    implementation: ClassVar[str] = "pipeline.sources.image_folder:ImageFolderSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["image_folder"] = "image_folder"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    splits: dict[str, str] = field(default_factory=dict)
    """Folder -> split, leaving other folders out; empty takes train, val, valid, validation and test as
    splits where all top-level folders have such names (where only some have, that is an error), and
    everything as the split train otherwise."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class folder a line, in label order; null sorts the folders' names."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder of the images")


@dataclass(frozen=True, kw_only=True)
class ImageTableDataConfig(FileDataConfig):
    """A CSV or Parquet file with one row an image; options name its columns."""

    implementation: ClassVar[str] = "pipeline.sources.image_table:ImageTableSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["image_table"] = "image_table"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    root: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """Folder that image and mask paths are relative to; null takes the table's own."""
    image: str = "path"
    label: str | None = "label"
    """Column of the class: a name, or the label itself where all are numbers. null: none."""
    labels: str | None = None
    """Column of many classes: a list (Parquet) or class names separated by spaces (CSV)."""
    group: tuple[str, ...] = ()
    """Columns whose combination is the group, the first varying slowest: [y, place] for Waterbirds.
    Whole numbers stand for themselves, other values for their place in sorted order."""
    split: str | None = None
    """Column of the split; null puts everything into train."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Value of that column -> split; empty takes the values as they are."""
    boxes: str | None = None
    """Column of boxes in pixels: a list of {x0, y0, x1, y1} and optionally label (JSON text in a CSV);
    x1 and y1 are exclusive."""
    mask: str | None = None
    """Column of the mask's path; 0 is background."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name a line, in label order; null takes the sorted names of the label column,
    or the numbers up to its largest."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the CSV or Parquet file")
        require(
            self.label is None or self.labels is None,
            f"data.label={self.label} and data.labels={self.labels} exclude each other; set one to null",
        )


@dataclass(frozen=True, kw_only=True)
class WebDatasetDataConfig(FileDataConfig):
    """WebDataset tars: a folder, a glob, or http(s) addresses with a {000000..000009} range."""

    implementation: ClassVar[str] = "pipeline.sources.webdataset:WebDatasetSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["webdataset"] = "webdataset"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    split: str | None = None
    """Of every tar; null takes what stands before the number in a tar's name: train-000000.tar."""
    label_key: str = "label"
    """Of a sample's .json, where it has no .cls."""
    key_prefix: Literal["none", "split", "shard"] = "split"
    """What makes a sample's key unique over all tars."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name a line; null takes classes.txt beside the tars, or else the numbers."""
    reference: Annotated[Literal["auto", "always", "never"], Role.OUTSIDE_DATASET] = "auto"
    """Index the tars where they are instead of packing their images anew; auto does where they are
    local and each mixes the classes, and store.format is original."""
    cache: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = "data"
    """Folder to download http(s) tars into."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "a folder, a glob or an address of tars")
        require(
            not self.path.startswith("pipe:"),
            f"data.path={self.path} would run a command; give files or http(s) addresses",
        )


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataConfig(FileDataConfig):
    """A data set that torchvision knows; it downloads those that may be downloaded."""

    implementation: ClassVar[str] = "pipeline.sources.torchvision_sets:TorchvisionSource"

    kind: Literal["torchvision"] = "torchvision"
    name: Literal[
        "cifar10", "cifar100", "mnist", "fashion_mnist", "voc2007", "voc2012", "sun397", "imagenet"
    ] = "cifar10"
    root: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = "data"
    """torchvision's own folder of data sets."""
    download: Annotated[bool, Role.OUTSIDE_DATASET] = True
    test_fraction: Annotated[float, Ge(0), Lt(1), Role.OUTSIDE_DATASET] = 0.0
    """Of a set without a test split, as SUN397: the part of its records that becomes one."""


@dataclass(frozen=True, kw_only=True)
class TinyImageNetDataConfig(FileDataConfig):
    """Tiny ImageNet (200 classes, 64x64) with its boxes, as unpacked from tiny-imagenet-200.zip."""

    implementation: ClassVar[str] = "pipeline.sources.tiny_imagenet:TinyImageNetSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["tiny_imagenet"] = "tiny_imagenet"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder tiny-imagenet-200")


SOURCES: dict[str, type[DataConfig]] = {
    cls.kind: cls
    for cls in (
        CellsDataConfig,
        DemoDataConfig,
        DigitsDataConfig,
        ImageFolderDataConfig,
        ImageTableDataConfig,
        WebDatasetDataConfig,
        TorchvisionDataConfig,
        TinyImageNetDataConfig,
        TableDataConfig,
        SklearnedableDataConfig,
    )
}
