"""Small image sets in the layouts of their publishers."""

import hashlib
import io
import json
import pickle
import struct
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost_sources.options import TorchvisionDataConfig


def image_bytes(seed=0, size=(6, 4), kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_images(root, *paths):
    """Write a different image to each path, and return the bytes by path."""
    written = {}
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.lower().endswith("png") else "JPEG"
        written[path] = image_bytes(len(path) + sum(map(ord, path)), kind=kind)
        (root / path).write_bytes(written[path])
    return written


def by_key(source):
    return {unquote(record.key): record for record in source.records()}


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def folder_config(root, **options):
    return ImageFolderDataConfig(path=str(root), **options)


def csv_cell(value):
    """Cell of a CSV table: boxes as JSON, several classes separated by spaces."""
    if not isinstance(value, list):
        return value
    if not value:
        return "[]"
    return json.dumps(value) if value and isinstance(value[0], dict) else " ".join(value)


def write_table(path, columns):
    if path.suffix == ".csv":
        cells = {name: list(map(csv_cell, values)) for name, values in columns.items()}
        pd.DataFrame(cells).to_csv(path, index=False)
    else:
        pq.write_table(pa.table(columns), path)


def image_table_config(path, **options):
    return ImageTableDataConfig(path=str(path), **options)


WATERBIRDS = {
    "img_id": [1, 2, 3, 4],
    "img_filename": ["001.A/a_1.jpg", "001.A/a_2.jpg", "002.B/b_1.jpg", "002.B/b_2.jpg"],
    "y": [0, 1, 1, 0],
    "split": [0, 1, 2, 0],
    "place": [0, 0, 1, 1],
    "place_filename": ["/b/bamboo_forest/1.jpg"] * 4,
}


WATERBIRDS_OPTIONS = {
    "image": "img_filename",
    "label": "y",
    "split": "split",
    "split_names": {"0": "train", "1": "val", "2": "test"},
    "group": ("y", "place"),
}


def downloaded_config(name, root):
    return TorchvisionDataConfig(name=name, root=str(root), download=False)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, name="MNIST", train=12, test=5):
    generator = np.random.default_rng(0)
    images = {"train": generator.integers(0, 256, (train, 28, 28), dtype=np.uint8)}
    images["t10k"] = generator.integers(0, 256, (test, 28, 28), dtype=np.uint8)
    for part, pixels in images.items():
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        write_idx(root / f"{name}/raw/{part}-images-idx3-ubyte", pixels)
        write_idx(root / f"{name}/raw/{part}-labels-idx1-ubyte", labels)
    return images


def write_cifar(root, monkeypatch, name, labels=(5, 3, 9)):
    """Write a small batch to each file and register its checksum, so that torchvision's own check passes."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    field = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    count = {"cifar10": 10, "cifar100": 100}[name]
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)

    def write(file, value):
        data = pickle.dumps(value)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    rows = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    batch = {"data": rows, field: list(labels)}
    monkeypatch.setattr(dataset, "train_list", [write(f, batch) for f, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [write(f, batch) for f, _ in dataset.test_list])
    names = [f"class {i}" for i in range(count)]
    file, md5 = write(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"filename": file, "md5": md5})
    return rows, folder


VOC_XML = """<annotation><filename>{name}.jpg</filename>
<object><name>person</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>6</xmax><ymax>4</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
</object>
<object><name>cat</name><bndbox><ymin>1</ymin><xmin>2</xmin><ymax>3</ymax><xmax>5</xmax></bndbox></object>
</annotation>"""


def write_voc(root, year, splits):
    voc = root / f"VOCdevkit/VOC{year}"
    for folder in ("ImageSets/Main", "Annotations"):
        (voc / folder).mkdir(parents=True)
    for number, split in enumerate(splits):
        names = [f"{year}_{number}{i}" for i in range(2)]
        write_images(voc, *(f"JPEGImages/{name}.jpg" for name in names))
        (voc / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (voc / f"Annotations/{name}.xml").write_text(VOC_XML.format(name=name))
    return voc


def write_sun397(root):
    names = ("/a/abbey", "/a/apartment_building/outdoor")
    write_images(root, "SUN397/a/abbey/sun_1.jpg")
    write_images(root, "SUN397/a/apartment_building/outdoor/sun_2.jpg")
    (root / "SUN397/ClassName.txt").write_text("\n".join(names) + "\n")


def write_imagenet(root):
    import torch

    root.mkdir(parents=True, exist_ok=True)
    words = {"n01": ("crane", "bird"), "n02": ("crane",)}
    torch.save((words, ["n02"]), root / "meta.bin")
    write_images(root, "train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG")
    write_images(root, "val/n01/ILSVRC2012_val_1.JPEG", "val/n02/ILSVRC2012_val_2.JPEG")
