"""Features of a pass on fewer channels, and moved with views, against stock readers and computations from the pass."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from permafrost.annotation.feature_projections import ChannelMoments
from permafrost.annotation.lost_variance import LostVariance
from permafrost.annotation.moved_features import sample_views
from permafrost.annotation.pass_identity import fingerprint_pass
from permafrost.annotation.pass_plan import plan_pass
from permafrost.annotation.samples import select_sample
from permafrost.annotation.teacher_fields import project_features, stage_fields
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.methods import FeaturesConfig, SeveralConfig, TeacherTermOptions
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.core.json_entries import EntryError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets, warp, warp_covered
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import build_loss
from permafrost.losses.restored_features import RestoredFeatures, restore_features
from permafrost.models.classifier import Intermediates
from permafrost.models.providers import build_model, freeze
from permafrost.runs.folder import PassRecords
from permafrost.runs.mirrors import RUNS
from permafrost.store.codecs import encode_npy
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import MovedFeatures
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry
from permafrost.store.verification import verify_store
from permafrost.training.build import build_training
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import read_metrics
from permafrost.training.student_passes import with_named_passes
from permafrost_evaluators.options import EquivarianceOptions
from permafrost_papers.e2kd.options import ReviewKDConfig
from permafrost_papers.interpretability.options import FTConfig
from permafrost_report.passes import UsedPass
from permafrost_report.provenance import describe_teachers
from tests.support.batches import FLIP
from tests.support.index_table import index_table
from tests.support.runs import PAD_CROP, distill_config, evaluation_of
from tests.support.signing import file_entry, load, pass_folder, sign
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config, train_dataset
from tests.support.tensors import gaussian
from tests.support.verbs import distill, evaluate, precompute


def store_of(path, teacher, backend="zarr", outputs=("logits", "features"), **features):
    values = {"channels": 3, "dtype": "float16", "mirror": True, **features}
    options = PassOptions(
        batch_size=8, outputs=outputs, **{f"features_{n}": each for n, each in values.items()}
    )
    config = precompute_config(path, teacher, annotate=options, backend=backend)
    precompute.run(config)
    return Frozen(Store(path), config)


@pytest.fixture(scope="module")
def projected(tmp_path_factory, tiny_teacher):
    """Store whose pass has three components of the 4, 8 and 16 channels of each stage."""
    return store_of(tmp_path_factory.mktemp("projected") / "store", tiny_teacher)


def pass_of(frozen):
    return frozen.store.open_passes()[0]


# ---- fit -------------------------------------------------------------------------------------------


def test_components_are_those_of_a_singular_value_decomposition():
    features = gaussian(0, 6, 5, 2, 3) * torch.arange(1, 6).reshape(1, 5, 1, 1)
    moments = ChannelMoments(5)
    moments.add(features[:2])
    moments.add(features[2:])

    found = moments.fit(2)

    cells = features.transpose(0, 1).flatten(1).T.numpy()
    centered = cells - cells.mean(axis=0)
    _, values, vectors = np.linalg.svd(centered, full_matrices=False)
    variances = values**2 / len(cells)
    assert found.mean == pytest.approx(cells.mean(axis=0), rel=1e-5, abs=1e-6)
    assert found.variances == pytest.approx(variances[:2], rel=1e-5)
    assert found.kept_share == pytest.approx(variances[:2].sum() / variances.sum())
    assert np.abs(found.components @ vectors[:2].T) == pytest.approx(np.eye(2), abs=1e-5)
    largest = np.abs(found.components).argmax(axis=1)
    assert (found.components[[0, 1], largest] > 0).all()


def test_features_of_as_many_directions_as_components_come_back():
    directions, weights = gaussian(0, 2, 7).float(), gaussian(1, 4, 2, 3, 3).float()
    features = torch.einsum("kc,nkhw->nchw", directions, weights) + 2
    moments = ChannelMoments(7)
    moments.add(features)
    found = moments.fit(2)

    mean, components = torch.from_numpy(found.mean), torch.from_numpy(found.components)
    restored = restore_features(project_features(features, found), mean, components)

    assert found.kept_share == pytest.approx(1.0)
    torch.testing.assert_close(restored, features, rtol=1e-4, atol=1e-4)


# ---- pass ------------------------------------------------------------------------------------------


def test_a_stock_reader_rebuilds_the_features_and_the_share_that_is_kept(projected, tiny_teacher):
    """The share is recomputed from the live network on the records of the fit and their flipped images."""
    made = pass_of(projected)
    group = zarr.open_group(str(made.folder / "fields.zarr"), mode="r")
    network = freeze(build_model(tiny_teacher, 10))
    dataset = train_dataset(projected, None)
    images = view_images(dataset.__getitems__(list(range(40))), (16, 16))
    rows = index_table(projected.store)["array_row"].to_numpy()[
        list(rows_of_split(projected.store.index, "train"))
    ]
    both = [
        stage_fields(network(sides, Intermediates(stages=True)))
        for sides in (images, images.flip(-1))
    ]

    for number, channels in ((1, 4), (2, 8), (3, 16)):
        name = f"features_{number}"
        entry = made.manifest.projections[name]
        file = np.load(str(made.folder / entry.file.path))
        mean, components = file[0, :-1], file[1:, :-1]
        stored = group[name][:][rows, 0].astype(np.float32)  # [n, mirror, component, y, x]
        stored = stored * group[f"{name}_scale"][:][rows, 0][..., None, None]
        rebuilt = np.einsum("kc,nmkhw->nmchw", components, stored) + mean[:, None, None]

        computed = torch.stack([fields[name] for fields in both], dim=1).numpy()
        assert file.shape == (4, channels + 1)
        assert entry.channels == channels
        assert group[name].metadata.dimension_names[2:] == ("mirror", "component", "y", "x")
        lost = ((rebuilt - computed) ** 2).sum() / (
            (computed - computed.mean(axis=(0, 1, 3, 4))[:, None, None]) ** 2
        ).sum()
        assert 1 - lost == pytest.approx(entry.kept, abs=1e-4)
        assert entry.kept < 1
        assert file[1:, -1].sum() / file[0, -1] == pytest.approx(entry.kept, abs=1e-5)


@pytest.mark.slow
def test_stages_of_few_channels_are_stored_whole_and_the_files_are_always_the_same(
    tmp_path, tiny_teacher, projected
):
    some = store_of(tmp_path / "some", tiny_teacher, channels=8)
    again = store_of(tmp_path / "again", tiny_teacher, backend="webdataset")

    assert list(pass_of(some).manifest.projections) == ["features_3"]
    assert pass_of(again).manifest.projections == pass_of(projected).manifest.projections
    assert list(verify_store(again.store.path)) == []


def test_the_number_of_channels_and_the_split_are_part_of_the_identity(projected):
    config, store = projected.config, projected.store

    def fingerprint(split="train", **options):
        annotate = replace(config.annotate, **options)
        return plan_pass(replace(config, annotate=annotate, split=split), store).fingerprint

    whole = plan_pass(
        replace(config, annotate=replace(config.annotate, features_channels=None)), store
    )
    prints = [fingerprint(), fingerprint(features_channels=2), fingerprint(split="test")]
    assert len({*prints, whole.fingerprint}) == 4
    assert not {"projection", "features_channels"} & whole.description.keys()
    with pytest.raises(ConfigError, match=r"records of split=val, but the store has none"):
        precompute.run(replace(config, split="val"))


def test_a_lost_projection_is_fitted_again_and_a_damaged_one_is_refused(tmp_path, tiny_teacher):
    frozen = store_of(tmp_path / "store", tiny_teacher, channels=8)
    made = pass_of(frozen)
    path = (
        frozen.store.path
        / "teachers"
        / made.name
        / made.manifest.projections["features_3"].file.path
    )
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(ManifestError, match=r"features_3\.npy is missing"):
        _ = made.projections

    precompute.run(frozen.config)
    assert path.read_bytes() == data
    assert pass_of(frozen).projections["features_3"].components.shape == (8, 16)

    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ManifestError, match="is damaged"):
        _ = pass_of(frozen).projections
    assert any(
        "features_3.npy has sha256" in problem for problem in verify_store(frozen.store.path)
    )


def test_the_evaluator_and_the_manifest_compare_components(projected):
    flip = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))

    metrics = evaluate.run(
        evaluation_of(
            projected,
            ("equivariance",),
            model="teacher",
            teacher=projected.config.teacher,
            augment=flip,
            splits=("train",),
            equivariance=EquivarianceOptions(records=16),
        )
    ).splits["train"]["equivariance"]

    assert metrics["features_lost"]["horizontal_flip"] < 1e-4
    moved = pass_of(projected).manifest.moved_features.lost
    assert all(views["flip"] < 1e-4 < 1e-2 < views["shift"] for views in moved.values())


# ---- students --------------------------------------------------------------------------------------


def test_restored_features_are_moved_alike(projected):
    """Moving is linear, so components and channels may be moved in either order."""
    batch = train_dataset(projected, "features").__getitems__(list(range(8)))
    view = torch.eye(3).repeat(8, 1, 1)
    view[:, 0, 2] = 0.25
    restored = RestoredFeatures(projected.store.open_passes())
    still, moved = (
        view_targets(
            replace(batch, canonical_from_view=each), TargetRequest((1, 1), with_maps=False)
        )[0]
        for each in (None, view)
    )

    found = restored(moved).intermediates["features_3"]

    (stored,) = batch.targets
    whole = restored(still).intermediates["features_3"]
    expected, _ = warp_covered(whole, stored.map_from_canonical @ view, (4, 4))
    assert found.shape == (8, 16, 4, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert restored.state_dict() == {}


@pytest.mark.parametrize(
    ("method", "channels"),
    [
        slow(FeaturesConfig(stages=(-1,)), 3),
        (FeaturesConfig(stages=(-1,), standardize="phi_s"), 16),
        (ReviewKDConfig(), (4, 8, 16)),
        slow(FTConfig(lambda_ft=1.0), 16),
    ],
    ids=["features", "standardized", "review_kd", "ft"],
)
def test_students_learn_from_components_or_from_restored_channels(projected, method, channels):
    config = with_named_passes(
        distill_config(projected, method=method), projected.store, PassRecords([])
    )
    spec = StudentPlan(config, RUNS / "one" / "distill").spec()
    loss = build_training(spec, spec.loss.distributed).loss
    distill.run(distill_config(projected, method=method))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    if isinstance(method, FeaturesConfig):
        assert loss.maps[0].out_channels == channels
    elif isinstance(channels, int):
        assert loss.reconstruction[-2].out_channels == channels
    else:
        expanded = [fusion.expand[0].out_channels for fusion in loss.fusions]
        assert expanded == [*channels, 16]


def test_each_term_of_several_gets_the_form_that_it_compares(projected):
    (name,) = (folder.name for folder in projected.store.pass_folders())
    terms = [
        TeacherTermOptions(teacher=name, method=method)
        for method in (FeaturesConfig(stages=(-1,)), ReviewKDConfig())
    ]

    distill.run(distill_config(projected, method=SeveralConfig(terms=tuple(terms))))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    assert build_loss(FeaturesConfig()).restored is None


def hostile_projections(data):
    """Files in place of a projection float32 [4, 9], and what is said of each."""
    values = np.load(io.BytesIO(data))
    zipped = io.BytesIO()
    np.savez(zipped, values)
    with_nan = values.copy()
    with_nan[2, 3] = np.nan
    yield data.replace(b"(4, 9)", b"(99999999999999999999, 9)"), "is not a projection"
    yield zipped.getvalue(), "it holds several arrays"
    yield encode_npy(values.T), r"its shape is \(9, 4\)"
    yield encode_npy(values[:, :-1]), r"its shape is \(4, 8\)"
    yield encode_npy(values[:-1]), r"its shape is \(3, 9\)"
    yield encode_npy(values.astype(np.float64)), "it is float64"
    yield encode_npy(with_nan), "not finite"


def test_a_signed_projection_that_does_not_fit_its_field_is_one_line(projected, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(projected.store.path, store)
    folder = pass_folder(store)
    manifest = load(folder)
    path = manifest["projections"]["features_2"]["file"]["path"]

    for data, reason in hostile_projections((folder / path).read_bytes()):
        (folder / path).write_bytes(data)
        entry = {n: v for n, v in file_entry(folder, path).items() if n != "crc32c"}
        manifest["projections"]["features_2"]["file"] |= entry
        sign(folder, manifest)
        with pytest.raises(ManifestError, match=rf"features_2\.npy .*{reason}.*; ") as error:
            _ = Store(store).open_passes()[0].projections
        assert [line for line in verify_store(store) if "features_2.npy" in line] == [
            str(error.value)
        ]


def features_pass(path, teacher, **options):
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
    _, store, made = features_pass(tmp_path / "store", tiny_teacher, features_mirror=mirror)
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
    config, store, made = features_pass(tmp_path / "store", tiny_teacher)
    plan = plan_pass(config, store)
    folder = store.path / "teachers" / made.name
    text = (folder / "manifest.json").read_text()
    assert plan.fingerprint == fingerprint_pass(plan.description) == made.manifest.fingerprint
    assert "moved_features" not in plan.description

    (folder / made.shards[0].files[0].path).unlink()
    precompute.run(config)

    assert (folder / "manifest.json").read_text() == text
    moved = json.loads(text)["moved_features"]
    _, _, other = features_pass(tmp_path / "other", tiny_teacher, backend="webdataset")
    assert other.manifest.moved_features == MovedFeatures(**moved)


def test_passes_without_moved_features_have_no_entry(tmp_path, tiny_teacher):
    views = {"views": RandomViewsConfig(count=2), "augment": PAD_CROP}
    _, store, made = features_pass(tmp_path / "store", tiny_teacher, **views)
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
    _, _, made = features_pass(tmp_path / "s", tiny_teacher)
    assert made.manifest.moved_features is not None
    assert len(built) == 2


def test_a_teacher_of_center_crops_and_pooled_grids_is_measured_too(tmp_path, tiny_teacher):
    teacher = replace(tiny_teacher, frame="center_crop")

    _, _, made = features_pass(tmp_path / "store", teacher, features_size=4)

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
