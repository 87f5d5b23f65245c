"""docs/reference/store-format.md: its examples run unchanged, and its tables list every column."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from permafrost.annotation.precision import in_network_units
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.store import PassOptions
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.losses.restored_features import RestoredFeatures
from permafrost.store.columns import COLUMNS
from permafrost.store.reader import Store
from tests.support.index_table import index_table
from tests.support.processes import run_program
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

PAGE = (Path(__file__).resolve().parent.parent / "docs/reference/store-format.md").read_text()
EXAMPLE, REBUILDING = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, tiny_teacher) -> Path:
    """Store of images in shards of 7 with two splits, short last shards and two skipped records."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("uneven")
    generator = np.random.default_rng(0)
    for split, count in (("train", 17), ("test", 11)):
        for name in ("cat", "dog"):
            for number in range(count):
                path = folder / "images" / split / name / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    for split in ("train", "test"):
        (folder / "images" / split / "cat" / "000.png").write_bytes(b"no image")
    data = ImageFolderDataConfig(path=str(folder / "images"), on_error="skip")
    teacher = replace(tiny_teacher, classes=10)
    config = precompute_config(folder / "store", teacher, data=data, shard_size=7)
    precompute.run(replace(config, annotate=PassOptions(batch_size=4)))
    return folder / "store"


def test_the_example_is_right(uneven):
    """The example prints the accuracy and reads the logits and maps of our reader."""
    store = Store(uneven)
    (teacher,) = store.open_passes()
    head = f"store, name = {str(uneven)!r}, {teacher.name!r}\n"
    check = "np.savez('read.npz', logits=logits, maps=maps, rows=rows)"

    done = run_program([sys.executable, "-c", head + EXAMPLE + check])

    assert done.returncode == 0, done.stderr
    printed, read = json.loads(done.stdout), np.load("read.npz")
    index = {row["array_row"]: row for row in index_table(store).to_pylist()}
    shards = {shard.name: teacher.read_shard(shard) for shard in store.manifest.shards}
    right = []
    for array_row, logits, maps in zip(read["rows"], read["logits"], read["maps"], strict=True):
        row = index[array_row]
        np.testing.assert_array_equal(logits, shards[row["shard"]]["logits"][row["row"], 0])
        np.testing.assert_array_equal(maps, shards[row["shard"]]["map"][row["row"], 0, 0])
        right.append(int(logits.argmax()) == row["label"])
    assert len(right) == 21  # 22 images, one of which was skipped
    assert printed == {"accuracy": np.mean(right), "maps": list(read["maps"].shape)}


def test_rows_of_the_arrays_are_not_rows_of_the_index_and_padding_says_so(uneven):
    """Control: array rows differ from index rows, so reading by index row returns another record or padding."""
    import zarr

    store = Store(uneven)
    (teacher,) = store.open_passes()
    arrays = zarr.open_group(str(teacher.folder / "fields.zarr"), mode="r")
    array_row = index_table(store)["array_row"].to_numpy()
    padding = np.setdiff1d(np.arange(arrays["logits"].shape[0]), array_row)

    assert (array_row != np.arange(len(array_row))).any()
    assert len(padding) == arrays["logits"].shape[0] - store.index.num_rows > 0
    assert np.isnan(arrays["logits"][:][padding]).all()
    assert np.isnan(arrays["map"][:][padding]).all()
    assert (arrays["target_class"][:][padding] == -1).all()
    for name in arrays.array_keys():
        array = arrays[name]
        assert array.metadata.dimension_names[:2] == ("array_row", "view")
        assert not any(axis.startswith("axis_") for axis in array.metadata.dimension_names)
        assert {"codec", "padding", "array_row"} <= set(array.attrs)


def test_the_page_names_every_column_of_the_index():
    for name in COLUMNS:
        assert f"`{name}`" in PAGE, name


def test_the_second_example_rebuilds_projected_features(tmp_path, tiny_teacher):
    options = PassOptions(batch_size=8, outputs=("features",), features_channels=3)
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, annotate=options))
    store = Store(tmp_path / "store")
    (made,) = store.open_passes()
    folder = tmp_path / "store" / "teachers" / made.name
    names = {
        "np": np,
        "folder": folder,
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "fields": zarr.open_group(str(folder / "fields.zarr"), mode="r"),
        "row": int(index_table(store)["array_row"][5].as_py()),
    }

    exec(REBUILDING, names)

    batch = StoreDataset(store, np.array([5]), [made], output="features").__getitems__([0])
    (targets,) = view_targets(batch, TargetRequest((1, 1), with_maps=False))
    expected = RestoredFeatures([made])(targets).intermediates["features_3"][0]
    assert names["features"].shape == (2, 16, 4, 4)
    torch.testing.assert_close(
        torch.from_numpy(names["features"][0]).float(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_what_the_attributes_say_gives_the_units_of_the_network(tmp_path, tiny_teacher, dtype):
    """The expression of each array is run with stock Zarr and NumPy, and compared with the teacher's own output."""
    options = PassOptions(
        batch_size=8,
        outputs=("logits", "maps", "class_maps", "attention", "features"),
        features_dtype=dtype,
        map_dtype=dtype,
    )
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, annotate=options))
    store = Store(tmp_path / "store")
    (made,) = store.open_passes()
    arrays = zarr.open_group(str(made.folder / "fields.zarr"), mode="r")
    described = {n: a for n, a in arrays.arrays() if "units" in a.attrs}
    shard = store.manifest.shards[0]
    keys = made.shard_keys(shard)
    rows = [index_table(store)["array_row"][n].as_py() for n in range(len(keys))]
    read = {name: array.oindex[rows] for name, array in arrays.arrays()}

    assert {"map", "class_maps", "attention_3", "features_3"} <= described.keys()
    is_stepped = False
    for name, array in described.items():
        space = {**read, "values": read[name], "step": array.attrs["step"]}
        units = eval(array.attrs["units"], {"__builtins__": {}}, space)
        expected = in_network_units(made.read_shard(shard), name)
        np.testing.assert_allclose(units[:, 0], expected, rtol=1e-3, atol=1e-6)
        is_stepped |= array.dtype == "int8"
        if array.dtype == "int8":  # the control: without the step, they are 127 times as large
            assert not np.allclose(units[:, 0] / array.attrs["step"], expected, rtol=0.5)
    assert is_stepped == (dtype == "int8")
