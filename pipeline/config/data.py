"""Where inputs come from (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipeline.config.cells_data import CellsDataConfig
from pipeline.config.file_data import FileDataConfig
from pipeline.config.table_data import SklearnTableDataConfig, TableDataConfig
from pipeline.core.errors import require, require_fraction

# ---- one dataclass per source --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig:
    """The embedded demo set (pipeline/sources/demo.py)."""

    kind: Literal["demo"] = "demo"
    seed: int = 0
    image_size: int = 32
    """Pixels a side."""
    test_digits: int = 350
    train_digits: int = 700
    """Of the digits that no test has."""
    teacher_digits: int | None = None
    """Likewise; null takes them all."""
    teacher_placements: int = 3
    """Pastes of each digit."""
    train_placements: int = 1
    test_placements: int = 2
    min_digit_size: int = 12
    max_digit_size: int = 20

    def __post_init__(self) -> None:
        for name in (
            "teacher_placements",
            "train_placements",
            "test_placements",
            "test_digits",
            "train_digits",
        ):
            require(
                getattr(self, name) >= 1, f"data.{name} must be >= 1, got {getattr(self, name)}"
            )
        require(
            self.test_digits + max(self.train_digits, self.teacher_digits or 1) <= 1797,
            "data.test_digits leaves too few of the 1797 digits for data.train_digits or "
            f"data.teacher_digits: {self.test_digits}, {self.train_digits}, {self.teacher_digits}",
        )
        require(self.seed >= 0, f"data.seed must be >= 0, got {self.seed}")
        require(
            self.teacher_digits is None or self.teacher_digits >= 1,
            f"data.teacher_digits must be >= 1 or null, got {self.teacher_digits}",
        )
        require(
            8 <= self.min_digit_size <= self.max_digit_size <= self.image_size <= 80,
            "data needs 8 <= min_digit_size <= max_digit_size <= image_size <= 80, got "
            f"{self.min_digit_size}, {self.max_digit_size}, {self.image_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DigitsDataConfig:
    """scikit-learn's handwritten digits, 8x8 (pipeline/sources/digits.py)."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = 0.4
    """Of the 1,797, those that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        require_fraction("data.test_fraction", self.test_fraction)


@dataclass(frozen=True, kw_only=True)
class ImageFolderDataConfig(FileDataConfig):
    """<path>/<class>/.../image, or <path>/<split>/<class>/.../image."""

    kind: Literal["image_folder"] = "image_folder"
    path: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    """Folder -> split, leaving other folders out; empty takes train, val, valid, validation and test as
    splits where all top-level folders have such names (where only some have, that is an error), and
    everything as the split train otherwise."""
    classes: str | None = None
    """File with one class folder a line, in label order; null sorts the folders' names."""
    test_fraction: float = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder of the images")
        require_fraction("data.test_fraction", self.test_fraction)


@dataclass(frozen=True, kw_only=True)
class ImageTableDataConfig(FileDataConfig):
    """A CSV or Parquet file with one row an image; options name its columns."""

    kind: Literal["image_table"] = "image_table"
    path: str = ""
    root: str | None = None
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
    classes: str | None = None
    """File with one class name a line, in label order; null takes the sorted names of the label column,
    or the numbers up to its largest."""
    test_fraction: float = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the CSV or Parquet file")
        require_fraction("data.test_fraction", self.test_fraction)
        require(
            self.label is None or self.labels is None,
            f"data.label={self.label} and data.labels={self.labels} exclude each other; set one to null",
        )


@dataclass(frozen=True, kw_only=True)
class WebDatasetDataConfig(FileDataConfig):
    """WebDataset tars: a folder, a glob, or http(s) addresses with a {000000..000009} range."""

    kind: Literal["webdataset"] = "webdataset"
    path: str = ""
    split: str | None = None
    """Of every tar; null takes what stands before the number in a tar's name: train-000000.tar."""
    label_key: str = "label"
    """Of a sample's .json, where it has no .cls."""
    key_prefix: Literal["none", "split", "shard"] = "split"
    """What makes a sample's key unique over all tars."""
    classes: str | None = None
    """File with one class name a line; null takes classes.txt beside the tars, or else the numbers."""
    reference: Literal["auto", "always", "never"] = "auto"
    """Index the tars where they are instead of packing their images anew; auto does where they are
    local and each mixes the classes, and store.format is original."""
    cache: str = "data"
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

    kind: Literal["torchvision"] = "torchvision"
    name: Literal[
        "cifar10", "cifar100", "mnist", "fashion_mnist", "voc2007", "voc2012", "sun397", "imagenet"
    ] = "cifar10"
    root: str = "data"
    """torchvision's own folder of data sets."""
    download: bool = True
    test_fraction: float = 0.0
    """Of a set without a test split, as SUN397: the part of its records that becomes one."""

    NOT_DATA: ClassVar[frozenset[str]] = FileDataConfig.NOT_DATA | {"test_fraction"}
    """The records say their splits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("data.test_fraction", self.test_fraction)


@dataclass(frozen=True, kw_only=True)
class TinyImageNetDataConfig(FileDataConfig):
    """Tiny ImageNet (200 classes, 64x64) with its boxes, as unpacked from tiny-imagenet-200.zip."""

    kind: Literal["tiny_imagenet"] = "tiny_imagenet"
    path: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the folder tiny-imagenet-200")


DataConfig = (
    CellsDataConfig
    | DemoDataConfig
    | DigitsDataConfig
    | ImageFolderDataConfig
    | ImageTableDataConfig
    | WebDatasetDataConfig
    | TorchvisionDataConfig
    | TinyImageNetDataConfig
    | TableDataConfig
    | SklearnTableDataConfig
)
