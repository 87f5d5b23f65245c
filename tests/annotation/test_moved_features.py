"""Error of moved features in a pass's manifest, against a computation from the published pass."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from permafrost.annotation.lost_variance import LostVariance
from permafrost.annotation.moved_features import sample_views
from permafrost.annotation.pass_identity import fingerprint_pass
from permafrost.annotation.pass_plan import plan_pass
from permafrost.annotation.samples import select_sample
from permafrost.annotation.teacher_fields import stage_fields
from permafrost.config.augment import RandomViewsConfig
from permafrost.config.store import PassOptions
from permafrost.core.json_entries import EntryError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets, warp
from permafrost.models.classifier import Intermediates
from permafrost.models.providers import build_model, freeze
from permafrost.store.manifest import MovedFeatures
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry
from permafrost_report.passes import UsedPass
from permafrost_report.provenance import describe_teachers
from tests.support.batches import FLIP
from tests.support.index_table import index_table
from tests.support.runs import PAD_CROP
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.tensors import gaussian
from tests.support.verbs import precompute


def pass_of(path, teacher, **options):
    features = {name: options.pop(name) for name in list(options) if name.startswith("features_")}
    annotate = PassOptions(batch_size=8, outputs=("logits", "features"), **features)
    config = precompute_config(path, teacher, annotate=annotate, **options)
    precompute.run(config)
    store = Store(path)
    return config, store, store.open_passes()[0]


def recomputed(store, made, teacher):
    """1 - R^2 by field and view, from the stored arrays of all records and the live teacher."""
    dataset = StoreDataset(store, np.arange(len(index_table(store))), [made], output="features")
    network = freeze(build_model(teacher, 10))
    sample = select_sample(store.shards, 128)
    rows = [
        row
        for shard, count in sample
        for row in list(store.rows_of_shard(store.shards.number_of(shard.name)))[:count]
    ]
    batch = dataset.__getitems__(rows)
    lost: dict[str, dict[str, float]] = {}
    for name, view in sample_views(len(rows), store.size).items():
        seen = replace(batch, canonical_from_view=view)
        (targets,) = view_targets(seen, TargetRequest((1, 1), with_maps=False))
        output = network(view_images(seen, store.size), Intermediates(stages=True))
        for field, values in stage_fields(output).items():
            if values.dim() == 4:
                stored, coverage = targets.intermediates[field], targets.coverage[field]
                mean = (values * coverage).sum((0, 2, 3)) / coverage.sum()
                spread = ((values - mean[:, None, None]).square() * coverage).sum()
                error = ((stored - values).square() * coverage).sum()
                lost.setdefault(field, {})[name] = float(error / spread)
    return len(rows), lost


@pytest.mark.parametrize("mirror", [True, slow(False)])
def test_the_manifest_says_what_shifts_and_flips_lose(tmp_path, tiny_teacher, mirror, caplog):
    caplog.set_level("INFO", "permafrost.precompute")
    _, store, made = pass_of(tmp_path / "store", tiny_teacher, features_mirror=mirror)
    moved = made.manifest.moved_features

    count, expected = recomputed(store, made, tiny_teacher)

    assert moved.records == count == 72
    assert list(moved.lost) == ["features_1", "features_2", "features_3"]
    for field, views in moved.lost.items():
        assert views.keys() == {"shift", "flip"}
        assert views == pytest.approx(expected[field], rel=1e-3, abs=2e-6)
        assert 0.01 < views["shift"] < 1
        assert views["flip"] < 1e-3 if mirror else views["flip"] > 0.05
    assert "warped with a view, features miss of the teacher's variance: features_1" in caplog.text
    (facts,) = describe_teachers([UsedPass(made, ())])
    assert "in a sample of 72 records" in facts["Variance that moved features miss"]


@pytest.mark.slow
def test_it_is_no_part_of_the_identity_and_stays_with_the_backend_and_a_repair(
    tmp_path, tiny_teacher
):
    config, store, made = pass_of(tmp_path / "store", tiny_teacher)
    plan = plan_pass(config, store)
    folder = store.path / "teachers" / made.name
    text = (folder / "manifest.json").read_text()
    assert plan.fingerprint == fingerprint_pass(plan.description) == made.manifest.fingerprint
    assert "moved_features" not in plan.description

    (folder / made.shards[0].files[0].path).unlink()
    precompute.run(config)

    assert (folder / "manifest.json").read_text() == text
    moved = json.loads(text)["moved_features"]
    _, _, other = pass_of(tmp_path / "other", tiny_teacher, backend="webdataset")
    assert other.manifest.moved_features == MovedFeatures(**moved)


def test_passes_without_moved_features_have_no_entry(tmp_path, tiny_teacher):
    views = {"views": RandomViewsConfig(count=2), "augment": PAD_CROP}
    _, store, made = pass_of(tmp_path / "store", tiny_teacher, **views)
    (replayed,) = store.open_passes(stored_views=True)

    assert made.manifest.moved_features is not None
    assert replayed.manifest.moved_features is None


def test_the_tasks_of_a_pass_share_a_network(tmp_path, tiny_teacher, monkeypatch):
    # The driver builds one for the shapes of the fields. The check, the sample and the shards share another one.
    built: list[str] = []

    def build(teacher, classes, **options):
        built.append(teacher.name)
        return build_model(teacher, classes, **options)

    monkeypatch.setattr("permafrost.annotation.annotator.build_model", build)
    _, _, made = pass_of(tmp_path / "s", tiny_teacher)
    assert made.manifest.moved_features is not None
    assert len(built) == 2


def test_a_teacher_of_center_crops_and_pooled_grids_is_measured_too(tmp_path, tiny_teacher):
    teacher = replace(tiny_teacher, frame="center_crop")

    _, _, made = pass_of(tmp_path / "store", teacher, features_size=4)

    assert all(
        share > 0
        for views in made.manifest.moved_features.lost.values()
        for share in views.values()
    )


def test_views_of_a_record_do_not_depend_on_the_batch():
    size = (32, 48)
    whole, parts = sample_views(9, size), [sample_views(4, size), sample_views(5, size, first=4)]

    for name, views in whole.items():
        assert torch.equal(views, torch.cat([part[name] for part in parts]))
    assert torch.equal(whole["flip"], FLIP.expand(9, 3, 3))


@pytest.mark.parametrize(("size", "largest"), [((32, 32), 4), ((16, 48), 2), ((7, 7), 1)])
def test_shifts_are_the_whole_pixels_of_pad_crop(size, largest):
    views = sample_views(600, size)["shift"]
    frame = torch.arange(size[0] * size[1]).float().reshape(1, 1, *size) + 1

    shifted = warp(frame.expand(600, 1, *size), views, size)

    pixels = views[:, :2, 2] * torch.tensor([size[1], size[0]]) / 2
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-5)
    numbers, counts = pixels.round().unique(return_counts=True)
    assert numbers.tolist() == list(range(-largest, largest + 1))
    assert counts.min() > 0.7 * counts.max()
    torch.testing.assert_close(shifted, shifted.round(), rtol=0, atol=1e-2)  # nothing is blurred


def test_the_lost_share_by_hand():
    """Features 1 and 3 in a cell, of which the second is missed by 1, and one cell of no coverage."""
    computed = torch.tensor([1.0, 3.0, 50.0]).reshape(1, 1, 1, 3)
    stored = torch.tensor([1.0, 2.0, -70.0]).reshape(1, 1, 1, 3)
    coverage = torch.tensor([1.0, 1.0, 0.0]).reshape(1, 1, 1, 3)
    variance = LostVariance()
    variance.add(stored, computed, coverage)
    assert variance.share() == pytest.approx(1 / 2)

    constant, same = LostVariance(), gaussian(0, 2, 3, 1, 1)
    constant.add(same[:1], same[:1], torch.ones(1, 1, 1, 1))
    assert constant.share() == 0


def test_samples_are_spread_over_filled_shards():
    def shard(number, records):
        return ShardEntry(
            name=f"s{number}",
            split="train",
            records=records,
            path=f"images/s{number}.tar",
            bytes=0,
            sha256="0" * 64,
            keys_sha256="0" * 64,
        )

    shards = [shard(n, 0 if n % 2 else 20) for n in range(40)]

    chosen = select_sample(shards, 64)

    assert [count for _, count in chosen] == [8] * 8
    assert (chosen[0][0].name, chosen[-1][0].name) == ("s0", "s38")
    assert select_sample([shard(0, 0)], 64) == []


def test_an_entry_that_is_no_share_is_refused():
    with pytest.raises(EntryError, match="moved_features are"):
        MovedFeatures(records=1, lost={"features_1": {"flip": float("nan")}})
