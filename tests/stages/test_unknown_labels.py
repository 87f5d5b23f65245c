"""Tables with a column for each label and cells that say nothing, from packing to a report on a second store."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import permafrost
from permafrost.config.models import CifarModelConfig
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_CLASS, mark_unknown
from permafrost.evaluation.per_label import best_thresholds
from permafrost.losses.labels import bce_loss, cross_entropy_loss
from permafrost.models.providers import build_model
from permafrost.models.saved import TrainedModel, save_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.index_table import index_table

FINDINGS = ("cyst", "nodule", "streak")
SIDE = 16
TABLE = "table.csv"


def write_table(folder: Path, count: int, seed: int, splits=("train", "val", "test")) -> Path:
    """Write gray pictures whose quadrants are bright by label, and a table with 30 % of empty cells."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        truth = generator.random(3) < 0.4
        pixels = generator.integers(0, 120, (SIDE, SIDE), dtype=np.uint8)
        for label in np.flatnonzero(truth):
            y, x = divmod(int(label), 2)
            pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 110
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        unknown = generator.random(3) < 0.3
        cells = [
            "" if hidden else str(int(has)) for has, hidden in zip(truth, unknown, strict=True)
        ]
        if number == 0:
            cells = ["", "", ""]
        rows.append([f"{number:03}.png", splits[number % len(splits)], *cells])
    table = pd.DataFrame(rows, columns=["path", "split", *FINDINGS])
    table.to_csv(folder / TABLE, index=False)
    return folder / TABLE


def states_of(table: Path) -> dict[str, np.ndarray]:
    """Read the table with pandas: f32 [3] of each key, NaN for an empty cell."""
    rows = pd.read_csv(table)
    keys = rows.path.str.replace(".", "%2E")
    return dict(zip(keys, rows[list(FINDINGS)].to_numpy(np.float32), strict=True))


def data_of(table: Path, **options) -> dict:
    return {
        "kind": "image_table",
        "path": str(table),
        "labels": list(FINDINGS),
        "split": "split",
    } | options


def pack(table: Path, store: Path, *words, **options):
    permafrost.precompute(
        "teacher=none", "executor=serial", *words, store=store, data=data_of(table, **options)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a store of three splits, a pass of a network over it, and a store of a later month."""
    top = tmp_path_factory.mktemp("findings")
    write_table(top / "pictures", 120, 0)
    write_table(top / "later", 30, 1, splits=("new",))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        teacher = {"kind": "cifar", "name": "resnet8", "width": 4, "weights": "random"}
        for name, folder in (("findings", "pictures"), ("month", "later")):
            permafrost.precompute(
                "executor=serial",
                store=f"stores/{name}",
                data=data_of(top / folder / TABLE),
                teacher=teacher,
                **{"explainer.target_classes": "all_gt"},
            )
    return top


@pytest.fixture
def inside(world, monkeypatch, tmp_path):
    """Folder of its own runs, next to the stores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stores").symlink_to(world / "stores")
    return tmp_path


def be_a_student(run: str = "student", seed: int = 0) -> torch.nn.Module:
    """Save an untrained network as the student of a run on the store of findings."""
    torch.manual_seed(seed)
    config = CifarModelConfig(name="resnet8", width=4)
    network = build_model(config, 3)
    store = Store("stores/findings")
    trained = TrainedModel(
        config=config, num_classes=3, classes=FINDINGS, input_size=(SIDE, SIDE),
        teachers=(store.pass_folders()[0].name,),
    )  # fmt: skip
    save_model(RUNS / run / "distill", network, trained)
    from permafrost.runs.folder import save_config

    values = {"store": {"path": "stores/findings"}, "inputs": {"store": store.manifest.fingerprint}}
    save_config(RUNS / run / "distill" / "config.yaml", values)
    return network.eval()


# ---- labels --------------------------------------------------------------------------------------


def test_a_cell_is_yes_no_or_unknown_in_the_index_and_in_batches(world):
    store = Store(world / "stores/findings")
    truth = states_of(world / "pictures" / TABLE)

    assert store.manifest.classes == FINDINGS
    for row in index_table(store).to_pylist():
        states = truth[row["key"]]
        expected = [k if states[k] == 1 else mark_unknown(k) for k in range(3) if states[k] != 0]
        if np.isnan(states).all():
            expected = []
        assert row["labels"] == (expected or ([] if np.isnan(states).all() else [NO_CLASS]))
    records = permafrost.open_store(world / "stores/findings").select("train")
    for batch in permafrost.RecordLoader(records, batch_size=16):
        expected = np.stack([truth[key] for key in batch.keys])
        np.testing.assert_array_equal(batch.labels.numpy(), expected)
    assert list(verify_store(world / "stores/findings")) == []


def test_the_table_of_a_store_lists_labels_and_is_null_where_nothing_is_known(world):
    truth = states_of(world / "pictures" / TABLE)

    rows = permafrost.open_store(world / "stores/findings").table("train").to_pylist()

    for row in rows:
        states = truth[row["key"]]
        known = None if np.isnan(states).all() else np.flatnonzero(states == 1).tolist()
        assert row["labels"] == known


def test_lists_of_states_are_columns_in_one_cell(tmp_path, world):
    table = pd.read_csv(world / "pictures" / TABLE)
    cells = table[list(FINDINGS)].astype(object).where(table[list(FINDINGS)].notna(), None)
    lists = [
        json.dumps([None if cell is None else int(cell) for cell in row]) for row in cells.values
    ]
    table = table[["path", "split"]].assign(findings=lists)
    table.to_csv(world / "pictures" / "lists.csv", index=False)
    (tmp_path / "classes.txt").write_text("\n".join(FINDINGS))
    options = {"labels": "findings", "classes": str(tmp_path / "classes.txt")}

    pack(world / "pictures/lists.csv", tmp_path / "store", **options)

    one, other = (
        index_table(Store(path)) for path in (tmp_path / "store", world / "stores/findings")
    )
    assert one.select(["key", "labels"]).equals(other.select(["key", "labels"]))


@pytest.mark.parametrize("cell", ["2", "0.5", "maybe"])
def test_a_cell_that_says_something_else_is_an_error_with_its_row(tmp_path, cell):
    table = write_table(tmp_path / "pictures", 4, 0)
    rows = pd.read_csv(table, dtype=str)
    rows.loc[2, "nodule"] = cell
    rows.to_csv(table, index=False)

    with pytest.raises(ConfigError, match=rf"row 4, column nodule: '{cell}' is not 1 or 0"):
        pack(table, tmp_path / "store")


def test_bce_of_unknown_cells_is_that_of_weight_zero():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 5, generator=generator, requires_grad=True)
    labels = (torch.rand(16, 5, generator=generator) < 0.4).float()
    labels[torch.rand(16, 5, generator=generator) < 0.3] = torch.nan
    labels[3] = torch.nan
    weights = (~labels.isnan()).float()
    expected = (
        F.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(0), weight=weights, reduction="sum"
        )
        / weights.sum()
    )

    loss = bce_loss(logits, labels)

    torch.testing.assert_close(loss, expected)
    ours, theirs = (
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert not ours[labels.isnan()].any()
    assert ours[3].abs().sum() == 0


def test_a_student_is_trained_like_a_loop_of_ones_own_in_which_unknown_cells_have_weight_zero(
    inside,
):
    options = {"method.loss": "bce", "trainer.epochs": 2, "trainer.batch_size": 8, "seed": 5}
    options |= {"student.name": "resnet8", "student.width": 4, "student.weights": "start.pt"}
    options |= {"optimizer": "sgd", "optimizer.lr": 0.05, "optimizer.momentum": 0.0}
    torch.manual_seed(1)
    start = build_model(CifarModelConfig(name="resnet8", width=4), 3).network
    torch.save(start.state_dict(), "start.pt")
    permafrost.distill(
        "method=labels", "student=cifar", "trainer.schedule=constant", "trainer.warmup_epochs=0",
        "trainer.clip_norm=null", "optimizer.weight_decay=0", "augment=pad_crop_flip",
        run="student", store="stores/findings", **options,
    )  # fmt: skip
    ours = permafrost.load_student("student")

    theirs = build_model(CifarModelConfig(name="resnet8", width=4), 3)
    theirs.network.load_state_dict(start.state_dict())
    theirs.train()
    records = permafrost.open_store("stores/findings").select("train")
    views = permafrost.augmentation("pad_crop_flip")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    loader = permafrost.RecordLoader(records, augment=views, batch_size=8, seed=5, drop_last=True)
    for _ in range(2):
        for batch in loader:
            logits = theirs(batch.images).logits
            weights = (~batch.labels.isnan()).float()
            each = F.binary_cross_entropy_with_logits(
                logits, batch.labels.nan_to_num(0), weight=weights, reduction="sum"
            )
            optimizer.zero_grad()
            (each / weights.sum()).backward()
            optimizer.step()

    for (name, one), (_, other) in zip(
        ours.network.state_dict().items(), theirs.network.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    moved = ours.network.state_dict()["linear.weight"]
    assert not torch.equal(moved, start.state_dict()["linear.weight"])


def test_a_loss_of_one_label_refuses_the_logits_of_a_store_of_many(world):
    records = permafrost.open_store(world / "stores/findings").select("train")
    batch = next(iter(permafrost.RecordLoader(records, batch_size=8)))
    student = torch.randn(8, 3)

    with pytest.raises(ConfigError, match=r"many labels.*use permafrost\.mld_loss"):
        permafrost.kd_loss(student, batch.logits, tau=1.0)
    with pytest.raises(ConfigError, match="compares logits"):
        cross_entropy_loss(student, batch.labels)
    assert permafrost.mld_loss(student, batch.logits, tau=1.0) > 0
    assert permafrost.bce_loss(student, batch.labels) > 0
    for changed in (batch.logits[:4], batch.logits / 2, batch.logits.detach().clone()):
        with pytest.raises(ConfigError, match=r"use permafrost\.mld_loss"):
            permafrost.kd_loss(student[: len(changed)], changed, tau=1.0)
    with pytest.raises(ConfigError, match="compares logits"):
        permafrost.bce_loss(student, batch.logits)
    plain = torch.from_numpy(batch.logits.numpy())
    assert permafrost.kd_loss(student, plain, tau=1.0) > 0  # control: of no loader


# ---- evaluation ----------------------------------------------------------------------------------


def test_thresholds_are_chosen_on_val_and_stored_with_the_run(inside):
    network = be_a_student()
    store = permafrost.open_store("stores/findings")
    (batch,) = permafrost.RecordLoader(store.select("val"), batch_size=99, shuffle=False)
    with torch.no_grad():
        expected = best_thresholds(network(batch.images).logits, batch.labels)

    metrics = permafrost.evaluate(
        "evaluate.threshold=val", store="stores/findings", run="student"
    ).splits["test"]

    chosen = [row["threshold_logit"] for row in metrics["labels"].values()]
    assert chosen == pytest.approx(expected.tolist(), abs=1e-4)
    table = pq.read_table(RUNS / "student/evaluate/records.parquet").to_pylist()
    for row in table:
        assert row["predictions"] == [k for k in range(3) if row["logits"][k] >= chosen[k]]
    with pytest.raises(ConfigError, match=r"evaluate\.threshold=1\.5 must be a probability"):
        permafrost.evaluate("evaluate.threshold=1.5", store="stores/findings", run="student")


def test_a_student_is_evaluated_on_a_second_store_beside_its_own(inside, caplog):
    be_a_student()
    own = permafrost.evaluate("evaluate.threshold=val", store="stores/findings", run="student")
    page = permafrost.report(store="stores/findings", run="student")
    before = Path(page.html).read_bytes()

    with caplog.at_level(logging.INFO):
        other = permafrost.evaluate(
            "evaluate.splits=[new]", "evaluate.threshold=val", store="stores/month", run="student"
        )
    page_elsewhere = permafrost.report(store="stores/month", run="student")

    folder = Path(other.metrics).parent
    assert folder.name.startswith("evaluate-in-month-")
    assert Path(own.metrics).parent.name == "evaluate"
    assert "is not the store that" in caplog.text
    metrics = other.splits["new"]
    assert metrics["agreement"] <= 1  # its teacher has a pass there, which was found
    thresholds = [
        [row["threshold_logit"] for row in splits["labels"].values()]
        for splits in (own.splits["test"], metrics)
    ]
    assert thresholds[0] == pytest.approx(thresholds[1])
    assert Path(page.html).read_bytes() == before
    assert Path(page_elsewhere.html).name.startswith("report-in-month-")
    values = json.loads(Path(page_elsewhere.json).read_text())
    assert values["runs"][0]["f1"] == pytest.approx(metrics["f1"])
    html = Path(page_elsewhere.html).read_text()
    assert "stores/findings, another store" in html
    again = json.loads(
        Path(permafrost.report(store="stores/findings", run="student").json).read_text()
    )
    assert again["runs"][0]["f1"] == pytest.approx(own.splits["test"]["f1"])


def test_a_later_call_keeps_the_thresholds_and_the_teacher_has_its_own(inside, caplog):
    network = be_a_student()
    store = permafrost.open_store("stores/findings")
    (batch,) = permafrost.RecordLoader(store.select("val"), batch_size=99, shuffle=False)
    expected = best_thresholds(torch.from_numpy(batch.logits.numpy()), batch.labels)
    first = permafrost.evaluate("evaluate.threshold=val", store="stores/findings", run="student")
    before = (RUNS / "student/evaluate/records.parquet").read_bytes()

    again = permafrost.evaluate(store="stores/findings", run="student")
    (RUNS / "student/distill/export").mkdir()
    more = permafrost.evaluate(
        "evaluate.splits=[train]", store="stores/findings", run="student"
    ).splits["train"]

    assert again.splits == first.splits
    assert (RUNS / "student/evaluate/records.parquet").read_bytes() == before
    rows = first.splits["test"]["labels"].values()
    assert [row["teacher_threshold_logit"] for row in rows] == pytest.approx(expected.tolist())
    assert {row["threshold"] for row in more["labels"].values()} == {0.5}
    assert "has stored the thresholds of evaluate.threshold=val" in caplog.text
    with pytest.raises(
        ConfigError, match=r"accuracy with evaluate\.threshold=val, but this one has 0\.3"
    ):
        permafrost.evaluate("evaluate.threshold=0.3", store="stores/findings", run="student")
    page = permafrost.report(store="stores/findings", run="student")
    assert "thresholds of val" in Path(page.html).read_text()
    assert network is not None


def test_thresholds_of_another_store_must_have_been_chosen(inside):
    be_a_student()

    with pytest.raises(ConfigError, match=r"choose them first .*evaluate\.threshold=val"):
        permafrost.evaluate(
            "evaluate.splits=[new]", "evaluate.threshold=val", store="stores/month", run="student"
        )
    assert permafrost.evaluate("evaluate.splits=[new]", store="stores/month", run="student").splits


@pytest.mark.slow
def test_the_program_of_an_export_predicts_by_the_stored_thresholds(
    inside, world, capsys, monkeypatch
):
    be_a_student()
    permafrost.evaluate("evaluate.threshold=val", store="stores/findings", run="student")
    made = permafrost.export(store="stores/findings", run="student")
    records = pq.read_table(RUNS / "student/evaluate/records.parquet").to_pylist()
    files = [world / "pictures" / row["key"].replace("%2E", ".") for row in records]
    words = made.next.split()
    assert words[0] == "python"
    monkeypatch.setattr("sys.argv", [*words[1:3], *map(str, files)])

    exec(compile(Path(words[1]).read_text(), words[1], "exec"), {"__name__": "__main__"})

    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, records, strict=True):
        named = [part.split()[0] for part in line.split(" ", 1)[1].split(", ") if part != "none"]
        assert named == [FINDINGS[label] for label in row["predictions"]]
    assert "many" in made.labels


# ---- splits, boxes and shards --------------------------------------------------------------------


def test_rows_without_a_split_are_drawn_and_no_others(tmp_path):
    table = write_table(tmp_path / "pictures", 60, 3)
    rows = pd.read_csv(table, dtype=str)
    rows.loc[10:39, "split"] = None
    rows.to_csv(table, index=False)
    named = dict(zip(rows.path.str.replace(".", "%2E"), rows.split, strict=True))

    with pytest.raises(ConfigError, match=r"row 12, column split: is empty \(30 of all rows\)"):
        pack(table, tmp_path / "a")
    pack(table, tmp_path / "b", test_fraction=0.3)
    names = {"": "later", "train": "train", "val": "val", "test": "test"}
    pack(table, tmp_path / "c", split_names=names)

    for path in ("b", "c"):
        for row in index_table(Store(tmp_path / path)).to_pylist():
            split = named[row["key"]]
            if isinstance(split, str):
                assert row["split"] == split
            else:
                assert row["split"] in (("train", "test") if path == "b" else ("later",))
    drawn = [
        row
        for row in index_table(Store(tmp_path / "b")).to_pylist()
        if not isinstance(named[row["key"]], str)
    ]
    assert {row["split"] for row in drawn} == {"train", "test"}


def test_a_box_without_a_label_is_that_of_the_only_class_or_an_error(tmp_path):
    table = write_table(tmp_path / "pictures", 6, 0)
    rows = pd.read_csv(table, dtype=str)
    rows[list(FINDINGS)] = [["0", "1", ""]] * 6
    rows["boxes"] = json.dumps([{"x0": 1, "y0": 2, "x1": 9, "y1": 10}])
    rows.to_csv(table, index=False)

    pack(table, tmp_path / "a", boxes="boxes")
    boxes = [row["boxes"] for row in index_table(Store(tmp_path / "a")).to_pylist()]
    assert {box["label"] for (box,) in boxes} == {1}
    rows.loc[3, "cyst"] = "1"
    rows.to_csv(table, index=False)
    with pytest.raises(
        ConfigError, match=r"row 5, column boxes: a box without a label .* has 2 of them"
    ):
        permafrost.preview(data=data_of(table, boxes="boxes"))


def test_an_append_keeps_unknown_labels_whatever_the_order_of_the_columns(tmp_path):
    table = write_table(tmp_path / "pictures", 24, 0, splits=("train",))
    pack(table, tmp_path / "a")
    later = write_table(tmp_path / "later", 12, 7, splits=("train",))
    for path in (tmp_path / "later").glob("*.png"):
        path.rename(tmp_path / "pictures" / f"later{path.name}")
    new = pd.read_csv(later, dtype=str)
    new["path"] = "later" + new.path
    new["bus"] = ["1", "0", None] * 4
    old = pd.read_csv(table, dtype=str)
    pd.concat([old, new]).to_csv(table, index=False)
    order = ["streak", "nodule", "cyst", "bus"]

    pack(table, tmp_path / "a", "store.append=true", "store.changed=keep", labels=order)

    store = permafrost.open_store(tmp_path / "a")
    assert Store(tmp_path / "a").manifest.classes == (*FINDINGS, "bus")
    truth = pd.concat([old, new]).set_index("path")[[*FINDINGS, "bus"]].astype(float)
    seen = 0
    for batch in permafrost.RecordLoader(store.select("train"), teacher=(), batch_size=9):
        for key, labels in zip(batch.keys, batch.labels, strict=True):
            expected = truth.loc[key.replace("%2E", ".")].to_numpy(np.float32)
            np.testing.assert_array_equal(labels.numpy(), expected)  # no old record has a bus
            seen += 1
    assert seen == 36


def test_small_splits_have_arrays_of_nearly_their_size(tmp_path):
    table = write_table(tmp_path / "pictures", 400, 3)
    rows = pd.read_csv(table, dtype=str)
    rows["split"] = ["train"] * 292 + ["val"] * 59 + ["test"] * 49
    rows.to_csv(table, index=False)

    pack(table, tmp_path / "a")

    manifest = Store(tmp_path / "a").manifest
    assert len(manifest.shards) * manifest.rows_per_shard <= 1.25 * 400
