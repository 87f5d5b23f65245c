"""Data sets of torchvision, with their download.

| name | splits | notes |
|---|---|---|
| cifar10, cifar100, mnist, fashion_mnist | train, test | arrays, so every image is encoded as PNG when it is read |
| voc2007 | train, val, test | several labels and boxes, including difficult objects; no masks |
| voc2012 | train, val | likewise; the labels of its test split are not public |
| sun397 | train | torchvision defines no other split; use data.test_fraction, or data=image_table |
| imagenet | train, val | unpacked from the archives that torchvision requires; classes are WordNet ids |

VOC counts pixels from 1 and includes a box's last pixel. A record's boxes count from 0 and exclude it:
x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from permafrost.core.errors import UserError, require
from permafrost.core.records import Box, Content, Record, escape_key
from permafrost.sources.image_files import FilesBelowRoot, iter_images
from permafrost.sources.splits import split_off_test
from permafrost.store.image_decoding import png_of
from permafrost_sources.options import TorchvisionDataConfig

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


class MissingDatasetError(UserError):
    """Data set that torchvision finds neither on disk nor on the network."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionSet:
    """Arguments with which torchvision opens a data set."""

    splits: dict[str, dict[str, Any]]
    """Arguments of torchvision's class for each split."""
    needs: str
    """Required contents of data.root, for messages."""
    frame_size: tuple[int, int] | None = None
    """(height, width) of data sets that are arrays."""
    is_downloadable: bool = True


def _voc(year: str, *splits: str) -> TorchvisionSet:
    arguments = {split: {"year": year, "image_set": split} for split in splits}
    return TorchvisionSet(splits=arguments, needs=f"VOCdevkit/VOC{year} with its splits")


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}

SETS = {
    "cifar10": TorchvisionSet(
        splits=_TRAIN_TEST,
        needs="cifar-10-batches-py or cifar-10-python.tar.gz",
        frame_size=(32, 32),
    ),
    "cifar100": TorchvisionSet(
        splits=_TRAIN_TEST, needs="cifar-100-python or cifar-100-python.tar.gz", frame_size=(32, 32)
    ),
    "mnist": TorchvisionSet(splits=_TRAIN_TEST, needs="MNIST/raw", frame_size=(28, 28)),
    "fashion_mnist": TorchvisionSet(
        splits=_TRAIN_TEST, needs="FashionMNIST/raw", frame_size=(28, 28)
    ),
    "voc2007": _voc("2007", "train", "val", "test"),
    "voc2012": _voc("2012", "train", "val"),
    "sun397": TorchvisionSet(splits={"train": {}}, needs="SUN397 or SUN397.tar.gz"),
    "imagenet": TorchvisionSet(
        splits={"train": {"split": "train"}, "val": {"split": "val"}},
        needs="ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        is_downloadable=False,
    ),
}


class TorchvisionSource(FilesBelowRoot):
    """Source of one of SETS. Arrays are never pickled, so pickles stay small."""

    def __init__(self, config: TorchvisionDataConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.frame_size = SETS[config.name].frame_size
        self._root: Path = Path(config.root).absolute()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names in torchvision's order; ImageNet's are the WordNet ids, because its words are not unique."""
        if self.name.startswith("voc"):
            return VOC_CLASSES
        dataset = self._open("train")
        return tuple(dataset.wnids if self.name == "imagenet" else dataset.classes)

    def records(self) -> Iterator[Record]:
        """Yield every record of every split; the set is first downloaded and unpacked if that is allowed."""
        records = (record for split in SETS[self.name].splits for record in self._list(split))
        return split_off_test(records, self.config.test_fraction)

    def read(self, record: Record) -> Content:
        """Return the file unchanged, or the array's row as PNG."""
        if self.frame_size is None:
            return super().read(record)
        split, row = record.content
        pixels = np.asarray(load_dataset(self.name, self._root, split).data[row])
        return Content(image=png_of(Image.fromarray(pixels)), suffix="png")

    def where(self, record: Record) -> str:
        """Return the image's file, or its row in an array."""
        if self.frame_size is None:
            return super().where(record)
        return "row {1} of split {0}".format(*record.content)

    def _list(self, split: str) -> Iterator[Record]:
        if self.frame_size is not None:
            labels = enumerate(self._open(split).targets)
            return (
                Record(
                    key=f"{split}-{row:06d}", split=split, label=int(label), content=(split, row)
                )
                for row, label in labels
            )
        if self.name == "imagenet":
            return self._imagenet_records(split)
        return self._sun397_records(split) if self.name == "sun397" else self._voc_records(split)

    def _voc_records(self, split: str) -> Iterator[Record]:
        dataset = self._open(split)
        for image, annotation in zip(dataset.images, dataset.annotations, strict=True):
            boxes = load_voc_boxes(Path(annotation))
            yield Record(
                key=escape_key(Path(image).stem),
                split=split,
                labels=tuple(sorted({box.label for box in boxes})),
                boxes=boxes,
                boxes_in_pixels=bool(boxes),
                content=self._file(image),
            )

    def _sun397_records(self, split: str) -> Iterator[Record]:
        label_of = self._open(split).class_to_idx
        for path, size in iter_images(self._root, "SUN397"):
            label = label_of.get("/".join(path.split("/")[2:-1]))  # SUN397/a/abbey/sun_x.jpg
            if label is not None:
                key = escape_key(path.removeprefix("SUN397/"))
                yield Record(key=key, split=split, label=label, content=(path, size))

    def _imagenet_records(self, split: str) -> Iterator[Record]:
        dataset = self._open(split)
        require(
            tuple(dataset.wnids) == self.classes,
            f"{self._root / split} does not have the class folders of {self._root / 'train'}; "
            f"unpack {SETS[self.name].needs} again",
            MissingDatasetError,
        )
        for image, label in dataset.samples:
            path, size = self._file(image)
            yield Record(key=escape_key(path), split=split, label=label, content=(path, size))

    def _file(self, image: str) -> tuple[str, int]:
        path = Path(image)
        try:
            return image.removeprefix(f"{self._root}/"), path.stat().st_size
        except FileNotFoundError:
            raise MissingDatasetError(
                f"{path} is missing; remove its folder and let torchvision unpack it again"
            ) from None

    def _open(self, split: str) -> Any:
        """Open torchvision's data set; it is downloaded only if it cannot be opened otherwise."""
        try:
            return load_dataset(self.name, self._root, split)
        except MissingDatasetError:
            if not (self.config.download and SETS[self.name].is_downloadable):
                raise
        build_dataset(self.name, self._root, split, download=True)
        return load_dataset(self.name, self._root, split)


@lru_cache(maxsize=4)
def load_dataset(name: str, root: Path, split: str) -> Any:
    """Open torchvision's data set from the files in `root`, once per process.

    Raises:
        MissingDatasetError: If torchvision cannot open it.
    """
    return build_dataset(name, root, split)


def build_dataset(name: str, root: Path, split: str, *, download: bool = False) -> Any:
    """Build torchvision's data set, checked by torchvision.

    Args:
        name: One of SETS.
        root: Folder of its files.
        split: One of its splits.
        download: Let torchvision download and unpack what is missing.

    Raises:
        MissingDatasetError: If torchvision cannot open it.
    """
    from torchvision import datasets

    builders = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "voc2007": datasets.VOCDetection,
        "voc2012": datasets.VOCDetection,
        "sun397": datasets.SUN397,
        "imagenet": datasets.ImageNet,
    }
    spec = SETS[name]
    options = {"download": True} if download else {}
    try:
        return builders[name](str(root), **spec.splits[split], **options)
    except (RuntimeError, OSError) as error:
        recovery_hint = f"place {spec.needs} in data.root={root}"
        if spec.is_downloadable and not download:
            recovery_hint += ", or set data.download=true"
        raise MissingDatasetError(
            f"data.name={name} has no split {split} that torchvision can open: {' '.join(str(error).split())}; "
            f"{recovery_hint}"
        ) from error


def load_voc_boxes(path: Path) -> tuple[Box, ...]:
    """Read the objects of a VOC annotation, in pixels; parts of objects (heads, hands) are left out.

    Raises:
        MissingDatasetError: If the file is not a VOC annotation.
    """
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        return tuple(_voc_box(node) for node in objects)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise MissingDatasetError(f"{path} is not a VOC annotation: {error}") from error


def _voc_box(node: ElementTree.Element) -> Box:
    xmin, ymin, xmax, ymax = (
        float(node.findtext(f"bndbox/{corner}", "")) for corner in ("xmin", "ymin", "xmax", "ymax")
    )
    label = VOC_CLASSES.index(node.findtext("name", ""))
    return Box(label=label, x0=xmin - 1, y0=ymin - 1, x1=xmax, y1=ymax)
