"""Evaluators on maps, boxes and logits with hand-computed scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from permafrost.config.builder import to_plain_dict
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.explainers import EXPLAINERS, ExplainerConfig, GradCamConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_GROUP, NO_LABEL
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.evaluation.forward import (
    EvaluatedModel,
    evaluate_training,
    metrics_of,
    predict_records,
)
from permafrost.evaluation.metrics import (
    accuracy,
    agreement,
    class_scores,
    energy_pointing_game,
    kl_to_teacher,
    label_scores,
    localization_iou,
    majority_share,
    teacher_scores,
    uniform_score,
    upsample,
)
from permafrost.evaluation.per_label import many_label_scores
from permafrost.evaluation.results import (
    add_result,
    evaluator_options,
    keep_options,
    missing_evaluators,
)
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.regions import box_regions
from permafrost.losses.base import build_loss
from permafrost.models.explanations import explainer_named, gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.runs.folder import CONFIG_NAME, save_config
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost_papers.interpretability.options import GradientAlignmentOptions
from tests.support.runs import evaluation_of
from tests.support.verbs import precompute

THRESHOLD = 0.05


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(ExplainerConfig):
    implementation: ClassVar[str] = f"{__name__}:energy"
    kind: str = "energy"


def energy(model, output, target_class):
    maps = output.features.square().mean(dim=1)[:, None, None]
    return maps.expand(-1, target_class.shape[1], -1, -1, -1)


def box(
    label: int, x0: float, y0: float, x1: float, y1: float, size: tuple[int, int]
) -> list[float]:
    """Row of `boxes` with these edges in pixels of an (H, W) frame, in canonical coordinates."""
    height, width = size
    return [label, 2 * x0 / width - 1, 2 * y0 / height - 1, 2 * x1 / width - 1, 2 * y1 / height - 1]


def region(rows: slice, columns: slice, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """Mask bool [1, H, W] that is true on these pixels."""
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, rows, columns] = True
    return mask


def top1_logits(*classes: int) -> torch.Tensor:
    """Logits [N, 3] whose predicted classes are the given ones."""
    return 4.0 * F.one_hot(torch.tensor(classes), 3).double()


def random_map(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def full_map(value: float) -> torch.Tensor:
    return torch.full((4, 4), value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "rows", "columns", "wanted"),
    [
        (full_map(0.3), slice(0, 2), slice(1, 4), 6 / 16),  # the region's share of the area
        (F.pad(torch.tensor([[0.2, 5.0]]).double(), (1, 1, 1, 2)), slice(1, 2), slice(1, 3), 1.0),
        (torch.tensor([[3.0, -7.0], [1.0, -100.0]]).double(), slice(0, 1), slice(0, 2), 3 / 4),
        *[(full_map(value), slice(0, 4), slice(0, 4), 0.0) for value in (0.0, -1.0, 1e-9)],
    ],
)
def test_epg_is_the_share_of_positive_attributions_in_the_region(values, rows, columns, wanted):
    score = energy_pointing_game(values[None], region(rows, columns, size=tuple(values.shape)))

    assert score.item() == pytest.approx(wanted, rel=0, abs=1e-9 if wanted else 0)


def test_epg_evaluates_each_record_by_its_own_region():
    maps = torch.ones(2, 4, 4, dtype=torch.float64)
    regions = torch.cat([region(slice(0, 1), slice(0, 4)), region(slice(0, 4), slice(0, 4))])

    scores = energy_pointing_game(maps, regions)

    torch.testing.assert_close(scores, torch.tensor([0.25, 1.0]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "inside", "expected"),
    [
        ([0.0, 0.2, 0.2, 0.0], [1, 2], 1),  # the region's indicator
        ([0.0, 1.0, 2.0, 10.0], [0, 1, 2], 2 / 4),  # above the threshold: 1, 2 and 10
        ([0.0, 0.0, 0.05, 1.0], [2, 3], 0.5),  # a strict threshold
        ([0.0, 0.0, 0.0501, 1.0], [2, 3], 1),
        ([5.0, 5.0, 5.25, 15.0], [3], 1),  # scaled from its own lowest value: 0, 0, 0.025, 1
        ([-1000.0, 0.0, 1.0, 10.0], [2, 3], 1),  # negative attributions are ignored
        ([0.3, 0.3, 0.3, 0.3], [2], 1 / 4),  # a constant map: the region's share of the area
        ([0.0, 0.0, 0.0, 0.0], [0, 1], 0),
        ([0.0, 0.0, 0.0, 0.0], [], 0),
    ],
)
def test_iou_threshold_is_strict(values, inside, expected):
    maps = torch.tensor([[values]], dtype=torch.float64)
    regions = torch.isin(torch.arange(4), torch.tensor(inside)).view(1, 1, 4)

    assert localization_iou(maps, regions, THRESHOLD).item() == expected


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 3.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_ignores_a_positive_scale(scale, dtype):
    maps = random_map(0, dtype)
    regions = region(slice(2, 6), slice(1, 7), size=(8, 8))
    expected = localization_iou(maps, regions, threshold=0.5).item()

    score = localization_iou(maps * scale, regions, threshold=0.5)

    assert 0 < expected < 1
    assert score.item() == expected


def test_box_regions_cover_the_union_of_overlapping_boxes():
    size = (4, 6)
    boxes = [torch.tensor([box(2, 0, 0, 4, 2, size), box(2, 3, 1, 6, 3, size)])]

    regions = box_regions(boxes, torch.tensor([2]), size)

    expected = torch.tensor(
        [
            [
                [1, 1, 1, 1, 0, 0],
                [1, 1, 1, 1, 1, 1],
                [0, 0, 0, 1, 1, 1],
                [0, 0, 0, 0, 0, 0],
            ]
        ]
    )
    assert torch.equal(regions, expected.bool())


def test_box_regions_cover_only_boxes_of_the_records_own_label():
    size = (4, 4)
    both = torch.tensor([box(0, 0, 0, 2, 2, size), box(1, 2, 2, 4, 4, size)])
    labels = torch.tensor([0, 1, 5, NO_LABEL])

    regions = box_regions([both, both, both, torch.zeros(0, 5)], labels, size)

    expected = torch.zeros(4, *size, dtype=torch.bool)
    expected[0, 0:2, 0:2] = True
    expected[1, 2:4, 2:4] = True
    assert torch.equal(regions, expected)


@pytest.mark.parametrize("size", [(32, 32), (37, 53), (224, 199)])
def test_box_regions_start_and_end_at_exact_pixel_edges(size):
    height, width = size
    columns = [(x0, x1) for x0 in range(width) for x1 in {x0 + 1, width}]
    rows = [(y0, y1) for y0 in range(height) for y1 in {y0 + 1, height}]
    # The box of each record is limited along one axis and covers the whole of the other.
    corners = [(x0, 0, x1, height) for x0, x1 in columns] + [(0, y0, width, y1) for y0, y1 in rows]
    boxes = [torch.tensor([box(0, *corner, size)]) for corner in corners]

    regions = box_regions(boxes, torch.zeros(len(boxes), dtype=torch.long), size)

    for found, (x0, y0, x1, y1) in zip(regions, corners, strict=True):
        assert found.sum() == (x1 - x0) * (y1 - y0)
        assert found[y0:y1, x0:x1].all()


def test_box_regions_round_corners_to_the_nearest_edges_of_pixels_and_end_at_the_frame():
    boxes = [torch.tensor([[0, -1.5, -0.3, 0.3, 1.7]])]  # edges at pixels -1, 1.4, 2.6 and 5.4 of 4

    regions = box_regions(boxes, torch.tensor([0]), (4, 4))

    assert torch.equal(regions, region(slice(1, 4), slice(0, 3)))


def test_rounded_boxes_are_not_shifted():
    generator = torch.Generator().manual_seed(0)
    size = 20
    edges = (torch.rand(4000, 2, 2, generator=generator) * (size - 4)).sort(dim=2).values + 2
    edges[:, :, 1] += 1.5
    boxes = [torch.tensor([box(0, *corner.T.flatten().tolist(), (size, size))]) for corner in edges]
    pixels = torch.arange(size) + 0.5

    regions = box_regions(boxes, torch.zeros(len(boxes), dtype=torch.long), (size, size)).float()

    centers = (regions.sum(dim=1) * pixels).sum(dim=1) / regions.sum(dim=(1, 2))
    assert (centers - edges[:, 0].mean(dim=1)).mean().abs() < 0.02  # rounded down it is -0.5


def test_a_box_below_a_pixel_has_one():
    for edge in (0.0, 1.3, 3.999, 4.0):
        boxes = [torch.tensor([box(0, edge, edge, edge + 0.1, edge + 0.1, (4, 4))])]

        assert box_regions(boxes, torch.tensor([0]), (4, 4)).sum() == 1


def test_upsample_is_bilinear_with_half_pixel_centers():
    maps = torch.tensor([[[0.0, 1.0]]])

    upsampled = upsample(maps, (1, 4))

    assert torch.equal(upsampled, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))


def test_accuracy_is_the_share_of_labeled_records_that_are_right():
    logits = top1_logits(0, 1, 2, 0)

    assert accuracy(logits, torch.tensor([0, 1, 0, NO_LABEL])) == 2 / 3
    assert math.isnan(accuracy(logits, torch.full((4,), NO_LABEL)))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [((0, 1, 2, 2), (0, 1, 2, 1), 3 / 4), ((0, 1, 2), (0, 1, 2), 1), ((0, 1), (1, 2), 0)],
)
def test_agreement_is_symmetric_and_matches_hand_computation(student, teacher, expected):
    student_logits, teacher_logits = top1_logits(*student), top1_logits(*teacher)

    assert agreement(student_logits, teacher_logits) == expected
    assert agreement(teacher_logits, student_logits) == expected


def test_kl_to_teacher_matches_hand_computation():
    student_logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    teacher_logits = torch.tensor([[0.0, 0.0], [7.0, 7.0]], dtype=torch.float64)

    kl = kl_to_teacher(student_logits, teacher_logits)

    # KL((1/2, 1/2) || (3/4, 1/4)) of the first record; the second has equal probabilities.
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert kl == pytest.approx(expected, abs=1e-12)


def test_groups_are_scored_alone_and_in_sets_by_records_and_by_groups():
    """Groups 1 and 2 of Waterbirds are out of distribution. The last record has no group, the fourth no label."""
    logits = top1_logits(0, 0, 1, 1, 1, 0, 0, 1)
    labels = torch.tensor([0, 1, 1, NO_LABEL, 0, 0, 0, 1])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, NO_GROUP])
    sets = {"id": (0, 3), "ood": (1, 2), "absent": (7,)}

    scores = label_scores(logits, labels, groups, sets)

    assert scores["group_accuracy"] == {"0": 1 / 2, "1": 1, "2": 2 / 3}
    assert scores["worst_group_accuracy"] == 1 / 2
    assert (scores["id_accuracy"], scores["id_mean_group_accuracy"]) == (1 / 2, 1 / 2)
    assert scores["ood_accuracy"] == 3 / 4
    assert scores["ood_mean_group_accuracy"] == pytest.approx(5 / 6, abs=1e-12)
    assert scores["accuracy"] == 5 / 7
    assert not any(name.startswith("absent") for name in scores)


def test_agreement_of_groups_needs_no_labels():
    teacher, student = top1_logits(0, 0, 1, 1), top1_logits(0, 1, 1, 1)
    labels = torch.full((4,), NO_LABEL)
    groups = torch.tensor([0, 1, 1, 1])

    scores = teacher_scores(student, teacher, labels, groups, {"ood": (1, 2)})

    assert scores["group_agreement"] == {"0": 1, "1": 2 / 3}
    assert scores["ood_agreement"] == scores["ood_mean_group_agreement"] == 2 / 3


def test_without_groups_there_are_no_scores_of_any():
    nowhere = torch.full((2,), NO_GROUP)

    scores = label_scores(top1_logits(0, 1), torch.tensor([0, 1]), nowhere, {"id": (0, 3)})

    assert scores.pop("mean_class_accuracy_low") < scores.pop("mean_class_accuracy_high")
    assert scores == {"accuracy": 1, "mean_class_accuracy": 1, "group_accuracy": {}}


def test_the_mean_over_classes_weighs_classes_alike_and_its_interval_covers_it():
    chances, counts = torch.tensor([0.9, 0.6, 0.2]), torch.tensor([400, 60, 8])
    labels = torch.arange(3).repeat_interleave(counts)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        hits = torch.rand(len(labels), generator=generator) < chances[labels]
        scores = class_scores(hits, labels)
        shares = [hits[labels == label].double().mean().item() for label in range(3)]
        assert scores["mean_class_accuracy"] == pytest.approx(sum(shares) / 3)
        bounds = scores["mean_class_accuracy_low"], scores["mean_class_accuracy_high"]
        covered += bounds[0] <= chances.mean() <= bounds[1]

    assert 0.92 <= covered / 400 <= 0.99


# ---- many labels per record ----------------------------------------------------------------------


def random_sets(seed: int, records: int = 50, classes: int = 6) -> tuple[torch.Tensor, ...]:
    """Logits f64 [N, K] and labels f32 [N, K]. A few records have no labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(records, classes, generator=generator, dtype=torch.float64)
    labels = (torch.rand(records, classes, generator=generator) < 0.3).float()
    return logits, labels


def test_agreement_of_many_labels_is_that_of_the_sets_of_positive_classes():
    one, other = random_sets(1)[0], random_sets(2)[0]
    other[:20] = one[:20] * 3  # equal signs, other values
    same = ((one >= 0) == (other >= 0)).all(dim=1).double().mean().item()

    assert agreement(one, other, many=True) == agreement(other, one, many=True) == same
    assert 0.4 <= same < 0.6
    assert agreement(one, one.clone(), many=True) == 1
    tied = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert (agreement(*tied, many=True), agreement(*tied)) == (1, 0)


def test_kl_to_teacher_of_many_labels_is_the_sum_of_bernoulli_divergences():
    student_logits = torch.zeros(1, 2, dtype=torch.float64)
    teacher_logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)

    kl = kl_to_teacher(student_logits, teacher_logits, many=True)

    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)


def test_the_scores_of_a_set_are_those_that_its_labels_allow():
    logits, labels = random_sets(0)
    groups = torch.full((50,), NO_GROUP)
    one_each = torch.arange(50) % 6

    of_labels = label_scores(logits, labels, groups)
    assert of_labels == many_label_scores(logits, labels)
    of_classes = {f"mean_class_accuracy{end}" for end in ("", "_low", "_high")}
    of_one_each = set(label_scores(logits, one_each, groups))
    assert of_one_each == {"accuracy", "group_accuracy", *of_classes}
    agreement_of_itself = {"agreement": 1, "kl_to_teacher": 0}
    of_many = teacher_scores(logits, logits.clone(), labels, groups)
    chosen = [name for name in of_labels if not name.startswith("micro_")]
    teacher = {f"teacher_{name}": of_labels[name] for name in chosen}
    assert of_many == agreement_of_itself | teacher
    of_one = teacher_scores(logits, logits.clone(), one_each, groups)
    mean_over_classes = of_one.pop("teacher_mean_class_accuracy")
    assert mean_over_classes == label_scores(logits, one_each, groups)["mean_class_accuracy"]
    teacher = {"teacher_accuracy": accuracy(logits, one_each), "group_agreement": {}}
    assert of_one == agreement_of_itself | teacher


def test_the_chance_level_of_epg_and_iou_is_that_of_a_uniform_map(frozen):
    network = freeze(build_model(frozen.config.teacher, 10))
    dataset = StoreDataset(frozen.store, np.arange(24), with_regions=True)
    batch = dataset.__getitems__(list(range(24)))
    regions = box_regions(batch.boxes, batch.labels, (16, 16))
    uniform = torch.full((24, 16, 16), 0.3)

    metrics = metrics_of(
        predict_records(
            EvaluatedModel(network=network, input_size=(16, 16)), dataset, EvaluateOptions()
        )
    )

    expected = energy_pointing_game(uniform, regions)
    torch.testing.assert_close(uniform_score(regions), expected)
    torch.testing.assert_close(localization_iou(uniform, regions, THRESHOLD), expected)
    assert metrics["epg_uniform"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert 0.1 < metrics["epg_uniform"] < 0.9
    assert metrics["majority_accuracy"] == batch.labels.bincount().max() / 24


def test_the_chance_level_of_accuracy_is_that_of_the_most_frequent_known_label():
    assert majority_share(torch.tensor([2, 0, 2, NO_LABEL, 1])) == 0.5
    assert majority_share(torch.tensor([NO_LABEL])) is None
    assert majority_share(torch.eye(3)) is None  # many labels


def test_localization_is_measured_at_the_networks_input_and_not_at_the_frame(frozen):
    """Whole frames of 16 pixels (evaluate.frame=full), evaluated by a network with inputs of 24 pixels."""
    network = freeze(build_model(frozen.config.teacher, 10))
    dataset = StoreDataset(frozen.store, np.arange(24), with_regions=True)
    options = EvaluateOptions(frame="full", region="boxes")

    predictions = predict_records(
        EvaluatedModel(network=network, input_size=(24, 24)), dataset, options
    )

    batch = dataset.__getitems__(list(range(24)))
    images = view_images(batch, (24, 24))
    with torch.no_grad():
        output = network(images)
    maps = gradcam(network, output, batch.labels[:, None])[:, 0, 0]

    def expected(side):
        regions = box_regions(batch.boxes, batch.labels, (side, side))
        return energy_pointing_game(upsample(maps, (side, side)), regions)

    torch.testing.assert_close(predictions.epg[:, 0], expected(24), rtol=0, atol=1e-6)
    # control: the result at the frame's size differs
    assert (expected(24) - expected(16)).abs().max() > 1e-3


def frozen_by(own, explainer):
    precompute.run(replace(own.config, explainer=explainer))
    passes = map(own.store.open_pass, (folder.name for folder in own.store.pass_folders()))
    return next(each for each in passes if each.explainer == explainer.kind)


@pytest.mark.parametrize("explainer", [GradCamConfig(), EnergyConfig()])
def test_a_student_is_explained_as_the_pass_was_and_as_its_training_explains_it(
    own, explainer, monkeypatch
):
    monkeypatch.setitem(EXPLAINERS, "energy", EnergyConfig)
    dataset = StoreDataset(own.store, np.arange(24), [frozen_by(own, explainer)], with_regions=True)

    def measured(model):
        return evaluate_training((16, 16), dataset, EvaluateOptions(), model)["map_cosine"]

    network = freeze(build_model(own.config.teacher, 10))
    assert measured(network) == pytest.approx(1, abs=1e-5)
    other = build_model(replace(own.config.teacher, weights=None), 10).eval()
    training = Training(
        model=other,
        loss=build_loss(E2KDConfig(tau=2.0)),
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        explain=explainer_named(explainer.kind),
    )
    terms = batch_loss(training, dataset.__getitems__(list(range(24))), (16, 16)).terms
    assert terms["map"].item() == pytest.approx(1 - measured(other), abs=1e-5)
    assert measured(other) < 0.99


def test_a_pass_of_an_explainer_that_is_not_installed_is_not_compared(own, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(EXPLAINERS, "energy", EnergyConfig)
        name = frozen_by(own, EnergyConfig()).name

    with pytest.raises(ConfigError, match=r"explainer=energy, whose plug-in.*\[accuracy\]"):
        evaluate_student(evaluation_of(own, against=name))

    result = evaluate_student(evaluation_of(own, ["accuracy"], against=name))
    assert "agreement" in result.splits["test"]


NAME = "gradient_alignment"


def config_of(**options):
    return EvaluateConfig(
        store=StoreOptions(path="store"),
        evaluate=EvaluateOptions(added={"gradient_alignment": GradientAlignmentOptions(**options)}),
        evaluators=("accuracy", NAME),
    )


def test_results_of_other_options_are_refused(tmp_path):
    options = evaluator_options(NAME, config_of(records=16))
    add_result(
        tmp_path, NAME, {"test": {"score": 1.0}}, options=options, files={}, records={"test": 5}
    )

    with pytest.raises(ConfigError, match=r"records=16, but this one has .*delete .* again"):
        missing_evaluators(tmp_path, config_of())


def test_an_option_that_a_later_command_does_not_name_keeps_its_value(tmp_path, caplog):
    first = config_of(records=16)
    first = replace(first, evaluate=replace(first.evaluate, region="masks", batch_size=32))
    save_config(tmp_path / CONFIG_NAME, to_plain_dict(first.shared) | {"inputs": {}})
    options = evaluator_options(NAME, first)
    add_result(tmp_path, NAME, {"test": {}}, options=options, files={}, records={"test": 5})
    caplog.set_level("INFO")

    later = replace(config_of(), command=("evaluate", "evaluate.batch_size=256"))
    kept = keep_options(later, tmp_path)

    assert kept.evaluate.region == "masks"
    assert kept.evaluate.of(GradientAlignmentOptions).records == 16
    assert kept.evaluate.batch_size == 256  # which the command names
    assert missing_evaluators(tmp_path, kept) == ("accuracy",)
    assert "evaluate.region=masks" in caplog.text
    assert keep_options(later, tmp_path / "elsewhere") is later
