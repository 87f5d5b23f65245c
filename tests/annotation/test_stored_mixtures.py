"""Stored mixtures: the teacher's answers to two images at once, and the same pixels for its students, bit for bit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from permafrost import RecordLoader, open_store
from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    RandomViewsConfig,
    describe_mix,
)
from permafrost.config.methods import E2KDConfig, KDConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.batches import MixedLabels
from permafrost.core.errors import ConfigError
from permafrost.core.records import MIXTURE_FIELD, PARTNER_FIELD
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import (
    draw_mixtures,
    draw_partners,
    labels_of,
    mixes_of_pass,
    mixture_of_targets,
)
from permafrost.loading.subset import rows_of_split
from permafrost.loading.transfer import pack_batch, unpack_batch
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.runs import TRAINER, distill_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, precompute
from tests.support.views import interrupt_second_shard_of_views

RECIPE = AugmentOptions(
    operations=(
        OperationConfig(kind="pad_crop", padding=3),
        PixelOperationConfig(kind="color_jitter"),
    )
)
MIX = (MixConfig(kind="mixup", alpha=0.4), MixConfig(kind="cutmix", p=0.5))
VIEWS = RandomViewsConfig(count=3, seed=1, mix=MIX)
SIZE = (16, 16)


def mixed_config(folder, tiny_teacher, **options):
    return replace(precompute_config(folder, tiny_teacher, **options), views=VIEWS, augment=RECIPE)


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


def replay_loader(store, batch_size=12):
    (teacher,) = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    return TrainLoader(dataset, None, batch_size=batch_size, seed=0)


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
            views=VIEWS,
            augment=RECIPE,
            explainer=replace(config.explainer, target_classes="sample_gt"),
        )
    with pytest.raises(ConfigError, match=r"annotate\.batch_size=1; raise it"):
        replace(
            config, views=VIEWS, augment=RECIPE, annotate=replace(config.annotate, batch_size=1)
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
    views = replace(VIEWS, per_step=1)
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

    precompute.run(replace(config, views=VIEWS, augment=AugmentOptions()))

    batch = next(replay_loader(Store(tmp_path / "store")).epoch(0))
    assert batch.pixel_augment.mixture is not None
    assert batch.pixel_augment.changes == ()
