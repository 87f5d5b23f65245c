"""Live teachers: their targets equal the stored ones, computed on the student's view."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import Needs, build_loss
from permafrost.models.classifier import Intermediates
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import explainer_named, gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost.training.targets import LiveTeacher
from permafrost_papers.bcos.options import BcosModelConfig
from tests.support.composition import config_of
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.verbs import distill, evaluate

SIZE = (16, 16)


@pytest.fixture
def live(frozen):
    config = frozen.config.teacher
    return LiveTeacher(config.name, freeze(build_model(config, 10)), gradcam, SIZE)


def live_batch_of(frozen, operations=()):
    store = frozen.store
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), store.open_passes())
    views = ViewSchedule(AugmentOptions(operations=operations), store.size, seed=0)
    return next(iter(TrainLoader(dataset, views, batch_size=16, seed=0).epoch(0)))


def cosines(one, other):
    return F.cosine_similarity(one.flatten(1), other.flatten(1))


def test_on_the_whole_frame_live_targets_are_the_stored_ones(frozen, live):
    batch = live_batch_of(frozen)

    (asked,) = live(batch, TargetRequest((4, 4)))
    (stored,) = view_targets(batch, TargetRequest((4, 4)))

    assert torch.equal(asked.target_class, stored.target_class)
    assert (asked.logits - stored.logits).abs().max() < 1e-2 * asked.logits.abs().max()
    assert asked.map_valid.any()
    assert torch.equal(asked.map_valid, stored.map_valid)
    assert cosines(asked.maps, stored.maps)[asked.map_valid[:, 0]].min() > 0.999


def test_a_frozen_and_a_live_step_without_views_have_the_same_gradient(frozen, live):
    """Property 30 on a store, whose logits and maps are float16."""
    batch = live_batch_of(frozen)
    torch.manual_seed(1)
    student = build_model(replace(frozen.config.teacher, weights=None), 10).eval()
    parameters = list(student.parameters())
    gradients = []
    for targets in (view_targets, live):
        training = Training(
            model=student,
            loss=build_loss(E2KDConfig(lambda_map=5.0)),
            optimizer=build_optimizer(OptimizerOptions(), parameters),
            targets=targets,
        )
        loss = batch_loss(training, batch, SIZE).total
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))

    frozen_gradient, live_gradient = gradients
    assert (frozen_gradient - live_gradient).norm() < 1e-2 * live_gradient.norm()


def test_a_live_teacher_sees_the_students_view(frozen, live):
    batch = live_batch_of(frozen, (OperationConfig(kind="horizontal_flip", p=1.0),))

    (asked,) = live(batch, TargetRequest((4, 4)))

    flipped = batch.inputs.flip(-1).float() / 255
    output = live.model(flipped)
    assert torch.allclose(asked.logits, output.logits, atol=1e-4)
    wanted = gradcam(live.model, output, asked.target_class)
    assert cosines(asked.maps, wanted)[asked.map_valid[:, 0]].min() > 0.9999
    (stored,) = view_targets(batch, TargetRequest((4, 4)))
    # The stored logits are those of the unflipped image.
    assert (asked.logits - stored.logits).abs().max() > 0.05


def test_a_live_teacher_of_another_size_fetches_its_own_pixels_and_its_map_lands_on_the_students_grid(
    frozen,
):
    config = frozen.config.teacher
    teacher = LiveTeacher("big", freeze(build_model(config, 10)), gradcam, (32, 32))
    batch = live_batch_of(frozen, (OperationConfig(kind="pad_crop", padding=3),))

    (asked,) = teacher(batch, TargetRequest((4, 4)))

    output = teacher.model(view_images(batch, (32, 32)))
    assert torch.equal(asked.logits, output.logits)
    maps = gradcam(teacher.model, output, asked.target_class)
    assert maps.shape[-2:] == (8, 8)
    # Bilinear sampling midway between four cells is their mean.
    pooled = F.avg_pool2d(maps[:, 0], 2)
    assert torch.allclose(asked.maps[:, 0], pooled, atol=1e-5 * float(maps.max()))


def test_the_shuffled_control_gives_a_neighbors_map(frozen, live):
    batch = live_batch_of(frozen)

    (right,), (wrong,) = (
        live(batch, TargetRequest((4, 4))),
        live(batch, TargetRequest((4, 4), "shuffled")),
    )

    assert torch.equal(wrong.maps, right.maps.roll(1, dims=0))
    assert torch.equal(wrong.logits, right.logits)


def test_a_live_teacher_has_the_fields_of_the_outputs_unless_the_loss_computes_its_own(
    frozen, live
):
    batch, request = live_batch_of(frozen), TargetRequest((4, 4), with_maps=False)
    needs = Needs(
        intermediates=Intermediates(stages=True, pooled=True), outputs=("attention", "pooled")
    )

    live.needs = needs
    (fields,) = live(batch, request)
    live.needs = replace(needs, target_fields=lambda output: {"own": output.pooled})
    (own,) = live(batch, request)

    assert set(fields.intermediates) == {"attention_1", "attention_2", "attention_3", "pooled"}
    assert own.intermediates.keys() == {"own"}
    assert torch.equal(own.intermediates["own"], fields.intermediates["pooled"])


def test_no_map_is_computed_where_the_loss_needs_none(frozen, live, monkeypatch):
    monkeypatch.setattr(live, "explain", None)

    (asked,) = live(live_batch_of(frozen), TargetRequest((4, 4), with_maps=False))

    assert type(asked) is Targets


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", [BcosModelConfig, CifarModelConfig])
@pytest.mark.parametrize("with_maps", [False, True])
def test_a_live_teacher_runs_once_in_any_precision(frozen, network, precision, with_maps):
    torch.manual_seed(0)
    model = freeze(build_model(network(name="resnet8", width=4), 10))
    explain = explainer_named(model.explainer)
    passes = []
    first = next(module for name, module in model.named_modules() if name.endswith("conv1"))
    first.register_forward_hook(lambda *_: passes.append(1))
    batch = live_batch_of(frozen)
    teacher = LiveTeacher("live", model, explain, SIZE, ComputeSettings(precision=precision))
    request = TargetRequest((4, 4), with_maps=with_maps)
    teacher(batch, request)  # which learns how the weights are cast
    passes.clear()

    (asked,) = teacher(batch, request)

    assert len(passes) == 1
    (exact,) = LiveTeacher("live", model, explain, SIZE)(
        batch, TargetRequest((4, 4), with_maps=with_maps)
    )
    if with_maps and network is BcosModelConfig:
        assert torch.equal(asked.logits, exact.logits)
        assert torch.equal(asked.maps, exact.maps)
    else:
        assert torch.equal(asked.logits, exact.logits) == (precision == torch.float32)


def test_a_live_student_needs_no_pass_and_is_not_the_frozen_one(frozen, monkeypatch):
    options = {"mode": "live", "teacher": frozen.config.teacher, "trainer": TRAINER}
    with monkeypatch.context() as patch:
        patch.setattr(Store, "open_passes", lambda *_: pytest.fail("a pass was opened"))
        distill.run(distill_config(frozen, run="live", **options))

    folder = (RUNS / "live" / "distill").absolute()
    assert SavedNetwork(folder).load()[1].teachers == ()
    inputs = (folder / "config.yaml").read_text()
    assert "live teacher:" in inputs


def test_a_live_student_is_evaluated_against_the_stores_pass(frozen):
    options = {"mode": "live", "teacher": frozen.config.teacher, "trainer": TRAINER}
    distill.run(distill_config(frozen, run="live", **options))

    metrics = evaluate.run(evaluate_config(frozen, run="live")).splits

    assert 0 <= metrics["test"]["agreement"] <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "teacher=none": "mode=live needs the teacher network",
        "method=labels": "method=labels uses no teacher",
        "teacher=cifar teacher.frame=center_crop": "a live teacher receives the student's view",
        "teacher=cifar method=e2kd method.map_control=unaugmented": "needs a stored map of another view",
    }.items(),
)
def test_what_a_live_run_cannot_be_is_said(words, message):
    with pytest.raises(ConfigError, match=message):
        config_of("distill", "mode=live", *words.split())


def test_teachers_maps_do_not_depend_on_who_asks(frozen, live):
    """The annotator and the live teacher compute the same explanation."""
    config = frozen.config
    annotator = TeacherAnnotator(
        *(config.teacher, 10, config.explainer, PassOptions(map_dtype="float32"), SIZE),
        torch.device("cpu"),
    )
    batch = live_batch_of(frozen)
    output = annotator._forward(view_images(batch, SIZE), annotator.output_kinds)

    (asked,) = live(batch, TargetRequest((4, 4)))

    assert torch.equal(asked.logits, output.logits)
    assert torch.equal(asked.maps, gradcam(annotator.model, output, asked.target_class))
