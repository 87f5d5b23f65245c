"""Records that have none of many labels, beside those whose labels are unknown: packed, read, trained and evaluated."""

import json

import numpy as np
import pytest
import torch

import permafrost
from permafrost.config.data import ImageTableDataConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.records import NONE
from permafrost.loading.subset import rows_of_split, select_holdout_rows, select_training_rows
from permafrost.losses.labels import bce_loss
from permafrost.sources.source import build_source
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.image_sets import by_key, image_bytes, write_images
from tests.support.images import write_tar
from tests.support.previews import message_of, preview_of
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

CELLS = ['["cat"]', '["cat", "dog"]', "[]", "", '["dog"]', "[]"] * 4
"""Cells of 24 records, of which eight have none, and four are unknown."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("none")
    write_images(root, *(f"{n}.jpg" for n in range(len(CELLS))))
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in CELLS]
    lines = ["path,tags", *(f"{n}.jpg,{cell}" for n, cell in enumerate(quoted))]
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return ImageTableDataConfig(path=str(root / "t.csv"), label=None, labels="tags")


@pytest.fixture(scope="module")
def store(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "store"
    precompute.run(precompute_config(path, data=data))
    return Store(path)


def test_the_preview_counts_none_and_unknown_apart(data):
    preview = preview_of(data)

    assert "with none of the classes 8" in preview.sheet()["labels"].value
    assert "records without a label: 4 of 24" in message_of(preview, "missing_labels")


def test_a_batch_has_zeros_for_none_and_nan_for_unknown(store):
    records = permafrost.open_store(store.path).select("train")
    rows = {}
    for batch in permafrost.RecordLoader(records, teacher=(), batch_size=6):
        rows |= dict(zip(batch.keys, batch.labels, strict=True))

    for key, row in rows.items():
        cell = CELLS[int(key.partition("%2E")[0])]
        expected = [float(name in cell) for name in ("cat", "dog")] if cell else [np.nan] * 2
        assert np.array_equal(row.numpy(), expected, equal_nan=True)
    assert list(verify_store(store.path)) == []


def test_the_table_of_records_has_an_empty_list_for_none_and_null_for_unknown(store):
    table = permafrost.open_store(store.path).table(fields=()).to_pylist()

    for row in table:
        cell = CELLS[int(row["key"].partition("%2E")[0])]
        assert row["labels"] == (
            None
            if not cell
            else [place for place, name in enumerate(("cat", "dog")) if name in cell]
        )


def test_a_loss_of_none_pulls_all_logits_down_and_one_of_unknown_pulls_none(store):
    records = permafrost.open_store(store.path).select("train")
    batch = next(iter(permafrost.RecordLoader(records, teacher=(), batch_size=24)))
    logits = torch.zeros(len(batch.keys), 2, requires_grad=True)

    bce_loss(logits, batch.labels).backward()

    unknown = batch.labels.isnan().any(dim=1)
    none = (batch.labels == 0).all(dim=1)
    assert (logits.grad[unknown] == 0).all()
    assert (logits.grad[none] > 0).all()
    assert (int(unknown.sum()), int(none.sum())) == (4, 8)


def test_a_selection_takes_records_with_none_as_a_class_of_their_own(tmp_path):
    write_images(tmp_path, *(f"{n}.jpg" for n in range(12)))
    cells = ['["cat"]', '["dog"]', "[]"] * 4
    lines = [
        "path,tags",
        *(f'{n}.jpg,"{cell.replace(chr(34), chr(34) * 2)}"' for n, cell in enumerate(cells)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    data = ImageTableDataConfig(path=str(tmp_path / "t.csv"), label=None, labels="tags")
    precompute.run(precompute_config(tmp_path / "store", data=data))
    index = Store(tmp_path / "store").index
    subset = SubsetOptions(shots=2, holdout=1)

    held_out = select_holdout_rows(index, "train", subset)
    trained = select_training_rows(index, "train", subset)

    assert (len(held_out), len(trained)) == (3, 6)
    assert len(rows_of_split(index, "train")) == 12


def test_a_sample_of_a_tar_may_have_none(tmp_path):
    members = {}
    for number, labels in enumerate(([0, 1], [], [1])):
        members[f"{number}.jpg"] = image_bytes(number)
        members[f"{number}.json"] = json.dumps({"labels": labels})
    write_tar(tmp_path / "train-000000.tar", members)

    records = by_key(build_source(WebDatasetDataConfig(path=str(tmp_path))))

    assert [record.labels for record in records.values()] == [(0, 1), NONE, (1,)]
