"""The second reader, against what the tools' own readers yielded from the same files (make_files.py)."""

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.exchange.conformance import second_reader
from tests.exchange.conformance.make_files import (
    CLASSES,
    DATACOMPDR,
    FILES,
    FKD_KINDS,
    IMAGENET_PLUS,
    RELABEL_CLASSES,
    SIDE,
    TINYVIT_TOP,
    unpack,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("files")
    for path in FILES.glob("*.zip"):
        unpack(path.stem, target)
    return target


@pytest.fixture(scope="module")
def photographs(folder):
    return sorted((folder / "photographs/train").rglob("*.jpg"))


def yielded(name):
    with np.load(FILES / f"{name}.npz") as file:
        return dict(file)


def require_equal(name, records):
    theirs = yielded(name)
    targets = np.stack([[view.probabilities for view in views] for views in records])
    assert np.abs(targets - theirs["targets"]).max() < 2e-7
    if "views" in theirs and records[0][0].pixels.shape == (SIDE, SIDE, 3):
        require_same_pixels(records, theirs["views"])


def require_same_pixels(records, views):
    pixels = np.stack([[v.pixels.transpose(2, 0, 1) for v in each] for each in records])
    assert np.abs(pixels.astype(int) - views.astype(int)).max() <= 2  # decoders of JPEG round


def test_it_knows_nothing_of_this_project():
    tree = ast.parse(Path(second_reader.__file__).read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert {name.partition(".")[0] for name in modules} <= {
        *("__future__", "gzip", "io", "json", "math", "struct", "tarfile", "dataclasses"),
        *("pathlib", "numpy", "torch", "PIL"),
    }


@pytest.mark.parametrize("name", FKD_KINDS)
def test_soft_labels_of_fkd(folder, photographs, name):
    kind = FKD_KINDS[name][1]
    require_equal(name, second_reader.fkd(folder / name, photographs, kind, CLASSES, SIDE))


@pytest.mark.parametrize("name", [name for name in IMAGENET_PLUS if "mixing" not in name])
def test_recipes_of_imagenet_plus(folder, photographs, name):
    require_equal(name, second_reader.imagenet_plus(folder / name, photographs, CLASSES))


@pytest.mark.parametrize("name", ["datacompdr", "datacompdr_bfloat16"])
def test_recipes_of_datacompdr(folder, photographs, name):
    tar = folder / name / "00000000.tar"
    records, embeddings = second_reader.datacompdr(tar, photographs, DATACOMPDR)

    theirs = yielded(name)
    require_same_pixels(records, theirs["views"])
    tolerance = 2**-8 if "bfloat16" in name else 0
    assert np.allclose(np.stack(embeddings), theirs["targets"], rtol=tolerance, atol=0)


def test_probabilities_of_tinyvit(folder, photographs):
    targets = second_reader.tinyvit(folder / "tinyvit", len(photographs), TINYVIT_TOP, CLASSES)
    assert np.abs(targets - yielded("tinyvit")["targets"]).max() < 1e-7


def test_labels_of_relabel(folder, photographs):
    theirs = yielded("relabel")
    for path, boxes, targets in zip(photographs, theirs["boxes"], theirs["targets"], strict=True):
        file = folder / "relabel" / path.parent.name / f"{path.stem}.pt"
        here = second_reader.relabel(file, boxes, RELABEL_CLASSES)
        assert np.abs(here - targets).max() < 1e-6


def test_features_of_theia_and_maps_of_e2kd(folder, photographs):
    read = second_reader.theia(folder / "theia")
    features = np.stack([read[path.stem][0] for path in photographs])
    assert np.array_equal(features, yielded("theia")["targets"])
    for name in ("e2kd_gradcam", "e2kd_bcos"):
        logits, maps = second_reader.e2kd(folder / name, len(photographs))
        assert np.array_equal(logits, yielded(name)["targets"])
        assert np.array_equal(maps, yielded(name)["maps"])
