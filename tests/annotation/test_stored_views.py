"""Stored views and mixtures: the student gets what the teacher annotated, bit for bit, each with its own targets."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from permafrost import RecordLoader, open_store
from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.outputs import BatchInfo
from permafrost.config.augment import (
    AugmentOptions,
    CanonicalViewsConfig,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    RandomViewsConfig,
    describe_mix,
)
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.batches import MixedLabels
from permafrost.core.errors import ConfigError
from permafrost.core.records import MIXTURE_FIELD, PARTNER_FIELD
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets, warp
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import (
    draw_mixtures,
    draw_partners,
    labels_of,
    mixes_of_pass,
    mixture_of_targets,
)
from permafrost.loading.sampler import EpochOrder, GlobalBatchSampler, ReplayBatchSampler
from permafrost.loading.subset import rows_of_split, select_training_rows
from permafrost.loading.transfer import pack_batch, unpack_batch
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_papers.interpretability.options import RotationsViewsConfig
from permafrost_papers.interpretability.rotations import rotations
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, evaluate, precompute
from tests.support.views import interrupt_second_shard_of_views

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
    for batch in replay_loader(replayed.store).epoch(0):
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
    batch = next(iter(replay_loader(replayed.store).epoch(0)))
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
    stream = replay_loader(replayed.store, views_per_step=3)
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


RECIPE = AugmentOptions(
    operations=(
        OperationConfig(kind="pad_crop", padding=3),
        PixelOperationConfig(kind="color_jitter"),
    )
)
MIX = (MixConfig(kind="mixup", alpha=0.4), MixConfig(kind="cutmix", p=0.5))
MIXED_VIEWS = RandomViewsConfig(count=3, seed=1, mix=MIX)
SIZE = (16, 16)


def mixed_config(folder, tiny_teacher, **options):
    return replace(
        precompute_config(folder, tiny_teacher, **options), views=MIXED_VIEWS, augment=RECIPE
    )


@pytest.fixture(scope="module", params=["zarr", slow("webdataset")])
def mixed(request, tmp_path_factory, tiny_teacher):
    """A store with a canonical pass and one of three mixtures of each record, and what its teacher received."""
    received = []
    annotate = TeacherAnnotator.annotate_inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TeacherAnnotator,
            "annotate_inputs",
            lambda self, images, records: (
                received.append((records.keys, images.clone())) or annotate(self, images, records)
            ),
        )
        config = mixed_config(
            tmp_path_factory.mktemp("mixed") / "store", tiny_teacher, backend=request.param
        )
        precompute.run(config)
    by_key = {}  # the views of a record come in the order of their numbers
    for keys, images in received:
        for key, image in zip(keys, images, strict=True):
            by_key.setdefault(key, []).append(image)
    return Frozen(Store(Path(config.store.path)), config), by_key


def replay_loader(store, batch_size=12, **options):
    (teacher,) = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    return TrainLoader(dataset, None, batch_size=batch_size, seed=0, **options)


# ---- the teacher's pixels --------------------------------------------------------------------------


def test_a_student_of_mixtures_receives_the_pixels_of_its_teacher_bit_for_bit(mixed):
    frozen, received = mixed

    checked = set()
    for batch_size in (12, 5):
        for epoch in range(3):
            for batch in replay_loader(frozen.store, batch_size).epoch(epoch):
                images = view_images(batch, SIZE)
                for key, view, image in zip(batch.keys, batch.view_index, images, strict=True):
                    assert torch.equal(image, received[key][int(view)].cpu()), (key, view)
                    checked.add((key, int(view)))

    assert len(checked) == 3 * 40
    alone = view_images(replace(batch, pixel_augment=None, second=None), SIZE)
    assert not torch.equal(view_images(batch, SIZE), alone)  # control: a second image is there


def test_a_batch_of_mixtures_has_the_second_records_and_the_labels_of_both(mixed):
    frozen, _ = mixed
    batch = next(replay_loader(frozen.store).epoch(0))
    mixture = batch.pixel_augment.mixture

    labels = labels_of(batch)

    assert isinstance(labels, MixedLabels)
    assert torch.equal(labels.first, batch.labels)
    assert torch.equal(labels.second, batch.second.labels)
    assert torch.equal(labels.shares, mixture.shares)
    assert batch.second.keys != batch.keys
    assert batch.second.targets == ()
    assert mixture_of_targets(batch) is None  # the stored targets are those of the mixtures
    received = unpack_batch(pack_batch(batch))
    assert torch.equal(view_images(received, SIZE), view_images(batch, SIZE))


def test_a_pass_says_what_was_mixed_and_verifies(mixed):
    frozen, _ = mixed
    (teacher,) = frozen.store.open_passes(stored_views=True)
    shapes = {spec.name: (spec.shape, spec.dtype) for spec in teacher.manifest.fields}

    assert (shapes["mixture"], shapes["partner_row"]) == (((5,), "float16"), ((1,), "int32"))
    assert [each["kind"] for each in teacher.views["mix"]] == ["mixup", "cutmix"]
    assert teacher.views["mix_block"] == frozen.config.annotate.batch_size
    assert list(verify_store(frozen.store.path)) == []
    stored = {"mixture": [], "partner_row": []}
    for shard in frozen.store.shards:
        if teacher.covers_shard(shard):
            fields = teacher.open_shard(shard, set(stored))
            for name, values in fields.items():
                stored[name].append(np.asarray(values[: len(values)]))
    values = np.concatenate(stored["mixture"])
    areas = np.prod(values[..., 3:].astype(float) - values[..., 1:3], axis=-1)
    assert 0.3 < (areas > 0).mean() < 0.7
    assert np.allclose(values[..., 0][areas > 0], 1 - areas[areas > 0], atol=2e-3)


def test_partners_are_circles_within_blocks():
    partners = draw_partners(np.random.default_rng(0), 21, 8)

    assert sorted(partners) == list(range(21))
    assert (partners != np.arange(21)).all()
    assert (partners // 8 == np.arange(21) // 8).all()
    assert draw_partners(np.random.default_rng(0), 9, 8)[8] == 8  # nobody else is there


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_an_interrupted_pass_of_mixtures_has_the_same_bytes(
    tmp_path, tiny_teacher, backend, monkeypatch
):
    whole, broken = (
        mixed_config(tmp_path / name / "store", tiny_teacher, backend=backend)
        for name in ("whole", "broken")
    )
    precompute.run(whole)
    with monkeypatch.context() as patch:
        interrupt_second_shard_of_views(patch)
        with pytest.raises(KeyboardInterrupt):
            precompute.run(broken)

    precompute.run(broken)

    first, second = (tree_bytes(tmp_path / name / "store/teachers") for name in ("whole", "broken"))
    assert first == second


# ---- students --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [KDConfig(lambda_ce=0.5), E2KDConfig()], ids=lambda method: method.kind
)
def test_a_student_replays_mixtures_and_resumes(mixed, method):
    frozen, _ = mixed
    options = {"mode": "replay", "method": method, "trainer": replace(TRAINER, epochs=2)}
    config = replace(distill_config(frozen, run=f"m-{method.kind}", **options), augment=RECIPE)

    assert distill.run(config).trained_epochs == 2
    assert distill.run(config).trained_epochs == 0


def test_a_loader_gives_the_answers_to_the_mixtures(mixed):
    frozen, _ = mixed
    records = open_store(frozen.store.path).select("train")
    (name,) = (folder.name for folder in frozen.store.pass_folders(stored_views=True))

    (batch,) = RecordLoader(records, batch_size=40, teacher=name, replay=True)

    assert batch.mixture is not None
    assert batch.logits.shape == (40, 10)
    assert batch.maps.shape[0] == 40
    assert torch.equal(batch.mixed_labels.second, batch.stored.second.labels)
    with pytest.raises(ConfigError, match="labels of two records"):
        batch.labels  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": replace(RECIPE, mix=MIX)}, "augment.mix would mix again"),
        ({"subset": SubsetOptions(shots=1)}, r"mixtures of 40 records, and this selection has 10"),
        (
            {"method": E2KDConfig(map_control="shuffled")},
            r"are mixtures, as by augment\.mix: method\.map_control=shuffled .* without views\.mix",
        ),
        (
            {"method": E2KDConfig(map_control="unaugmented")},
            r"are mixtures, as by augment\.mix: method\.map_control=unaugmented .* without views\.mix",
        ),
    ],
)
def test_a_student_that_mixtures_do_not_fit_is_refused_before_its_first_step(
    mixed, options, message
):
    frozen, _ = mixed
    config = distill_config(frozen, mode="replay", run="refused")

    with pytest.raises(StoreMismatchError, match=message):
        distill.run(replace(config, **options))


def test_labels_of_one_record_do_not_choose_the_class_of_a_mixture(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)

    with pytest.raises(ConfigError, match=r"sample_gt reads a record's labels, and views\.mix"):
        replace(
            config,
            views=MIXED_VIEWS,
            augment=RECIPE,
            explainer=replace(config.explainer, target_classes="sample_gt"),
        )
    with pytest.raises(ConfigError, match=r"annotate\.batch_size=1; raise it"):
        replace(
            config,
            views=MIXED_VIEWS,
            augment=RECIPE,
            annotate=replace(config.annotate, batch_size=1),
        )


# ---- damaged and strange passes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "fields", "fits"),
    [
        ([{"kind": "mixup"}], [MIXTURE_FIELD, PARTNER_FIELD], True),
        (None, [], False),
        ([{"kind": "mixup"}], [], None),
        ([{"kind": "mixup"}], [MIXTURE_FIELD], None),
        (None, [MIXTURE_FIELD, PARTNER_FIELD], None),
        ([], [MIXTURE_FIELD, PARTNER_FIELD], None),
        ("mixup", [MIXTURE_FIELD, PARTNER_FIELD], None),
        ([{"kind": "mixup"}], [replace(MIXTURE_FIELD, shape=(4,)), PARTNER_FIELD], None),
        ([{"kind": "mixup"}], [MIXTURE_FIELD, replace(PARTNER_FIELD, dtype="float32")], None),
    ],
)
def test_a_manifest_names_mixtures_and_their_fields_or_neither(tmp_path, mix, fields, fits):
    views = {} if mix is None else {"mix": mix}
    manifest = SimpleNamespace(views=views, fields=tuple(fields))
    teacher = SimpleNamespace(manifest=manifest, folder=tmp_path)

    if fits is None:
        with pytest.raises(
            ManifestError, match=r"views\.mix and the fields mixture and partner_row"
        ):
            mixes_of_pass(teacher)
    else:
        assert mixes_of_pass(teacher) is fits


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (-1, (0.5, 0, 0, 0, 0)),
        (10**6, (0.5, 0, 0, 0, 0)),
        (0, (float("nan"), 0, 0, 0, 0)),
        (0, (1.5, 0, 0, 0, 0)),
        (0, (0.5, -1, -1, 2, 2)),
        (0, (0.5, 0.6, 0.2, 0.4, 0.8)),
    ],
)
def test_a_partner_of_another_shard_and_a_share_that_is_none_stop(mixed, row, values, monkeypatch):
    frozen, _ = mixed
    dataset = replay_loader(frozen.store).dataset
    gather = dataset._gather

    def damaged(*arguments):
        gathered = gather(*arguments)
        if "partner_row" in gathered:
            gathered["partner_row"][0] = row
            gathered["mixture"][0] = values
        return gathered

    monkeypatch.setattr(dataset, "_gather", damaged)

    with pytest.raises(StoreMismatchError, match="mixtures with invalid shares or with records"):
        dataset.__getitems__([(0, 0), (1, 1)])


def test_a_student_that_asks_for_mixtures_needs_a_pass_of_them(mixed):
    frozen, _ = mixed
    config = distill_config(frozen, mode="replay", run="asked")
    other = RandomViewsConfig(count=3, mix=MIX[:1])

    with pytest.raises(StoreMismatchError, match=r"views\.mix=.* are mixtures by .*cutmix"):
        distill.run(replace(config, views=other))
    blank = PixelOperationConfig(kind="random_erasing", maps="blank")
    with pytest.raises(StoreMismatchError, match="would blank for both records"):
        distill.run(replace(config, augment=AugmentOptions(operations=(blank,))))
    views = replace(MIXED_VIEWS, per_step=1)
    config = replace(config, views=views, augment=RECIPE, trainer=replace(TRAINER, epochs=1))
    assert distill.run(config).trained_epochs == 1


def test_a_recipe_without_a_mixture_that_is_never_drawn_is_the_same():
    never = MixConfig(kind="mixup", p=0.0)

    with_it, without = (
        draw_mixtures(mix, np.random.default_rng(0), 16) for mix in ((never, *MIX), MIX)
    )

    assert np.array_equal(with_it, without)
    assert describe_mix((never, *MIX)) == describe_mix(MIX)


def test_whole_images_may_be_mixed(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)

    precompute.run(replace(config, views=MIXED_VIEWS, augment=AugmentOptions()))

    batch = next(replay_loader(Store(tmp_path / "store")).epoch(0))
    assert batch.pixel_augment.mixture is not None
    assert batch.pixel_augment.changes == ()
