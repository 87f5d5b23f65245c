"""Data sets of Hugging Face, read by `datasets` itself (make test-hub); skipped where it is not installed."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from permafrost.core.errors import ConfigError
from permafrost.core.records import NONE, mark_unknown
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.sources.image_files import SourceFileError
from permafrost_sources.huggingface_sets import HuggingFaceSource
from permafrost_sources.options import HuggingFaceDataConfig
from tests.exchange.test_ingest import run_distill
from tests.exchange.test_share import run_share
from tests.support.exchange import (
    PHOTOS,
    make_photographs,
    run_ingest,
    run_precompute,
    values_by_key,
)

datasets = pytest.importorskip("datasets", reason="datasets is not installed; run make test-hub")
TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("hub"))


def columns_of(photographs):
    return {
        "image": [str(photographs.folder / path) for path in photographs.paths],
        "label": [int(path.split("/")[1][1:]) for path in photographs.paths],
    }


def features(**others):
    names = datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])
    return datasets.Features(image=datasets.Image(), label=names, **others)


@pytest.fixture(scope="module")
def table(photographs):
    return datasets.Dataset.from_dict(columns_of(photographs), features())


@pytest.fixture(params=["save_to_disk", "one split", "parquet", "imagefolder"])
def folder(request, photographs, table, tmp_path):
    """The same images in each form of a folder."""
    if request.param == "save_to_disk":
        datasets.DatasetDict(train=table).save_to_disk(tmp_path / "d")
    elif request.param == "one split":
        table.save_to_disk(tmp_path / "d")
    elif request.param == "parquet":
        (tmp_path / "d").mkdir()
        table.to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    else:
        return photographs.folder.parent / "photos"
    return tmp_path / "d"


def test_files_that_cells_name_are_read_below_a_root(photographs, table, tmp_path):
    """`to_parquet` writes the paths of files and not their bytes."""
    (tmp_path / "d").mkdir()
    table.to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    options = {"path": str(tmp_path / "d"), "cache": str(tmp_path / "c")}
    record = next(HuggingFaceSource(HuggingFaceDataConfig(**options)).records())

    with pytest.raises(SourceFileError, match=r"leads out of .*; .* data\.root="):
        HuggingFaceSource(HuggingFaceDataConfig(**options)).read(record)
    config = HuggingFaceDataConfig(**options, root=str(photographs.folder))
    assert HuggingFaceSource(config).read(record).suffix == "png"


def test_every_form_of_a_folder_has_the_same_files(photographs, folder, tmp_path):
    root = str(photographs.folder)
    options = [f"data.path={folder}", f"data.cache={tmp_path / 'c'}", f"data.root={root}"]
    run_precompute(
        tmp_path / "store", "data=huggingface", *options, "store.image_size=32", "teacher=none"
    )

    config = HuggingFaceDataConfig(path=str(folder), cache=str(tmp_path / "c"), root=root)
    source = HuggingFaceSource(config)
    records = list(source.records())
    assert len(records) == PHOTOS
    assert {record.split for record in records} == {"train"}
    originals = sorted((photographs.folder / path).read_bytes() for path in photographs.paths)
    assert sorted(source.read(record).image for record in records) == originals
    assert source.read(records[0]).suffix == "png"
    named = folder.name != "photos"
    assert source.classes == (("ant", "bee", "cat", "dog") if named else ("n0", "n1", "n2", "n3"))


@pytest.mark.parametrize("name", ["secret.png", "/dev/zero", "pipe.png"])
def test_a_cell_names_no_file_outside_of_the_data_set(photographs, tmp_path, name):
    secret = photographs.folder / photographs.paths[0]
    (tmp_path / "secret.png").write_bytes(secret.read_bytes())
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "pipe.png")
    path = "pipe.png" if name == "pipe.png" else str(tmp_path / name)
    cells = [{"bytes": None, "path": path}, {"bytes": secret.read_bytes(), "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": [0, 1]})
    pq.write_table(table, tmp_path / "d" / "train-00000-of-00001.parquet")
    config = HuggingFaceDataConfig(path=str(tmp_path / "d"), cache=str(tmp_path / "c"))
    source = HuggingFaceSource(config)
    named, embedded = source.records()

    assert source.read(embedded).image == secret.read_bytes()
    with pytest.raises(SourceFileError, match=r"leads out of|not a regular file"):
        source.read(named)


def test_several_labels_boxes_and_keys(photographs, tmp_path):
    names = datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])
    columns = columns_of(photographs) | {
        "tags": [[n % 4, (n + 1) % 4] for n in range(PHOTOS)],
        "objects": [{"bbox": [[1.0, 2.0, 5.0, 6.0]], "category": [n % 4]} for n in range(PHOTOS)],
        "name": [f"image {n}" for n in range(PHOTOS)],
    }
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(names),
    }
    form = features(tags=datasets.List(names), objects=objects, name=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, form).save_to_disk(tmp_path / "d")

    options = {"label": None, "labels": "tags", "boxes": "objects", "key": "name"}
    source = HuggingFaceSource(HuggingFaceDataConfig(path=str(tmp_path / "d"), **options))
    records = {record.key: record for record in source.records()}

    record = records["image%205"]
    assert record.labels == (1, 2)
    assert source.classes == ("ant", "bee", "cat", "dog")
    (box,) = record.boxes
    assert (box.label, box.x0, box.y0, box.x1, box.y1) == (1, 1.0, 2.0, 6.0, 8.0)
    assert record.boxes_in_pixels


def test_columns_of_one_and_zero_say_of_each_class_whether_a_record_has_it(photographs, tmp_path):
    cells = {"cyst": [1, 0, None], "nodule": [None, 0, None]}
    columns = columns_of(photographs) | {
        name: [values[n % 3] for n in range(PHOTOS)] for name, values in cells.items()
    }
    columns["objects"] = [
        [{"bbox": [1.0, 2.0, 5.0, 6.0]}] if n % 3 == 0 else None for n in range(PHOTOS)
    ]
    boxes = [{"bbox": datasets.List(datasets.Value("float32"))}]
    flag = datasets.Value("int32")
    form = features(cyst=flag, nodule=flag, objects=boxes)
    datasets.Dataset.from_dict(columns, form).save_to_disk(tmp_path / "d")
    config = HuggingFaceDataConfig(
        path=str(tmp_path / "d"), labels=("cyst", "nodule"), boxes="objects"
    )

    first, second, third, *_ = HuggingFaceSource(config).records()

    assert HuggingFaceSource(config).classes == ("cyst", "nodule")
    assert (first.labels, second.labels, third.labels) == ((0, mark_unknown(1)), NONE, ())
    assert first.boxes[0].label == 0


def test_columns_that_are_not_there_and_folders_that_are_none_are_named(table, tmp_path):
    table.save_to_disk(tmp_path / "d")
    config = HuggingFaceDataConfig(path=str(tmp_path / "d"), label="species")
    with pytest.raises(ConfigError, match=r"data\.label=species: .* but image, label"):
        list(HuggingFaceSource(config).records())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be read by datasets"):
        list(HuggingFaceSource(HuggingFaceDataConfig(path=str(tmp_path / "empty"))).records())


def test_a_shared_pass_is_a_data_set_and_teaches_the_same_student(photographs, tmp_path):
    words = ["data=none", *TEACHER, "annotate.outputs=[logits,pooled]"]
    result = run_precompute(photographs.store, *words)
    name = result.passes[0]
    run_share(photographs.store, tmp_path / "h", f"pass={name}", "form=huggingface", "images=true")

    loaded = datasets.load_dataset(str(tmp_path / "h"), cache_dir=str(tmp_path / "c"))["train"]
    values = values_by_key(photographs.open(), name)
    assert len(loaded) == PHOTOS
    for row in loaded:
        assert np.array_equal(np.float16(row["logits"]), values["logits"][row["key"]][0])
        assert row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    loaded.select_columns(["key", "logits"]).to_parquet(tmp_path / "again.parquet")

    words = ["format=parquet", f"path={tmp_path / 'again.parquet'}", f"format.cache={tmp_path}"]
    other = run_ingest(photographs.store, *words, "format.frame=full").ingested_pass
    options = ["method=kd", "augment=pad_crop_flip"]
    run_distill(photographs.store, "original", *options, f"store.teacher=[{name}]")
    run_distill(photographs.store, "loaded", *options, f"store.teacher=[{other.partition(' ')[0]}]")
    one, same = (
        SavedNetwork(RUNS / r / "distill").load()[0].state_dict() for r in ("original", "loaded")
    )
    assert all((one[name] == same[name]).all() for name in one)


def test_images_of_a_shared_pass_are_pictures(photographs, tmp_path):
    result = run_precompute(photographs.store, "data=none", *TEACHER)
    words = [f"pass={result.passes[0]}", "form=huggingface", "images=true"]
    run_share(photographs.store, tmp_path / "h", *words)

    loaded = datasets.load_dataset(str(tmp_path / "h"), cache_dir=str(tmp_path / "c"))["train"]

    assert isinstance(loaded[0]["image"], Image.Image)
