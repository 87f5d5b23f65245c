"""Equivariance of a teacher: its stored targets, warped with a view, against its output on that view."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
)
from permafrost.config.builder import to_plain_dict
from permafrost.config.store import PassOptions
from permafrost.config.verbs import EvaluationRun
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model
from permafrost.runs.folder import identity
from permafrost.store.reader import Store
from permafrost_evaluators.options import EquivarianceOptions
from permafrost_papers.bcos.options import BcosWeightsConfig
from permafrost_report.evaluator_sections import evaluator_sections
from permafrost_report.student_results import load_teacher
from tests.support.bcos import RESNET
from tests.support.runs import PAD_CROP, evaluation_of, save_student
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import evaluate, precompute


def equivariance_of(frozen, records=16, **options):
    """Config of an evaluation of the store's teacher on split train."""
    return evaluation_of(
        frozen,
        ("equivariance",),
        **{
            "model": "teacher",
            "teacher": frozen.config.teacher,
            "augment": PAD_CROP,
            "splits": ("train",),
            "equivariance": EquivarianceOptions(records=records),
            **options,
        },
    )


def measured(config):
    return evaluate.run(config).splits["train"]["equivariance"]


def test_it_finds_what_moves_a_teachers_answers(frozen):
    """A CIFAR ResNet with zero padding is exact for unmoved images and inexact for flipped or rotated ones."""
    operations = (
        OperationConfig(kind="horizontal_flip", p=0.0),  # measured as if always applied
        OperationConfig(kind="rotation", degrees=90),
    )

    metrics = measured(
        equivariance_of(frozen, records=256, augment=AugmentOptions(operations=operations))
    )

    assert list(metrics) == [
        "map_cosine",
        "logits_kl",
        "top1_agreement",
    ]  # 40 records are one block
    for values in metrics.values():
        assert list(values) == ["none", "horizontal_flip", "rotation", "recipe"]
    cosine, kl = metrics["map_cosine"], metrics["logits_kl"]
    assert cosine["none"] > 0.9999
    assert kl["none"] < 1e-5
    assert metrics["top1_agreement"]["none"] == 1
    for moved in ("horizontal_flip", "rotation"):
        assert cosine[moved] < cosine["none"] - 0.01
        assert kl[moved] > 10 * kl["none"]


def test_operations_on_pixels_and_policies_are_measured_with_their_pixels(frozen):
    operations = (
        PolicyConfig(kind="randaugment", magnitude=20),
        PixelOperationConfig(kind="solarize", threshold=0.1),
        PixelOperationConfig(kind="sharpness", factor=1.0),  # the identity
    )

    metrics = measured(
        equivariance_of(frozen, records=256, augment=AugmentOptions(operations=operations))
    )

    kl = metrics["logits_kl"]
    assert kl["sharpness"] == pytest.approx(kl["none"], abs=1e-6)
    assert min(kl["randaugment"], kl["solarize"], kl["recipe"]) > 100 * kl["none"]
    assert metrics["map_cosine"]["solarize"] < metrics["map_cosine"]["none"]


def test_the_size_of_a_batch_changes_no_view(frozen):
    whole, parts = (
        measured(equivariance_of(frozen, batch_size=size, run=str(size))) for size in (256, 5)
    )

    for name, values in whole.items():
        assert parts[name] == pytest.approx(values, abs=1e-6)


def test_maps_are_recomputed_by_the_explainer_of_a_pass_in_any_precision(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "bcos.safetensors"
    save_file(build_model(RESNET, 10).network.state_dict(), weights)
    config = precompute_config(
        tmp_path / "store",
        replace(RESNET, weights=str(weights)),
        explainer=BcosWeightsConfig(),
        annotate=PassOptions(precision="bfloat16", batch_size=8),
    )
    precompute.run(config)

    metrics = measured(equivariance_of(Frozen(Store(tmp_path / "store"), config)))

    assert metrics["map_cosine"]["none"] > 0.9999
    assert metrics["map_cosine"]["pad_crop"] < 0.9


@pytest.mark.parametrize("mirror", [True, slow(False)])
def test_features_that_a_flip_changes_are_exact_only_with_the_mirror_image(
    tmp_path, tiny_teacher, mirror
):
    options = PassOptions(
        batch_size=8, outputs=("logits", "features"), features_mirror=mirror, features_size=8
    )
    config = precompute_config(tmp_path / "store", tiny_teacher, annotate=options)
    precompute.run(config)
    flip = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))

    metrics = measured(equivariance_of(Frozen(Store(tmp_path / "store"), config), augment=flip))

    assert list(metrics) == ["logits_kl", "top1_agreement", "features_lost", "features_cosine"]
    assert metrics["features_cosine"]["none"] > 0.9999
    assert metrics["features_lost"]["none"] < 1e-4
    lost = metrics["features_lost"]["horizontal_flip"]
    assert lost < 1e-4 if mirror else lost > 0.2


def test_the_rules_for_mixtures_are_compared_with_the_teachers_answer_by_share(frozen):
    mix = (MixConfig(kind="mixup"), MixConfig(kind="cutmix", p=0.0))  # both always applied

    metrics = measured(
        equivariance_of(frozen, records=40, augment=AugmentOptions(mix=mix), run="mixed")
    )

    for name in ("mix_kl", "mix_agreement", "mix_cosine"):
        found = metrics[name]
        assert {"mixup", "cutmix", "mixup_0_to_25", "mixup_75_to_100"} <= found.keys()
        assert min(found.values()) >= (-1 if name == "mix_cosine" else 0)
    assert metrics["mix_kl"]["mixup"] > metrics["logits_kl"]["none"]
    assert max(metrics["mix_cosine"].values()) <= 1
    # The more of a record is shown, the nearer is its map to that of the whole image.
    assert metrics["mix_cosine"]["mixup_75_to_100"] > metrics["mix_cosine"]["mixup_0_to_25"]


def test_results_are_of_one_augmentation_and_other_evaluators_of_any(frozen):
    still = AugmentOptions()
    measured(equivariance_of(frozen))

    assert measured(equivariance_of(frozen, augment=replace(PAD_CROP, size=32)))  # not read
    with pytest.raises(ConfigError, match=r"augment\.mix=\[\], but this one has \[{"):
        evaluate.run(
            equivariance_of(frozen, augment=replace(PAD_CROP, mix=(MixConfig(kind="mixup"),)))
        )
    with pytest.raises(ConfigError, match=r"with augment\.operations=.*, but this one has \[\];"):
        evaluate.run(equivariance_of(frozen, augment=still))
    with pytest.raises(
        ConfigError, match=r"evaluate\.equivariance\.records=16, but this one has 8"
    ):
        evaluate.run(equivariance_of(frozen, records=8))
    one = replace(equivariance_of(frozen, augment=still, records=8), evaluators=("accuracy",))
    assert "accuracy" in evaluate.run(one).splits["train"]
    identities = [
        identity(to_plain_dict(config.shared), EvaluationRun)
        for config in (one, equivariance_of(frozen))
    ]
    assert identities[0] == identities[1]


def test_a_student_is_refused(frozen):
    save_student(frozen, "one")

    with pytest.raises(ConfigError, match="set model=teacher instead of model=student"):
        evaluate.run(equivariance_of(frozen, model="student"))


def test_a_store_without_the_teachers_maps_is_refused(tmp_path, tiny_teacher, frozen):
    for name, teacher, lacking in (
        ("logits", tiny_teacher, r"resnet8-\w+ has none"),
        ("images", None, r"\S+ has no pass of it"),
    ):
        config = precompute_config(
            tmp_path / name, teacher, annotate=PassOptions(outputs=("logits",))
        )
        precompute.run(config)
        bare = replace(frozen, store=Store(tmp_path / name))
        with pytest.raises(
            ConfigError, match=f"needs the teacher's maps or features, but {lacking}; run perma"
        ):
            evaluate.run(equivariance_of(bare, run=name))


def test_the_report_has_a_table_for_each_quantity_also_without_a_student(frozen):
    measured(equivariance_of(frozen))

    (section,) = evaluator_sections([], load_teacher("one"), frozen.store)

    assert [[column.name for column in table.columns] for table in section.tables] == [
        ["none", "pad_crop"]
    ] * 3
    assert section.tables[2].rows[0]["none"]["mean"] == 1
