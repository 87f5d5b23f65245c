"""Whole features of a pass: their forms, how they are warped with a view, and ReviewKD on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from permafrost.annotation.teacher_fields import stage_fields
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.store import PassOptions
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import (
    TargetRequest,
    decode_intermediates,
    shows_mirror_image,
    view_images,
    view_targets,
)
from permafrost.loading.loader import TrainLoader
from permafrost.losses.base import StudentOutput, build_loss
from permafrost.losses.feature_kd import covered_mse, covered_pool
from permafrost.models.classifier import Intermediates
from permafrost.models.providers import build_model, freeze
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.metric_log import read_metrics
from permafrost_papers.e2kd.options import ReviewKDConfig
from permafrost_papers.e2kd.review_kd import hierarchical_context_loss
from permafrost_papers.interpretability.ft import factor_loss, last_stage, last_stage_fields
from permafrost_papers.interpretability.options import FTConfig
from tests.support.batches import FLIP
from tests.support.runs import distill_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config, train_dataset
from tests.support.verbs import distill, precompute

STAGES = Intermediates(stages=True)
GRIDS = {"features_1": (4, 16, 16), "features_2": (8, 8, 8), "features_3": (16, 4, 4)}


def store_of(path, teacher, backend="zarr", views=None, **features):
    options = PassOptions(
        batch_size=8,
        outputs=("logits", "features"),
        **{f"features_{name}": value for name, value in {"mirror": False, **features}.items()},
    )
    config = precompute_config(path, teacher, annotate=options, backend=backend, **(views or {}))
    precompute.run(config)
    return Frozen(Store(path), config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_teacher):
    """Store whose pass has the features of all stages as float16."""
    return store_of(tmp_path_factory.mktemp("plain") / "store", tiny_teacher, dtype="float16")


@pytest.fixture(scope="module")
def framed(tmp_path_factory, tiny_teacher):
    """Store whose pass has the features of images and flipped images with a border of one cell in four."""
    path = tmp_path_factory.mktemp("framed") / "store"
    return store_of(path, tiny_teacher, dtype="float16", mirror=True, margin=0.25)


def shift(x, y=0.0):
    matrix = torch.eye(3)
    matrix[:2, 2] = torch.tensor([x, y])
    return matrix


def batch_of(frozen, view=None):
    """First eight training records, all under one view."""
    batch = train_dataset(frozen, "features").__getitems__(list(range(8)))
    return replace(
        batch, canonical_from_view=None if view is None else view.repeat(len(batch.keys), 1, 1)
    )


def live_fields(frozen, batch):
    model = freeze(build_model(frozen.config.teacher, 10))
    return stage_fields(model(view_images(batch, (16, 16)), STAGES))


def features_of(frozen, view=None, control="none"):
    (targets,) = view_targets(batch_of(frozen, view), TargetRequest((4, 4), control))
    return targets


def lost_variance(found, wanted):
    return float((found - wanted).square().sum() / (wanted - wanted.mean()).square().sum())


# ---- contents of a pass --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        ("float16", "zarr"),
        slow("int8", "webdataset"),
        pytest.param("float16", "webdataset", marks=pytest.mark.slow),
        pytest.param("int8", "zarr", marks=pytest.mark.slow),
    ],
)
def test_a_pass_has_the_features_of_each_stage_in_the_teachers_units(
    tmp_path, tiny_teacher, backend, dtype
):
    store = store_of(tmp_path / "store", tiny_teacher, backend, dtype=dtype)
    (teacher,) = store.store.open_passes()
    specs = {spec.name: spec for spec in teacher.manifest.fields}

    batch = batch_of(store)
    stored, live = decode_intermediates(batch.targets[0]), live_fields(store, batch)

    assert teacher.fields_of("features") == [*GRIDS, "features_pooled"]
    assert list(stored) == list(live)
    for name, grid in GRIDS.items():
        assert (specs[name].shape, specs[name].dtype) == (grid, dtype)
        assert specs[f"{name}_scale"].shape == grid[:1]
        largest = live[name].abs().amax(dim=(2, 3), keepdim=True)
        step = 1 / 127 if dtype == "int8" else 1e-3
        assert ((stored[name] - live[name]).abs() <= 0.51 * step * largest + 1e-6).all()
        assert teacher.manifest.fidelity[name] > 0.999
    assert (stored["features_pooled"] - live["features_pooled"]).abs().max() < 1e-3
    assert list(verify_store(store.store.path)) == []


def test_stages_are_chosen_and_pooled(tmp_path, tiny_teacher):
    store = store_of(tmp_path / "store", tiny_teacher, stages=(-1, -2), size=4)

    (teacher,) = store.store.open_passes()

    shapes = {s.name: s.shape for s in teacher.manifest.fields if not s.name.endswith("_scale")}
    assert shapes == {
        "logits": (10,),
        "features_2": (8, 4, 4),
        "features_3": (16, 4, 4),
        "features_pooled": (16,),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (4,)}, r"features_stages=\[4\]: the teacher has 3 stages"),
        ({"stages": (1, -1)}, r"annotate\.features_stages must list stages from 1"),
        ({"margin": 0.125}, r"features_margin=0\.125 is not whole cells of features_3.*\(1/4\)"),
    ],
)
def test_forms_that_the_teacher_does_not_have_are_refused(tmp_path, tiny_teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        store_of(tmp_path / "store", tiny_teacher, **options)


# ---- views ---------------------------------------------------------------------------------------


def test_the_canonical_view_has_the_stored_features_and_covers_all_of_them(plain):
    targets = features_of(plain)

    stored = decode_intermediates(batch_of(plain).targets[0])

    assert targets.coverage == {}
    for name, values in targets.intermediates.items():
        assert torch.equal(values, stored[name])


def test_a_view_that_reaches_beyond_the_frame_is_covered_where_the_frame_is(plain):
    targets = features_of(plain, shift(0.5))  # by a quarter of the frame

    stored = decode_intermediates(batch_of(plain).targets[0])

    for name, (_, _, width) in GRIDS.items():
        cells = width // 4
        found, covered = targets.intermediates[name], targets.coverage[name]
        assert covered.shape == (8, 1, *found.shape[-2:])
        assert torch.equal(
            covered, (torch.arange(width) < width - cells).expand_as(covered).float()
        )
        torch.testing.assert_close(
            found[..., :-cells], stored[name][..., cells:], rtol=1e-4, atol=1e-4
        )
        # Continued at the border, not zero, so that no edge appears where nothing is compared.
        torch.testing.assert_close(found[..., -1], stored[name][..., -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(targets.intermediates["features_pooled"], stored["features_pooled"])
    assert "features_pooled" not in targets.coverage


def test_a_flip_reads_the_features_of_the_mirror_image(plain, framed):
    batch = batch_of(framed, FLIP)
    live = live_fields(framed, batch)

    exact, moved = (features_of(each, FLIP).intermediates for each in (framed, plain))

    torch.testing.assert_close(
        exact["features_pooled"], mirrored_pooled(framed), rtol=1e-3, atol=1e-3
    )
    # A control: features that are flipped themselves are not those of the flipped image.
    assert lost_variance(moved["features_3"], live["features_3"]) > 0.2
    inner = (..., slice(4, -4), slice(4, -4))  # the border itself changes cells close to it
    errors = [
        lost_variance(fields["features_1"][inner], live["features_1"][inner])
        for fields in (exact, moved)
    ]
    assert errors[0] < 0.5 * errors[1]


def mirrored_pooled(frozen):
    """Average of the last stage over the image itself, for flipped images with the border."""
    frames = torch.nn.functional.pad(batch_of(frozen).inputs.flip(-1), (4, 4, 4, 4)).float() / 255
    model = freeze(build_model(frozen.config.teacher, 10))
    return model(frames, STAGES).stages[-1].output[..., 1:-1, 1:-1].mean(dim=(2, 3))


@pytest.mark.slow
def test_mirror_images_without_a_border_give_the_live_features_of_a_flip(tmp_path, tiny_teacher):
    store = store_of(tmp_path / "store", tiny_teacher, dtype="float16", mirror=True)
    live = live_fields(store, batch_of(store, FLIP))

    found = features_of(store, FLIP)

    for name, values in found.intermediates.items():
        assert lost_variance(values, live[name]) < 1e-5
    assert all(covered.eq(1).all() for covered in found.coverage.values())


def test_a_border_is_cut_off_in_the_canonical_view_and_covers_a_shift(framed):
    stored = decode_intermediates(batch_of(framed).targets[0])

    still, moved = (features_of(framed, view) for view in (None, shift(0.5, -0.5)))

    for name, (_, _, width) in GRIDS.items():
        cells = width // 4
        whole = stored[name][:, 0]
        assert whole.shape[-1] == width + 2 * cells
        torch.testing.assert_close(
            still.intermediates[name], whole[..., cells:-cells, cells:-cells], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            moved.intermediates[name], whole[..., :width, 2 * cells :], rtol=1e-4, atol=1e-4
        )
        assert moved.coverage[name].eq(1).all()


def test_views_that_turn_the_image_inside_out_are_told_from_rotations():
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    upright = torch.diag(torch.tensor([1.0, -1.0, 1.0]))

    views = torch.stack([torch.eye(3), FLIP, half_turn, upright, FLIP @ shift(0.3)])

    assert shows_mirror_image(views).tolist() == [False, True, False, True, True]


def test_controls_change_features(plain):
    stored = decode_intermediates(batch_of(plain).targets[0])

    still = features_of(plain, shift(0.5), "unaugmented")
    others = features_of(plain, None, "shuffled")

    for name, values in stored.items():
        assert torch.equal(still.intermediates[name], values)
        assert torch.equal(others.intermediates[name], values.roll(1, dims=0))
    assert still.coverage == {}


@pytest.mark.slow
def test_features_of_stored_views_are_those_of_a_live_teacher(tmp_path, tiny_teacher):
    operations = (
        OperationConfig(kind="pad_crop", padding=4),
        OperationConfig(kind="horizontal_flip"),
    )
    views = {
        "views": RandomViewsConfig(count=2, seed=1),
        "augment": AugmentOptions(operations=operations),
    }
    store = store_of(
        tmp_path / "store", tiny_teacher, views=views, dtype="float16", mirror=True, margin=0.25
    )
    dataset = train_dataset(store, "features", stored_views=True)
    batch = next(TrainLoader(dataset, None, batch_size=16, seed=0).epoch(0))

    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    assert targets.coverage == {}
    for name, live in live_fields(store, batch).items():
        assert lost_variance(targets.intermediates[name], live) < 1e-5


# ---- losses --------------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cells_outside_count_nothing():
    student, teacher = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1)
    coverage = torch.ones(2, 1, 8, 8, dtype=torch.float64)
    coverage[0, :, :, 5:] = 0
    coverage[1, :, :3] = 0
    outside = coverage.expand_as(student) == 0

    losses = [
        hierarchical_context_loss(own, taught, coverage).item()
        for own, taught in (
            (student, teacher),
            (student.masked_fill(outside, 1e3), teacher),
            (student, teacher.masked_fill(outside, -1e3)),
        )
    ]

    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2])
    assert hierarchical_context_loss(student.masked_fill(outside, 1e3), teacher) > 10 * losses[0]


def test_full_coverage_is_no_coverage():
    student, teacher = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1)
    everything = torch.ones(2, 1, 8, 8, dtype=torch.float64)

    found = hierarchical_context_loss(student, teacher, everything)

    assert found.item() == pytest.approx(hierarchical_context_loss(student, teacher).item())


def test_means_are_weighted_by_the_covered_share():
    student = torch.tensor([[[[1.0, 3.0], [5.0, 0.0]]]])
    coverage = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]])

    assert covered_mse(student, torch.zeros_like(student), coverage).item() == pytest.approx(
        (1 + 0.5 * 9) / 1.5
    )
    assert covered_pool(student, coverage, 1).item() == pytest.approx((1 + 0.5 * 3) / 1.5)
    assert covered_mse(student, student - 1, torch.zeros_like(coverage)).item() == 0


def review_terms(frozen, batch, targets):
    """Value of ReviewKD's own term for one student."""
    torch.manual_seed(0)
    student = build_model(replace(frozen.config.teacher, weights=None), 10)
    output = student.eval()(view_images(batch, (16, 16)), STAGES)
    loss = build_loss(ReviewKDConfig())
    loss.build(StudentOutput(output=output), targets)
    return loss.eval().compare(StudentOutput(output=output), targets).item()


@pytest.mark.parametrize("view", [slow(None), FLIP], ids=["canonical", "flip"])
def test_frozen_review_is_live_review_where_the_features_are_exact(tmp_path, tiny_teacher, view):
    store = store_of(tmp_path / "store", tiny_teacher, dtype="float16", mirror=True)
    batch = batch_of(store, view)
    frozen = features_of(store, view)
    live = Targets(teacher="live", logits=frozen.logits, intermediates=live_fields(store, batch))

    found, wanted = (review_terms(store, batch, targets) for targets in (frozen, live))

    assert wanted > 0.1
    assert found == pytest.approx(wanted, rel=2e-3)


def test_factor_transfer_reads_the_output_of_the_last_stage(plain):
    batch = batch_of(plain)
    model = freeze(build_model(plain.config.teacher, 10))
    live = last_stage_fields(model(view_images(batch, (16, 16)), STAGES))["ft"]

    stored, coverage = last_stage(features_of(plain))
    shifted, partly = last_stage(features_of(plain, shift(0.5)))

    assert coverage is None
    assert (live == 0).any()
    assert (stored >= 0).all()
    assert lost_variance(stored, live) < 1e-5
    assert 0 < partly.mean() < 1
    student = draw(8, 16, 4, 4).float()
    outside = (partly == 0).expand_as(shifted)
    assert factor_loss(student, shifted, partly).item() == pytest.approx(
        factor_loss(student, shifted.masked_fill(outside, 50.0), partly).item()
    )
    everything = torch.ones_like(partly)
    assert factor_loss(student, stored, everything).item() == pytest.approx(
        factor_loss(student, live).item(), rel=1e-3
    )


METHODS = {"review_kd": ReviewKDConfig(), "ft": FTConfig()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "replay"])
@pytest.mark.parametrize("method", ["review_kd", "ft"])
def test_a_student_learns_from_stored_features(tmp_path, tiny_teacher, mode, method):
    views = {
        "views": RandomViewsConfig(count=2, seed=1),
        "augment": AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),)),
    }
    store = store_of(tmp_path / "store", tiny_teacher, views=views, mirror=True)
    options = {"views": views["views"]} if mode == "replay" else {}

    distill.run(distill_config(store, method=METHODS[method], mode=mode, **options))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]


def test_stages_that_are_not_stored_are_refused(tmp_path, tiny_teacher, frozen):
    few = store_of(tmp_path / "store", tiny_teacher, stages=(2, 3))

    with pytest.raises(
        ConfigError, match=r"targets have the teacher's 2, 3; name the stages.*method\.stages"
    ):
        distill.run(distill_config(few, method=ReviewKDConfig()))
    with pytest.raises(ConfigError, match=r"method\.stages=\[1\]: the targets have stages 2, 3"):
        distill.run(distill_config(few, run="one", method=ReviewKDConfig(stages=(1,))))
    with pytest.raises(ConfigError, match=r"method\.stages=\[4\]: .* name stages that both have"):
        distill.run(distill_config(few, run="four", method=ReviewKDConfig(stages=(4,))))
    distill.run(distill_config(few, run="two", method=ReviewKDConfig(stages=(-1, -2))))
    with pytest.raises(StoreMismatchError, match="no output features, but method=review_kd"):
        distill.run(distill_config(frozen, run="none", method=ReviewKDConfig()))
