"""Stored views: the student gets the views that the teacher annotated, each with its own targets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.outputs import BatchInfo
from permafrost.config.augment import (
    AugmentOptions,
    CanonicalViewsConfig,
    OperationConfig,
    RandomViewsConfig,
)
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets, warp
from permafrost.loading.loader import TrainLoader
from permafrost.loading.sampler import EpochOrder, GlobalBatchSampler, ReplayBatchSampler
from permafrost.loading.subset import rows_of_split, select_training_rows
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_papers.interpretability.options import RotationsViewsConfig
from permafrost_papers.interpretability.rotations import rotations
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute

VIEWS = RandomViewsConfig(count=3, seed=1)
AUGMENT = AugmentOptions(
    operations=(
        OperationConfig(kind="pad_crop", padding=3),
        OperationConfig(kind="horizontal_flip"),
    )
)


def with_views(config, **options):
    return replace(config, **{"views": VIEWS, "augment": AUGMENT, **options})


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, tiny_teacher):
    """A store with a canonical pass and one of three views."""
    config = with_views(precompute_config(tmp_path_factory.mktemp("views") / "store", tiny_teacher))
    result = precompute.run(config)
    assert result.teacher_records == 72 + 3 * 40
    return Frozen(Store(Path(config.store.path)), config)


def replay_loader(replayed, **options):
    (teacher,) = replayed.store.open_passes(stored_views=True)
    dataset = StoreDataset(replayed.store, rows_of_split(replayed.store.index, "train"), [teacher])
    return TrainLoader(dataset, None, batch_size=12, seed=0, **options)


# ---- the pass ------------------------------------------------------------------------------------


def test_the_canonical_pass_is_that_of_a_store_without_views(replayed, frozen):
    (canonical,) = replayed.store.open_passes()
    (views,) = replayed.store.open_passes(stored_views=True)

    assert canonical.name == frozen.store.open_passes()[0].name
    assert canonical.num_views == 1
    assert (views.num_views, views.manifest.selection["split"]) == (3, "train")
    assert {shard.name.rsplit("-", 1)[0] for shard in views.manifest.shards} == {"train"}
    assert list(verify_store(replayed.store.path)) == []


@pytest.mark.slow
def test_again_nothing_is_computed_and_other_views_are_another_pass(replayed, tmp_path):
    assert precompute.run(replayed.config).teacher_records == 0

    store = tmp_path / "store"
    config = replace(replayed.config, store=replace(replayed.config.store, path=str(store)))
    names = []
    for options in (
        {},
        {"views": replace(VIEWS, seed=2)},
        {"views": replace(VIEWS, count=2)},
        {"augment": AugmentOptions(operations=AUGMENT.operations[:1])},
        {"subset": SubsetOptions(shots=1)},
        {"views": RotationsViewsConfig()},
    ):
        precompute.run(replace(config, **options))
        names.append(len(Store(store).pass_folders(stored_views=True)))
    assert names == [1, 2, 3, 4, 5, 6]
    assert len(Store(store).pass_folders()) == 1


def test_both_backends_hold_the_same_views(replayed, tmp_path, tiny_teacher):
    config = with_views(precompute_config(tmp_path / "s", tiny_teacher, backend="webdataset"))
    precompute.run(config)
    passes = [
        store.open_passes(stored_views=True)[0] for store in (replayed.store, Store(tmp_path / "s"))
    ]

    for shard in replayed.store.manifest.shards:
        if shard.split == "train":
            zarr, tars = (teacher.read_shard(shard) for teacher in passes)
            assert zarr.keys() == tars.keys()
            assert all(np.array_equal(zarr[name], tars[name]) for name in zarr)


def test_a_subset_costs_its_own_bytes_and_has_the_views_of_the_whole(replayed, tmp_path):
    subset = SubsetOptions(shots=1)
    config = replace(
        replayed.config,
        store=replace(replayed.config.store, path=str(tmp_path / "s")),
        subset=subset,
    )
    assert precompute.run(config).teacher_records == 72 + 3 * 10
    (few,), (whole,) = (
        store.open_passes(stored_views=True) for store in (Store(tmp_path / "s"), replayed.store)
    )

    rows = select_training_rows(replayed.store.index, "train", subset)
    assert sum(shard.rows for shard in few.manifest.shards) == len(rows) == 10
    for shard in replayed.store.manifest.shards:
        places, all_places = few.rows_of(shard), whole.rows_of(shard)
        if (places < 0).all():
            continue
        some, every = few.read_shard(shard), whole.read_shard(shard)
        for row in np.flatnonzero(places >= 0):
            for name in some:
                one, other = some[name][places[row]], every[name][all_places[row]]
                assert np.allclose(one.astype(float), other.astype(float), rtol=1e-2, atol=1e-5)
            assert np.array_equal(
                some["canonical_from_window"][places[row]],
                every["canonical_from_window"][all_places[row]],
            )
    with pytest.raises(StoreMismatchError, match="does not cover 30 of the run's 40 records"):
        StoreDataset(few.store, rows_of_split(few.store.index, "train"), [few])


# ---- replay --------------------------------------------------------------------------------------


def test_a_replayed_batch_is_what_the_teacher_saw_and_said_bit_for_bit(replayed):
    config = replayed.config
    annotator = TeacherAnnotator(
        config.teacher, 10, config.explainer, config.annotate, replayed.store.size
    )
    for batch in replay_loader(replayed).epoch(0):
        (targets,) = view_targets(batch, TargetRequest((4, 4)))
        images = view_images(batch, replayed.store.size)
        for index in range(len(images)):
            one = slice(index, index + 1)
            records = BatchInfo(batch.keys[one], batch.labels[one])
            again = annotator.stored_fields(images[one], records)
            top1 = again["target_class"][0]
            assert targets.target_class[index].numpy() == top1
            assert np.allclose(targets.logits[index], again["logits"][0], rtol=1e-2, atol=1e-3)
            assert np.allclose(targets.maps[index], again["map"][0].astype("f4"), atol=5e-3)


def test_a_stored_map_of_a_view_is_not_warped_again(replayed):
    batch = next(iter(replay_loader(replayed).epoch(0)))
    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    assert batch.targets[0].map_from_canonical is None
    assert torch.equal(targets.maps, batch.targets[0].maps)
    coarse = view_targets(batch, TargetRequest((2, 2)))[0].maps
    assert torch.allclose(
        coarse, torch.nn.functional.avg_pool2d(targets.maps[:, 0], 2)[:, None], atol=1e-6
    )


def test_the_unaugmented_control_has_the_map_of_the_first_view_with_the_logits_of_each(replayed):
    (views,) = replayed.store.open_passes(stored_views=True)
    rows = rows_of_split(replayed.store.index, "train")
    pairs = [(position, view) for position in range(len(rows)) for view in range(3)]
    first = [(position, 0) for position, _ in pairs]
    plain, control = (
        StoreDataset(replayed.store, rows, [views], still_maps=still).in_views(None)
        for still in (False, True)
    )

    (expected,), (of_first,) = plain.__getitems__(pairs).targets, plain.__getitems__(first).targets
    (controlled,) = control.__getitems__(pairs).targets

    assert torch.equal(controlled.maps, of_first.maps)
    assert torch.equal(controlled.target_class, of_first.target_class)
    assert torch.equal(controlled.logits, expected.logits)
    assert not torch.equal(controlled.maps, expected.maps)


def test_a_student_of_the_unaugmented_control_is_another_one(replayed):
    for control in ("none", "unaugmented"):
        method = E2KDConfig(map_control=control)
        distill.run(distill_config(replayed, run=control, mode="replay", method=method))
    one, other = (SavedNetwork(RUNS / run / "distill").load()[0] for run in ("none", "unaugmented"))
    assert any(
        not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
    )


def test_views_of_one_record_differ_and_targets_go_with_them(replayed):
    stream = replay_loader(replayed, views_per_step=3)
    batch = next(iter(stream.epoch(0)))

    assert batch.keys[0] == batch.keys[1] == batch.keys[2] != batch.keys[3]
    assert sorted(batch.view_index[:3].tolist()) == [0, 1, 2]
    assert torch.equal(batch.inputs[0], batch.inputs[2])
    logits = batch.targets[0].logits
    assert not torch.equal(logits[0], logits[1])
    images = view_images(batch, replayed.store.size)
    assert not torch.equal(images[0], images[1])


def pairs_of(batch):
    return list(zip(batch.positions.tolist(), batch.views.tolist(), strict=True))


def test_every_view_has_its_turn_once_before_any_comes_again():
    shards = np.arange(6) * 8
    seen = {}
    for epoch in range(8):
        batches = ReplayBatchSampler(EpochOrder(shards, 0), 8, num_views=4, per_step=1)
        batches.set_position(epoch, 0)
        for position, view in (pair for batch in batches for pair in pairs_of(batch)):
            seen.setdefault(position, []).append(view)

    assert len(seen) == 40
    for views in seen.values():
        assert sorted(views[:4]) == sorted(views[4:]) == [0, 1, 2, 3]
    # The order of the views differs between records.
    assert len({views[0] for views in seen.values()}) == 4


def test_ranks_share_the_pairs_of_one_process_and_a_later_step_continues():
    shards = np.arange(6) * 8

    def pairs(first_step=0, **ranks):
        batches = ReplayBatchSampler(EpochOrder(shards, 0), 8, num_views=4, per_step=2, **ranks)
        batches.set_position(1, first_step)
        return [pairs_of(batch) for batch in batches]

    whole = pairs()
    halves = [pairs(rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert pairs(first_step=3) == whole[3:]
    assert len(whole) == GlobalBatchSampler(EpochOrder(shards, 0), 4).num_steps == 10


def test_rotations_turn_exactly():
    image = torch.rand(1, 3, 8, 8)

    for quarter, matrix in enumerate(rotations()):
        turned = warp(image, matrix[None].float(), (8, 8))
        assert torch.allclose(turned, torch.rot90(image, quarter, (2, 3)), atol=1e-5)


# ---- a student -----------------------------------------------------------------------------------


def test_a_student_of_stored_views_resumes_and_is_evaluated_by_the_canonical_pass(
    replayed, monkeypatch
):
    options = {"mode": "replay", "views": CanonicalViewsConfig(per_step=2), "trainer": TRAINER}
    views = replace(VIEWS, count=4)
    store = Path.cwd() / "store"
    config = replace(
        replayed.config, store=replace(replayed.config.store, path=str(store)), views=views
    )
    precompute.run(config)
    frozen = Frozen(Store(store), config)

    distill.run(distill_config(frozen, run="replay", **options))

    _, trained = SavedNetwork(RUNS / "replay" / "distill").load()
    assert trained.teachers == (Store(store).open_passes()[0].name,)
    metrics = evaluate.run(evaluate_config(frozen, run="replay")).splits
    assert 0 <= metrics["test"]["agreement"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "replay", "views": CanonicalViewsConfig(per_step=3)}, r"views\.per_step=3"),
        ({"mode": "replay", "method": LabelsConfig()}, "method=labels uses no teacher"),
    ],
)
def test_what_a_replayed_run_cannot_be_is_said(replayed, options, message):
    with pytest.raises(ConfigError, match=message):
        distill.run(distill_config(replayed, **options))


def test_a_store_without_stored_views_says_how_to_make_them(frozen):
    with pytest.raises(
        StoreMismatchError,
        match=r"no teacher pass of stored views \(\S+ has no stored views\); .* views=random",
    ):
        distill.run(distill_config(frozen, mode="replay"))


def test_views_per_step_must_divide_the_views_of_a_record(replayed):
    with pytest.raises(ConfigError, match=r"views\.per_step=2 does not divide the 3 stored views"):
        distill.run(distill_config(replayed, mode="replay", views=CanonicalViewsConfig(per_step=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_frame": "center_crop"}, "set teacher.frame=full"),
        (
            {"augment": AugmentOptions()},
            "views=random draws from augment.operations, which is empty",
        ),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(replayed, options, message):
    if frame := options.pop("teacher_frame", None):
        options = {"teacher": replace(replayed.config.teacher, frame=frame)}
    with pytest.raises(ConfigError, match=message):
        replace(replayed.config, **options)


def test_of_several_passes_of_stored_views_the_count_chooses(replayed, tmp_path):
    config = replace(
        replayed.config, store=replace(replayed.config.store, path=str(tmp_path / "s"))
    )
    for count in (2, 4):
        precompute.run(replace(config, views=replace(VIEWS, count=count)))
    frozen = Frozen(Store(tmp_path / "s"), config)
    options = {"mode": "replay", "trainer": replace(TRAINER, epochs=1)}

    distill.run(distill_config(frozen, run="four", views=replace(VIEWS, count=4), **options))

    held = yaml.safe_load((RUNS / "four" / "distill" / "config.yaml").read_text())["inputs"]
    folders = frozen.store.pass_folders(stored_views=True)
    passes = [frozen.store.open_pass(folder.name, stored_views=True) for folder in folders]
    (wanted,) = (teacher for teacher in passes if teacher.num_views == 4)
    assert held[f"teacher {wanted.name}"] == wanted.manifest.fingerprint
    with pytest.raises(
        StoreMismatchError, match=r"contains 0 passes with views.count=3 .*\(2 views\)"
    ):
        distill.run(distill_config(frozen, run="three", views=VIEWS, **options))
