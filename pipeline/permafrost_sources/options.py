"""WebDataset tars, data sets of Hugging Face and of torchvision, the demo and digits: options, and how they enter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from permafrost.config.data import (
    SOURCES,
    DataConfig,
    DrawnTestDataConfig,
    FileDataConfig,
    ImageFileDataConfig,
    require_one_form,
)
from permafrost.config.options import Role
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class WebDatasetDataConfig(ImageFileDataConfig):
    """WebDataset tar files: a folder, a glob, or http(s) addresses with a {000000..000009} range."""

    implementation: ClassVar[str] = "permafrost_sources.webdataset:WebDatasetSource"
    path_is: ClassVar[str] = "a folder, a glob or an address of tars"

    kind: Literal["webdataset"] = "webdataset"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder, glob or address of the tars."""
    split: str | None = None
    """Split of all tars; null takes the part of a tar's name before the number, as in train-000000.tar, or its last
    word if that is a split, as in imagenet1k-train-0000.tar."""
    label_key: str = "label"
    """Key of the label in a sample's .json. If there is a .cls, too, both must have the same label."""
    key_prefix: Literal["none", "split", "shard"] = "split"
    """Prefix that makes a sample's key unique over all tars."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name per line; null takes classes.txt next to the tars, or else the numbers."""
    reference: Annotated[Literal["auto", "always", "never"], Role.OUTSIDE_DATASET] = "auto"
    """Index the tars in place instead of packing copies of their images. auto does so if the tars are local,
    each mixes the classes, and store.format is original."""
    cache: Annotated[str, Role.FILE, Role.CACHE, Role.OUTSIDE_DATASET] = "data"
    """Folder into which http(s) tars are downloaded."""

    def _check_together(self) -> None:
        super()._check_together()
        require(
            not self.path.startswith("pipe:"),
            f"data.path={self.path} would run a command; name files or http(s) addresses",
        )


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig(DataConfig):
    """Embedded demo set (permafrost_sources/demo.py)."""

    implementation: ClassVar[str] = "permafrost_sources.demo:DemoSource"

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

    def _check_together(self) -> None:
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
    """Handwritten 8x8 digits of scikit-learn (permafrost_sources/demo.py)."""

    implementation: ClassVar[str] = "permafrost_sources.demo:DigitsSource"

    kind: Literal["digits"] = "digits"
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.4
    """Fraction of the 1,797 digits that form split test: those whose key has a hash below it."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataConfig(ImageFileDataConfig, DrawnTestDataConfig):
    """Data set of Hugging Face, a folder or a name on the hub, read by the package `datasets`."""

    implementation: ClassVar[str] = "permafrost_sources.huggingface_sets:HuggingFaceSource"

    kind: Literal["huggingface"] = "huggingface"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder of data files, or one that `save_to_disk` has written."""
    name: str = ""
    """Name of a data set on the hub, in place of data.path."""
    configuration: str | None = None
    """Name of the configuration of the data set; null takes the default."""
    revision: str | None = None
    """Commit, branch or tag of the data set on the hub; null takes the newest. A commit always means the same data."""
    splits: dict[str, str] = field(default_factory=dict)
    """Mapping from the data set's splits to those of the store; others are left out. Empty takes all."""
    image: str = "image"
    """Column of the image."""
    label: str | None = "label"
    """Column of the class; null: no labels. Not read with data.labels."""
    labels: str | tuple[str, ...] | None = None
    """Column of lists of classes, or a list of columns, one for each class, with 1, 0 or nothing where that is
    unknown."""
    boxes: str | None = None
    """Column of boxes: `bbox`, lists of four numbers in pixels, and optionally `category`."""
    box_form: Literal["xywh", "xyxy"] = "xywh"
    """Numbers of a box: its upper left corner, width and height, or two corners, of which the second is exclusive."""
    key: str | None = None
    """Column whose values are the records' keys; null numbers the rows of each split."""
    cache: Annotated[str | None, Role.FILE, Role.CACHE, Role.OUTSIDE_DATASET] = None
    """Folder of the files of `datasets`; null is that of `datasets` itself."""
    root: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """Folder in which the files are that cells name by their paths; null is data.path. Files elsewhere are not read,
    except those in the caches of `datasets` and the hub."""

    def _check_together(self) -> None:
        super()._check_together()
        require(
            (self.path == "") != (self.name == ""),
            "data=huggingface needs data.path=, a folder, or data.name=, a data set on the hub, and not both",
        )
        if self.labels is not None:
            require_one_form(self.label, self.labels)
            object.__setattr__(self, "label", None)


@dataclass(frozen=True, kw_only=True)
class TorchvisionDataConfig(FileDataConfig):
    """Data set of torchvision, downloaded if torchvision offers a download."""

    implementation: ClassVar[str] = "permafrost_sources.torchvision_sets:TorchvisionSource"
    minimal: ClassVar[tuple[str, ...]] = ()

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
    """Fraction of the records that becomes split test in a set without one, such as SUN397: those whose key has a hash
    below it."""


SOURCES["demo"] = DemoDataConfig
SOURCES["digits"] = DigitsDataConfig
SOURCES["huggingface"] = HuggingFaceDataConfig
SOURCES["torchvision"] = TorchvisionDataConfig
SOURCES["webdataset"] = WebDatasetDataConfig
