"""Datasets of a Python program: map-style datasets of images, and what stands for a table of image files.

A record of a dataset has no name, so its key is its number with a digest of its pixels and label. A dataset that gives
another image when it is read again, as one with random transforms, is therefore noticed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from permafrost.config.data import MemoryDataConfig
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import (
    NO_LABEL,
    Content,
    ImageSource,
    Record,
    labels_of_states,
)
from permafrost.sources.splits import TRAIN, is_split_name, split_off_test
from permafrost.storage.files import file_at
from permafrost.store.image_decoding import picture_suffix, png_of

_IMAGE_NAMES = ("image", "img", "picture")
"""Entries that are the image of a record that is a mapping, the first that it has."""
_LABEL_NAMES = ("label", "labels", "fine_label", "target")
"""Entries that are its label."""
_IDENTIFYING_DIGITS = 16


_Item = tuple[Image.Image | bytes, int, tuple[int, ...]]
"""Image of a record, with its label or labels."""
_LABEL_NAMES = ("label", "labels", "fine_label", "target")
"""Entries of a record that is a mapping that are its label, the first that it has."""


class MemorySource(ImageSource):
    """Source of the images of map-style datasets, one for each split."""

    name = "memory"

    def __init__(self, config: MemoryDataConfig) -> None:
        require(
            config.dataset is not None,
            "data=memory is a dataset of a Python program, which a command line cannot name; pass it as "
            "permafrost.precompute(dataset=dataset), or name its files, data=image_folder",
        )
        self.config = config
        self._splits = splits_of(config.dataset)
        self._largest = NO_LABEL

    @property
    def classes(self) -> tuple[str, ...]:
        """Names that the dataset has for its classes, or numbers: data.classes, or up to the largest label."""
        first = next(iter(self._splits.values()))
        if names := _class_names(first):
            return tuple(names)
        number = max(self._largest + 1, self.config.classes or 0)
        return tuple(map(str, range(number if self._largest > NO_LABEL else 0)))

    def stamps(self) -> dict[str, str]:
        """Return what changes with the datasets: anything, unless they know their digest."""
        return {
            split: str(getattr(dataset, "_fingerprint", secrets.token_hex(8)))
            for split, dataset in self._splits.items()
        }

    def records(self) -> Iterator[Record]:
        """Yield the records, reading each once for its digest."""
        return split_off_test(self._records(), self.config.test_fraction, is_exact=True)

    def _records(self) -> Iterator[Record]:
        first: tuple[str, tuple[int, int]] | None = None
        for split, dataset in self._splits.items():
            prefix = f"{split}-" if len(self._splits) > 1 else ""
            for number in range(len(dataset)):
                where = self._where(split, number)
                image, label, labels = self._item(split, number)
                if isinstance(image, Image.Image) and self.config.sizes == "equal":
                    first = first or (where, image.size)
                    require(
                        image.size == first[1],
                        f"{where} is {image.size[0]}x{image.size[1]} pixels, and {first[0]} is {first[1][0]}x"
                        f"{first[1][1]}; name the side of the frame that the teacher receives, as in image_size=224",
                    )
                self._largest = max(self._largest, label, *labels, NO_LABEL)
                digest = _digest(image, label, labels)
                if number == 0:
                    self._require_same(split, number, digest, self._item(split, number))
                yield Record(
                    key=f"{prefix}{number:07d}-{digest}",
                    split=split,
                    label=label,
                    labels=labels,
                    content=(split, number, digest),
                )

    def read(self, record: Record) -> Content:
        """Return the image as PNG, or the bytes that a dataset holds of its file.

        Raises:
            ConfigError: If the dataset gives another record than when it was listed.
        """
        split, number, digest = record.content
        item = self._item(split, number)
        self._require_same(split, number, digest, item)
        data = png_of(item[0]) if isinstance(item[0], Image.Image) else item[0]
        return Content(image=data, suffix=picture_suffix(data[:16]) or "bin")

    def _require_same(self, split: str, number: int, digest: str, item: _Item) -> None:
        """Raise ConfigError unless a record that was read again has the digest of its first reading."""
        require(
            _digest(*item) == digest,
            f"{self._where(split, number)} gives another image each time, so a transform of the dataset is random, or "
            "the dataset was changed since it was listed; leave random transforms to augment=",
        )

    def where(self, record: Record) -> str:
        """Return the place of a record in its dataset."""
        return self._where(*record.content[:2])

    def _where(self, split: str, number: int) -> str:
        return f"dataset[{number}]" if len(self._splits) == 1 else f"dataset[{split!r}][{number}]"

    def _item(self, split: str, number: int) -> _Item:
        """Return the image of a record, and its label or labels."""
        where = self._where(split, number)
        item, label = self._splits[split][number], None
        if isinstance(item, Mapping):
            names = [name for name in _IMAGE_NAMES if name in item]
            require(bool(names), f"{where} has {', '.join(map(str, item))} and no entry `image`")
            label = next((item[name] for name in _LABEL_NAMES if name in item), None)
            item = item[names[0]]
        elif isinstance(item, (tuple, list)):
            item, label = (*item, None)[:2]
        return _image_of(item, where), *_labels_of(label, where)


def splits_of(dataset: Any) -> dict[str, Any]:
    """Return the datasets of the splits: those of a mapping, or the only one as split train.

    Raises:
        ConfigError: If one is not a map-style dataset.
    """
    if isinstance(dataset, (str, os.PathLike)):
        raise ConfigError(
            f"dataset={dataset!r} is a path; read a folder as data='image_folder', data__path={str(dataset)!r}, and a "
            "file as [path]"
        )
    splits = dict(dataset) if isinstance(dataset, Mapping) else {TRAIN: dataset}
    for split, each in splits.items():
        name = type(each).__name__
        require(
            is_split_name(str(split)),
            f"dataset={{{split!r}: ...}}: a split has letters, digits, - and _",
        )
        require(
            hasattr(each, "__len__") and hasattr(each, "__getitem__"),
            f"dataset={name} is not a map-style dataset, as it has no length or no dataset[i]; a store reads records "
            "in any order, so list the items, or give the files (a list of paths, a DataFrame)",
        )
        require(len(each) > 0, f"dataset={name} has no records")
    return splits


def _image_of(image: Any, where: str) -> Image.Image | bytes:
    """Return an image as Pillow's, or the bytes of its file."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):  # of datasets
        return image.get("bytes") or file_at(Path(image["path"])).read()
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = _pixels_of(image, where)
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,)):
        return Image.fromarray(image)
    form = f"{image.dtype} {[*image.shape]}" if is_array else type(image).__name__
    raise ConfigError(
        f"{where} is {form} instead of an image; a dataset gives images of Pillow, tensors [3, H, W] that are uint8 or "
        "in [0, 1], or uint8 arrays [H, W, 3], alone or with a label"
    )


def _pixels_of(image: torch.Tensor, where: str) -> Any:
    """Return a tensor [3, H, W] or [1, H, W] as u8 [H, W, 3] or [H, W]."""
    require(
        image.ndim == 3 and image.shape[0] in (1, 3),
        f"{where} is a tensor {[*image.shape]} instead of [3, H, W] or [1, H, W]",
    )
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        require(
            low >= 0 and high <= 1,
            f"{where} has values from {low:g} to {high:g} instead of 0 to 1; leave out the normalization, which "
            "mean= and std= do, and divide pixels by 255",
        )
        image = (image * 255).round().to(torch.uint8)
    return image.detach().cpu().permute(1, 2, 0).squeeze(2).numpy()


def _labels_of(label: Any, where: str) -> tuple[int, tuple[int, ...]]:
    """Return the label of a record and its labels, one of which there are."""
    if label is None:
        return NO_LABEL, ()
    values = np.asarray(label)
    if values.ndim == 1 and np.isin(values, (0, 1)).all():
        return NO_LABEL, labels_of_states([bool(value) for value in values])
    require(
        values.ndim == 0 and np.issubdtype(values.dtype, np.integer) and int(values) >= NO_LABEL,
        f"{where} has the label {str(label)[:60]!r}; a label is a whole number from 0, or -1 or None where it is "
        "unknown, and several labels are 0 or 1 for each class",
    )
    return int(values), ()


def _digest(image: Image.Image | bytes, label: int, labels: tuple[int, ...]) -> str:
    form = "" if isinstance(image, bytes) else f"{image.mode} {image.size}"
    digest = hashlib.sha256(f"{form} {label} {labels}\n".encode())
    digest.update(image if isinstance(image, bytes) else image.tobytes())
    return digest.hexdigest()[:_IDENTIFYING_DIGITS]


# ---- files -----------------------------------------------------------------------------------------


def options_of_dataset(dataset: Any, folder: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `data` for a dataset: of a table that is written, or of `kind: memory`.

    Args:
        dataset: Dataset, or a mapping from splits to datasets.
        folder: Folder of the table.
        call: Options of the call, which may have `image_size` and a `teacher`.

    Raises:
        ConfigError: If a folder has a transform, or a DataFrame has cells that Arrow cannot hold.
    """
    options: dict[str, Any] = {"kind": "image_table", "path": str(folder / "dataset.parquet")}
    if hasattr(dataset, "columns") and hasattr(dataset, "to_dict"):
        try:
            table = pa.Table.from_pandas(dataset, preserve_index=False)
        except pa.ArrowException as error:
            raise ConfigError(
                f"dataset=DataFrame: {error}; write paths and labels as text"
            ) from error
        pq.write_table(table, options["path"])
        split = "split" if "split" in table.column_names else None
        return options | {"root": str(Path.cwd()), "split": split}
    splits = splits_of(dataset)
    rows = [(split, *pair) for split, each in splits.items() for pair in _files_of(each)]
    if len(rows) < sum(map(len, splits.values())):
        teacher = call.get("teacher")
        return {
            "kind": "memory",
            "sizes": "any" if "image_size" in call else "equal",
            "classes": teacher.get("classes") if isinstance(teacher, dict) else None,
        }
    roots = [str(each.root) for each in splits.values() if hasattr(each, "root")]
    paths = roots or [path for _, path, _ in rows]
    is_relative = not roots and not any(map(os.path.isabs, paths))
    root = str(Path.cwd()) if is_relative else os.path.commonpath(map(os.path.abspath, paths))
    columns = {
        "path": [os.path.relpath(path, root) for _, path, _ in rows],
        "label": pa.array([label for _, _, label in rows], pa.string()),
        "split": [split for split, _, _ in rows],
    }
    pq.write_table(pa.table(columns), options["path"])
    if classes := _class_names(next(iter(splits.values()))):
        options["classes"] = str(folder / "classes.txt")
        Path(options["classes"]).write_text("\n".join(classes), encoding="utf-8")
    has_labels = any(label is not None for _, _, label in rows)
    return options | {"root": root, "label": "label" if has_labels else None, "split": "split"}


def _class_names(dataset: Any) -> list[str]:
    """Return the names of a dataset's classes; several of one class, as of ImageNet, are one text."""
    features = getattr(dataset, "features", None)
    of_datasets = features.values() if isinstance(features, Mapping) else ()
    names = next((f.names for f in of_datasets if getattr(f, "names", None)), None)
    names = names or getattr(dataset, "classes", None) or ()
    return [name if isinstance(name, str) else ", ".join(name) for name in names]


def _files_of(dataset: Any) -> Iterator[tuple[str, str | None]]:
    """Yield the paths of a dataset of files with their labels, nothing for other items."""
    samples = getattr(dataset, "samples", dataset if isinstance(dataset, (list, tuple)) else ())
    classes = _class_names(dataset)
    for name in ("transform", "target_transform") if samples else ():
        require(
            getattr(dataset, name, None) is None,
            f"dataset={type(dataset).__name__}(...) has a {name}, but its files are stored as they are: leave it out; "
            "views belong to augment=, crops to frame='center_crop', sizes to image_size=, moments to mean= and std=",
        )
    for item in samples:
        path, label = (*item, None)[:2] if isinstance(item, (tuple, list)) else (item, None)
        if isinstance(path, (str, os.PathLike)):
            yield (
                os.fspath(path),
                None if label is None else str(classes[label] if classes else label),
            )


def undecoded(dataset: Any) -> Any:
    """Return a dataset of Hugging Face without the decoding of its images, any other as it is.

    Raises:
        ConfigError: If it has a transform, which would be left out.
    """
    if isinstance(dataset, Mapping):
        return {split: undecoded(each) for split, each in dataset.items()}
    features = getattr(dataset, "features", None)
    if not (isinstance(features, Mapping) and hasattr(dataset, "cast_column")):
        return dataset
    require(
        dataset.format["type"] is None,
        f"dataset has the format {dataset.format['type']}, but its images are stored as they are; pass "
        "dataset.with_format(None): views belong to augment=",
    )
    for name, feature in features.items():
        if type(feature).__name__ == "Image":
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset
