"""Methods features and embedding: distances by hand, their invariances, and students without labels."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch

from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.methods import (
    EmbeddingConfig,
    FeaturesConfig,
    SeveralConfig,
    TeacherTermOptions,
)
from permafrost.config.store import PassOptions
from permafrost.config.training import TrainerOptions
from permafrost.core.batches import GridPlacement, Targets
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import covered_share
from permafrost.losses.base import StudentOutput, build_loss
from permafrost.losses.projected_features import (
    angle_loss,
    angle_relations,
    covered_cosine,
    distance_loss,
    distance_relations,
)
from permafrost.models.classifier import NO_INTERMEDIATES, Stage
from permafrost.runs.mirrors import RUNS
from permafrost.store.manifest import MovedFeatures
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost.training.step import batch_loss
from permafrost.training.student_passes import describe_moved_features_risk
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.e2kd.options import ReviewKDConfig
from tests.support.batches import FRAME, live_batch
from tests.support.live_trainings import training_with_live_teacher
from tests.support.outputs import student_output
from tests.support.ranks import join_group, leave_group, run_on_ranks
from tests.support.runs import TRAINER, distill_config
from tests.support.slow import slow, slow_except
from tests.support.stores import Frozen, precompute_config
from tests.support.tensors import gaussian
from tests.support.verbs import distill, precompute


def stages_of(*shapes):
    return tuple(
        Stage(values, values)
        for values in (gaussian(n, 2, *shape) for n, shape in enumerate(shapes))
    )


def targets_of(coverage=None, **intermediates):
    return Targets(
        teacher="t",
        logits=torch.zeros(2, 3).double(),
        intermediates=intermediates,
        coverage=coverage or {},
    )


def loss_and_value(config, student, targets):
    loss = build_loss(config)
    loss.build(student, targets)
    loss = loss.double()
    return loss, loss.compare(student, targets).item()


# ---- features --------------------------------------------------------------------------------------


def test_mse_is_that_of_the_mapped_averages_of_the_finer_grid():
    student = student_output(
        logits=torch.zeros(2, 3).double(), stages=stages_of((3, 8, 8), (5, 4, 4))
    )
    teacher = gaussian(9, 2, 6, 2, 2)
    config = FeaturesConfig(stages=(2,), teacher_stages=(3,), distance="mse")

    loss, found = loss_and_value(config, student, targets_of(features_3=teacher))

    (convolution,) = loss.maps
    averages = student.output.stages[1].output.unflatten(2, (2, 2)).unflatten(4, (2, 2))
    averages = averages.mean(dim=(3, 5))
    mapped = torch.einsum("tc,bcyx->btyx", convolution.weight[:, :, 0, 0], averages)
    mapped = mapped + convolution.bias[:, None, None]
    assert found == pytest.approx((mapped - teacher).square().mean().item())


def test_the_cosine_is_over_channels_and_does_not_see_lengths():
    student, teacher = gaussian(0, 2, 4, 3, 3), gaussian(1, 2, 4, 3, 3)
    lengths = gaussian(2, 2, 1, 3, 3).exp()

    cosines = [
        (s @ t / (s.norm() * t.norm())).item()
        for s, t in zip(
            student.permute(0, 2, 3, 1).reshape(-1, 4),
            teacher.permute(0, 2, 3, 1).reshape(-1, 4),
            strict=True,
        )
    ]

    expected = 1 - sum(cosines) / len(cosines)
    assert covered_cosine(student, teacher, None).item() == pytest.approx(expected)
    assert covered_cosine(student * lengths, teacher, None).item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_cells_outside_of_the_frame_count_nothing(distance):
    coverage = torch.ones(2, 1, 4, 4).double()
    coverage[:, :, :, 3:] = 0
    teacher = gaussian(9, 2, 6, 4, 4)
    other = torch.where(coverage > 0, teacher, 100.0)
    student = student_output(logits=torch.zeros(2, 3).double(), stages=stages_of((5, 4, 4)))
    torch.manual_seed(0)
    loss = build_loss(FeaturesConfig(distance=distance))
    loss.build(student, targets_of(features_1=teacher))
    loss = loss.double()

    first, second, everything = (
        loss.compare(student, targets_of(covered, features_1=values)).item()
        for covered, values in (
            ({"features_1": coverage}, teacher),
            ({"features_1": coverage}, other),
            ({}, other),
        )
    )

    assert first == pytest.approx(second)
    assert everything != pytest.approx(first, rel=1e-2)


def shift_of(x):
    """Matrices of two views whose x is `x` further to the right in the source."""
    shift = torch.eye(3).double().repeat(2, 1, 1)
    shift[:, 0, 2] = x
    return shift


def loss_in_view(student, shift, teacher, distance="mse", *, is_placed=True):
    """Loss of an 8x8 stage of a student and a 4x4 stage of its teacher in a view, with the convolution."""
    targets = replace(
        targets_of({"features_1": covered_share(shift, (4, 4))}, features_1=teacher),
        placements={"features_1": GridPlacement(source_from_view=shift)} if is_placed else {},
    )
    output = student_output(
        logits=torch.zeros(2, 3).double(), stages=(Stage(output=student, preactivation=student),)
    )
    torch.manual_seed(0)
    loss = build_loss(FeaturesConfig(distance=distance))
    loss.build(output, targets)
    loss = loss.double()
    return loss.maps[0], loss.compare(output, targets)


def test_cells_of_a_finer_student_outside_of_the_frame_count_nothing():
    """The first of eight columns is outside, which is half of the first of the teacher's four."""
    student, teacher = gaussian(0, 2, 5, 8, 8), gaussian(9, 2, 6, 4, 4)
    black = student.clone()
    black[..., 0] = 1000.0
    black.requires_grad_()

    convolution, found = loss_in_view(black, shift_of(-2 / 8), teacher)
    found.backward()

    pairs = student.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=3)  # [2, 5, 4, 4, 2]
    averages = pairs.mean(dim=4)
    averages[..., 0] = pairs[..., 0, 1]
    mapped = torch.einsum("tc,bcyx->btyx", convolution.weight[:, :, 0, 0], averages)
    mapped = mapped + convolution.bias[:, None, None]
    weights = torch.tensor([0.5, 1, 1, 1]).double().expand(2, 6, 4, 4)
    expected = ((mapped - teacher).square() * weights).sum() / weights.sum()
    assert found.item() == pytest.approx(expected.item())
    assert black.grad[..., 0].abs().max() == 0
    assert black.grad[..., 1].abs().min() > 0


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_view_inside_of_the_frame_is_compared_bit_for_bit_as_without_a_finer_coverage(distance):
    student, teacher = gaussian(0, 2, 5, 8, 8), gaussian(9, 2, 6, 4, 4)

    _, found = loss_in_view(student, shift_of(0.0), teacher, distance)
    _, without = loss_in_view(student, shift_of(0.0), teacher, distance, is_placed=False)
    _, outside = loss_in_view(student, shift_of(0.3), teacher, distance)

    assert torch.equal(found, without)
    assert not torch.equal(outside, without)


def test_pairs_count_from_the_deepest_stage_of_each_side_and_are_averaged():
    student = student_output(
        logits=torch.zeros(2, 3).double(), stages=stages_of((3, 8, 8), (5, 4, 4), (7, 2, 2))
    )
    targets = targets_of(
        features_2=gaussian(8, 2, 6, 4, 4),
        features_4=gaussian(9, 2, 9, 2, 2),
        features_pooled=gaussian(7, 2, 9),
    )

    loss, found = loss_and_value(
        FeaturesConfig(stages=(-1, -3)),
        student,
        targets_of(features_1=gaussian(7, 2, 2, 4, 4), **targets.intermediates),
    )
    crossed, _ = loss_and_value(
        FeaturesConfig(stages=(1, 2), teacher_stages=(4, 2)), student, targets
    )

    assert loss.pairs == [(2, "features_4"), (0, "features_1")]
    assert crossed.pairs == [(0, "features_4"), (1, "features_2")]
    singles = []
    for number in range(2):
        each = build_loss(FeaturesConfig())
        each.maps, each.pairs = loss.maps[number : number + 1], loss.pairs[number : number + 1]
        singles.append(
            each.compare(
                student, targets_of(features_1=gaussian(7, 2, 2, 4, 4), **targets.intermediates)
            ).item()
        )
    assert found == pytest.approx(sum(singles) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (4,)}, r"method\.stages=\[4\]: the student has stages 1, 2, 3"),
        ({"stages": (-4,)}, r"method\.stages=\[-4\]: the student has stages 1, 2, 3"),
        (
            {"stages": (1,), "teacher_stages": (9,)},
            r"teacher_stages=\[9\]: the targets have the teacher's stages 1, 2, 3, 4",
        ),
    ],
)
def test_stages_that_a_network_does_not_have_are_refused(options, message):
    teacher = BcosModelConfig(name="resnet18", width=4, stem="small")

    with pytest.raises(ConfigError, match=message):
        training_with_live_teacher(FeaturesConfig(**options), config=teacher)


# ---- relations of embeddings -----------------------------------------------------------------------


def test_relations_are_those_of_a_triangle():
    """A right angle at the first point, with sides of 3, 4 and 5."""
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])

    angles = angle_relations(points)

    assert torch.allclose(distance_relations(points), torch.tensor([3.0, 4.0, 5.0]) / 4)
    assert angles[0, 1, 2].item() == pytest.approx(0.0, abs=1e-6)
    assert angles[1, 0, 2].item() == pytest.approx(3 / 5)
    assert angles[2, 0, 1].item() == pytest.approx(4 / 5)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_relations_do_not_change_under_rotation_scaling_and_translation(loss):
    teacher = gaussian(0, 6, 4)
    rotation, _ = torch.linalg.qr(gaussian(1, 4, 4))

    similar = 3 * teacher @ rotation + gaussian(2, 4)
    sheared = teacher * torch.tensor([1.0, 1.0, 1.0, 4.0])

    assert loss(similar, teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss(sheared, teacher) > 1e-3


RELATIONS = EmbeddingConfig(lambda_embedding=0.0, lambda_distance=25.0, lambda_angle=50.0)


def learn_relations(config, distributed):
    """Loss on this rank's slice of eight records, and the gradient of a step."""
    loss = build_loss(config)
    loss.distributed = distributed
    weight = gaussian(0, 5, 4).requires_grad_()
    share = 8 // distributed.world_size
    rows = slice(distributed.rank * share, (distributed.rank + 1) * share)
    pooled = (gaussian(1, 8, 5) @ weight)[rows]
    student = student_output(logits=torch.zeros(share, 3).double(), pooled=pooled)
    targets = Targets(teacher="t", logits=None, intermediates={"pooled": gaussian(2, 8, 6)[rows]})
    found = loss(student, targets, torch.zeros(share, dtype=torch.int64))
    found.total.backward()
    terms = {name: distributed.mean(value.detach()) for name, value in found.terms.items()}
    return {"terms": terms, "gradient": distributed.mean(weight.grad)}


def relate_on_rank(rank, folder, config):
    torch.save(learn_relations(config, join_group(rank, folder)), folder / f"{rank}.pt")
    leave_group()


@pytest.mark.parametrize("is_term", [False, True])
def test_relations_on_two_ranks_are_those_of_one_process(tmp_path, is_term):
    config = RELATIONS
    if is_term:
        config = SeveralConfig(terms=(TeacherTermOptions(teacher="t", method=RELATIONS),))
    run_on_ranks(relate_on_rank, tmp_path, config)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    alone = learn_relations(config, DistributedContext())

    assert len(alone["terms"]) == 2
    assert min(alone["terms"].values()) > 1e-3
    for found in ranks:
        torch.testing.assert_close(found["gradient"], alone["gradient"])
        assert {name: value.item() for name, value in found["terms"].items()} == pytest.approx(
            {name: value.item() for name, value in alone["terms"].items()}
        )


def test_the_angle_term_is_the_mean_over_triples_of_different_records():
    student, teacher = gaussian(0, 5, 3), gaussian(1, 5, 4)

    def cosine(points, j, i, k):
        first, second = points[i] - points[j], points[k] - points[j]
        return first @ second / (first.norm() * second.norm())

    differences = torch.stack(
        [
            cosine(student, *triple) - cosine(teacher, *triple)
            for triple in itertools.permutations(range(5), 3)
        ]
    ).abs()
    huber = torch.where(differences < 1, differences.square() / 2, differences - 0.5)
    assert angle_loss(student, teacher).item() == pytest.approx(huber.mean().item())


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_records_with_equal_embeddings_have_finite_gradients(loss):
    student = gaussian(0, 1, 4).repeat(5, 1)
    student[4] += 1
    student.requires_grad_()

    value = loss(student, gaussian(1, 5, 3))
    value.backward()

    assert value > 0
    assert student.grad.isfinite().all()


# ---- embedding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_a_student_whose_mapped_embedding_is_the_teachers_has_a_term_of_zero(distance):
    basis = gaussian(0, 4, 9)
    student = StudentOutput(
        output=student_output(logits=torch.zeros(2, 3).double(), pooled=gaussian(1, 2, 9)).output
    )
    pooled = student.output.pooled
    loss, before = loss_and_value(
        EmbeddingConfig(distance=distance), student, targets_of(pooled=pooled @ basis.T)
    )
    loss.map.load_state_dict({"weight": basis, "bias": torch.zeros(4).double()})

    after = loss.compare(student, targets_of(pooled=pooled @ basis.T)).item()

    assert before > 1e-2
    assert after == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        FeaturesConfig(),
        EmbeddingConfig(),
        EmbeddingConfig(lambda_embedding=0.0, lambda_distance=25.0, lambda_angle=50.0),
    ],
    ids=["features", "embedding", "relations"],
)
def test_without_labels_and_logits_the_last_layer_is_not_trained(method):
    training = training_with_live_teacher(method)

    batch_loss(training, live_batch(0), FRAME).total.backward()

    reached = {name for name, p in training.model.named_parameters() if p.grad.any()}
    assert not training.loss.needs.labels
    assert {name.split(".")[0] for name in reached} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
    }


def test_terms_are_weighted_and_those_of_weight_zero_are_not_computed():
    method = EmbeddingConfig(
        lambda_ce=1.0, lambda_kd=2.0, lambda_embedding=3.0, lambda_distance=4.0, lambda_angle=5.0
    )
    training = training_with_live_teacher(method)
    training.model.eval()

    found = batch_loss(training, live_batch(0), FRAME)

    weights = {"ce": 1, "kd": 2, "embedding": 3, "distance": 4, "angle": 5}
    assert set(found.terms) == set(weights)
    total = sum(weights[name] * value.item() for name, value in found.terms.items())
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    labels = build_loss(EmbeddingConfig(lambda_ce=1.0, lambda_embedding=0.0))
    assert labels.needs.intermediates == NO_INTERMEDIATES
    assert labels.needs.outputs == ()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            FeaturesConfig,
            {"lambda_features": 0.0},
            r"or method\.lambda_features above 0, or nothing",
        ),
        (
            EmbeddingConfig,
            {"lambda_embedding": 0.0},
            r"or method\.lambda_angle above 0, or nothing",
        ),
        (FeaturesConfig, {"stages": ()}, r"method\.stages=\[\] names no stage"),
        (
            FeaturesConfig,
            {"stages": (1, 2), "teacher_stages": (1,)},
            r"method\.teacher_stages=\[1\] must name one stage, from 1 or from -1, for each of",
        ),
    ],
)
def test_options_that_train_nothing_or_do_not_fit_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


# ---- students of a pass ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_teacher):
    """Store with a pass of the canonical images, and one of two views of each, with all features."""
    options = PassOptions(batch_size=8, outputs=("logits", "features", "pooled"))
    path = tmp_path_factory.mktemp("features") / "store"
    flips = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
    views = RandomViewsConfig(count=2, seed=1)
    config = precompute_config(path, tiny_teacher, annotate=options, augment=flips, views=views)
    precompute.run(config)
    return Frozen(Store(path), config)


def doubt_of(store, *operations, lost=None, **options):
    """Return the doubts about a student of the pass, of which `lost` replaces what was measured."""
    (teacher,) = store.store.open_passes()
    if lost is not None:
        measured = MovedFeatures(records=8, lost=lost)
        teacher.manifest = replace(teacher.manifest, moved_features=measured)
    options = {"method": FeaturesConfig(), **options}
    config = distill_config(store, augment=AugmentOptions(operations=operations), **options)
    return describe_moved_features_risk(config, [teacher], build_loss(config.method))


def test_moved_features_that_are_worse_than_a_constant_are_named_with_their_number(store):
    shift, flip = (OperationConfig(kind=kind) for kind in ("pad_crop", "horizontal_flip"))
    lost = {"features_2": {"shift": 0.4, "flip": 1.6}, "features_3": {"shift": 1.21, "flip": 0.2}}

    assert doubt_of(store, shift, flip) == ""
    said = doubt_of(store, shift, flip, lost=lost)
    assert "features_3 of " in said
    assert "misses 1.21 of the teacher's variance after a shift" in said
    assert "flip" not in said
    assert "views=random, mode=replay" in said
    both = doubt_of(store, shift, flip, lost=lost, method=FeaturesConfig(stages=(2, 3)))
    assert "features_2" in both
    assert "1.60" in both
    assert doubt_of(store, flip, lost=lost) == ""
    assert doubt_of(store, replace(shift, padding=0), lost=lost) == ""


def test_views_of_which_nothing_was_measured_are_named_with_their_strength(store):
    crop = OperationConfig(kind="resized_crop")
    flip = OperationConfig(kind="vertical_flip")

    said = doubt_of(store, crop, flip)

    assert (
        "crops of 8% to 100% of the area (the smallest show 1.3 of 16 cells of features_3)" in said
    )
    assert "and vertical flips: features_3 of " in said
    assert "nothing says by how much" in said
    assert "evaluators=[equivariance]" in said
    assert "features_1, features_2, features_3" in doubt_of(store, crop, method=ReviewKDConfig())
    for options in (
        {"method": EmbeddingConfig()},
        {"method": FeaturesConfig(map_control="unaugmented")},
        {"method": FeaturesConfig(lambda_ce=1.0, lambda_features=0.0)},
        {"mode": "replay", "views": store.config.views},
    ):
        assert doubt_of(store, crop, **options) == ""
    rotation = OperationConfig(kind="rotation", degrees=0.0)
    assert doubt_of(store, rotation, replace(flip, p=0.0)) == ""


def test_a_student_is_warned_once_before_its_training(store, caplog):
    crop = AugmentOptions(operations=(OperationConfig(kind="resized_crop", scale=(0.25, 1.0)),))
    options = {"method": FeaturesConfig(), "trainer": replace(TRAINER, epochs=1)}

    with caplog.at_level(logging.WARNING):
        distill.run(distill_config(store, augment=crop, **options))
        distill.run(distill_config(store, run="other", **options))

    (said,) = [r.message for r in caplog.records if "approximate in these views" in r.message]
    assert "crops of 25% to 100%" in said


ALONE = {
    "features": FeaturesConfig(),
    "hint": FeaturesConfig(stages=(2,), teacher_stages=(3,), distance="mse", lambda_ce=1.0),
    "embedding": EmbeddingConfig(),
    "relations": EmbeddingConfig(lambda_kd=1.0, lambda_distance=1.0, lambda_angle=2.0),
}


@pytest.mark.parametrize("method", slow_except(("features", "relations"), ALONE))
@pytest.mark.parametrize("mode", ["frozen", slow("replay"), slow("live")])
def test_a_student_learns_from_features(store, mode, method):
    options = {"views": store.config.views} if mode == "replay" else {}
    if mode == "live":
        options = {"teacher": store.config.teacher}

    distill.run(distill_config(store, method=ALONE[method], mode=mode, **options))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["features", "relations"])
def test_a_frozen_student_is_a_live_one_where_the_view_is_the_canonical_one(store, method):
    """The first step has the same loss, up to the rounding of the stored features."""
    first = []
    for mode in ("frozen", "live"):
        teacher = {"teacher": store.config.teacher} if mode == "live" else {}
        config = distill_config(
            store, method=ALONE[method], mode=mode, run=mode, augment=AugmentOptions(), **teacher
        )
        distill.run(config)
        first.append(next(iter(read_metrics(RUNS / mode / "distill"))))

    for name in set(first[0]) & {"total", "features", "embedding", "distance", "angle", "kd"}:
        assert first[0][name] == pytest.approx(first[1][name], rel=5e-3), name


def test_several_teachers_and_too_few_records_are_refused(store, tiny_teacher):
    path = store.store.path
    annotate = PassOptions(batch_size=8, outputs=("logits", "pooled"), name="second")
    precompute.run(precompute_config(path, tiny_teacher, annotate=annotate))
    names = [folder.name for folder in Store(path).pass_folders()]
    assert len(names) == 2
    options = replace(distill_config(store).store, teacher=tuple(names))

    with pytest.raises(ConfigError, match=r"method=embedding supports one teacher, but .* names 2"):
        distill.run(distill_config(store, method=EmbeddingConfig(), store=options))
    with pytest.raises(
        ConfigError, match=r"lambda_angle compares 3 records, and trainer\.batch_size=2"
    ):
        distill_config(
            store, method=EmbeddingConfig(lambda_angle=1.0), trainer=TrainerOptions(batch_size=2)
        )
