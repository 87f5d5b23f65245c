"""KED's loss: limits, levels, controls and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from permafrost.config.augment import AugmentOptions, MixConfig, OperationConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.loading.geometry import TargetRequest
from permafrost.losses.base import StepInputs, build_loss
from permafrost.models.classifier import ModelOutput
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.store.codecs import decode_tensor
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost.training.targets import LiveTeacher
from permafrost_papers.ked.losses import (
    coarsen_targets,
    control_explanations,
    hint_fields,
    superfeature_loss,
)
from permafrost_papers.ked.options import AdditiveModelConfig, KEDConfig
from permafrost_papers.ked.partition import (
    Partition,
    class_centered,
    coarsen,
    hierarchy_of,
    require_same_level,
)
from permafrost_papers.ked.subnets import HIDDEN, LOGITS
from permafrost_papers.ked.superfeatures import SuperfeatureOutput
from tests.support.batches import live_batch, random_frames
from tests.support.outputs import student_output

B, M, K = 6, 4, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, NO_LABEL])


def superfeature_values(seed, *shape, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*(shape or (B, M, K)), generator=generator, dtype=dtype)


def ked_student(each):
    return student_output(logits=each.sum(dim=1), extras={LOGITS: each})


def targets_of(each):
    intermediates = {"superfeature_logits": class_centered(each)}
    return Targets(teacher="t", logits=each.sum(dim=1), intermediates=intermediates)


def value(method, student, teacher):
    return build_loss(method)(ked_student(student), targets_of(teacher), LABELS).total


# ---- the loss ------------------------------------------------------------------------------------


def test_a_superfeatures_loss_matches_hand_computation():
    teacher = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log()  # (3/4, 1/4) and (1/2, 1/2)
    student = torch.zeros(1, 2, 2)

    first = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)

    assert superfeature_loss(student, teacher, 1.0).item() == pytest.approx(first / 2, abs=1e-6)
    assert superfeature_loss(2 * student, 2 * teacher, 2.0).item() == pytest.approx(
        4 * first / 2, abs=1e-6
    )


@pytest.mark.parametrize("hard_weight", ["complement", "one"])
def test_the_terms_mix_as_the_paper_says(hard_weight):
    student, teacher = superfeature_values(0), superfeature_values(1)
    method = KEDConfig(
        tau=3.0, tau_superfeatures=0.5, lambda_ked=0.7, mu=0.25, hard_weight=hard_weight
    )

    found = build_loss(method)(ked_student(student), targets_of(teacher), LABELS)

    def kl(own, taught, tau):
        p = (taught / tau).softmax(dim=-1)
        return tau**2 * (p * (p.log() - (own / tau).log_softmax(dim=-1))).sum(dim=-1)

    ce = F.cross_entropy(student.sum(dim=1)[:5], LABELS[:5])
    kd = kl(student.sum(dim=1), teacher.sum(dim=1), 3.0).mean()
    ked = kl(student, teacher, 0.5).mean(dim=1).mean()
    weight = 0.3 if hard_weight == "complement" else 1.0
    expected = weight * ce + 0.7 * 0.75 * kd + 0.7 * 0.25 * ked
    assert set(found.terms) == {"ce", "kd", "ked"}
    assert torch.allclose(found.total, expected, rtol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_of_one_superfeature_and_one_temperature_it_is_kd_for_every_mu(mu):
    student, teacher = superfeature_values(0, B, 1, K), superfeature_values(1, B, 1, K)

    found = value(KEDConfig(lambda_ked=0.8, mu=mu), student, teacher)

    kd = value(KDConfig(tau=4.0, lambda_ce=0.2, lambda_kd=0.8), student, teacher)
    assert torch.allclose(found, kd, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (KEDConfig(mu=0.0, lambda_ked=0.8), KDConfig(tau=4.0, lambda_ce=1 - 0.8, lambda_kd=0.8)),
        (KEDConfig(lambda_ked=0.0), LabelsConfig()),
    ],
)
def test_without_mu_it_is_kd_and_without_lambda_supervised_and_asks_for_nothing_inside(
    method, plain
):
    student, teacher = superfeature_values(0), superfeature_values(1)
    needs = build_loss(method).needs

    assert torch.equal(value(method, student, teacher), value(plain, student, teacher))
    assert (needs.target_fields, needs.outputs, needs.labels) == (None, (), True)


def test_equal_networks_cost_nothing_and_pull_nowhere():
    teacher = superfeature_values(0)
    student = (teacher + 3.0).requires_grad_()  # shifted by a constant

    total = value(KEDConfig(lambda_ked=1.0), student, teacher)
    (gradient,) = torch.autograd.grad(total, student)

    assert total.abs() < 1e-12
    assert gradient.abs().max() < 1e-12
    assert not build_loss(KEDConfig(lambda_ked=1.0)).needs.labels


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_gradients_are_finite_with_logits_of_a_thousand(tau):
    student = superfeature_values(0, scale=1e3, dtype=torch.float32).requires_grad_()
    teacher = superfeature_values(1, scale=1e3, dtype=torch.float32)

    total = value(KEDConfig(tau=tau, tau_superfeatures=tau), student, teacher)
    (gradient,) = torch.autograd.grad(total, student)

    assert total.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_hint_has_a_weight_of_its_own(mu):
    each, taught = superfeature_values(0), superfeature_values(1)
    hidden, wanted = superfeature_values(2, B, M, 3), superfeature_values(3, B, M, 2)
    student = student_output(logits=each.sum(dim=1), extras={LOGITS: each, HIDDEN: hidden})
    targets = targets_of(taught)
    targets = replace(
        targets, intermediates=targets.intermediates | {"superfeature_hidden": wanted}
    )
    plain = build_loss(KEDConfig(mu=mu))(student, targets, LABELS)
    loss = build_loss(KEDConfig(mu=mu, lambda_hint=7.0))
    loss.build(student, targets)
    loss.double()

    found = loss(student, targets, LABELS)

    error = (hidden @ loss.hint.weight.T + loss.hint.bias - wanted).square().mean()
    assert set(found.terms) == {*plain.terms, "hint"}
    assert torch.allclose(found.terms["hint"], error, rtol=1e-12)
    assert torch.allclose(found.total, plain.total + 7.0 * error, rtol=1e-12)
    assert loss.needs.target_fields is hint_fields


# ---- controls ------------------------------------------------------------------------------------


def test_controls_spoil_the_explanations_and_leave_their_scale():
    teacher = class_centered(superfeature_values(1) * torch.arange(1, B + 1)[:, None, None])
    torch.manual_seed(0)

    shuffled, noise = (control_explanations(teacher, c) for c in ("shuffled", "noise"))

    assert control_explanations(teacher, "none") is teacher
    assert torch.equal(shuffled[1:], teacher[:-1])
    deviations = [t.std(dim=(1, 2), correction=0) for t in (noise, teacher)]
    assert torch.allclose(*deviations)
    assert noise.mean(dim=2).abs().max() < 1e-12
    cosine = F.cosine_similarity(noise.flatten(), teacher.flatten(), dim=0)
    assert abs(cosine) < 0.4


@pytest.mark.parametrize("control", ["shuffled", "noise"])
def test_controls_change_the_explanation_term_alone(control):
    student, teacher = superfeature_values(0), superfeature_values(1)

    terms = [
        build_loss(method)(ked_student(student), targets_of(teacher), LABELS).terms
        for method in (KEDConfig(), KEDConfig(superfeature_control=control))
    ]

    assert torch.equal(terms[0]["kd"], terms[1]["kd"])
    assert not torch.allclose(terms[0]["ked"], terms[1]["ked"])


# ---- levels --------------------------------------------------------------------------------------

FINE = Partition(assignments=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 2, 1, 1], [0, 2, 1, 3]]))
"""Hierarchy of a table of four columns, from one group to four."""


def test_a_student_of_fewer_superfeatures_learns_from_the_teachers_sums():
    teacher, student = superfeature_values(0), superfeature_values(1, B, 2, K)

    united = coarsen_targets(targets_of(teacher), FINE.coarsening(2))

    expected = torch.stack([teacher[:, [0, 2]].sum(dim=1), teacher[:, [1, 3]].sum(dim=1)], dim=1)
    assert torch.allclose(united.intermediates["superfeature_logits"], class_centered(expected))
    assert torch.equal(united.logits, teacher.sum(dim=1))
    found = build_loss(KEDConfig())(ked_student(student), united, LABELS).terms["ked"]
    assert torch.allclose(found, superfeature_loss(student, expected, 4.0))


def test_a_student_of_more_superfeatures_is_united_itself():
    teacher, student = superfeature_values(0, B, 2, K), superfeature_values(1)
    loss = build_loss(KEDConfig(superfeatures=2))

    loss.student_coarsening = FINE.coarsening(2)

    found = loss(ked_student(student), targets_of(teacher), LABELS).terms["ked"]
    expected = superfeature_loss(coarsen(student, FINE.coarsening(2), 2), teacher, 4.0)
    assert torch.allclose(found, expected)


def test_levels_that_differ_or_are_not_there_are_refused():
    student = hierarchy_of(FINE)
    truncated = hierarchy_of(Partition(assignments=FINE.assignments[:2]))
    other = hierarchy_of(Partition(assignments=FINE.assignments.flip(1)[:, [0, 2, 1, 3]][:1]))
    mixed = hierarchy_of(Partition(assignments=torch.tensor([[0] * 4, [0, 1, 0, 1]])))

    require_same_level(student, truncated, 2, "t")
    require_same_level(student, other, 1, "t")
    require_same_level(student, mixed, 1, "t")
    for teacher, number, message in (
        (truncated, 4, r"t has 2 superfeatures.*method.superfeatures=2.*student.superfeatures=2"),
        (student, 5, r"method.superfeatures=5 is finer than the student's 4 .*lower it"),
        (mixed, 2, r"differently into 2 superfeatures.*student.partition"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_same_level(student, teacher, number, "t")


# ---- stored fields -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-5), ("int8", 2e-3)])
def test_stored_superfeatures_are_class_centered_and_come_back(dtype, most):
    each = superfeature_values(0, 64, 8, 100, scale=3.0, dtype=torch.float32) + 5
    output = ModelOutput(each.sum(dim=1), each, extras={LOGITS: each})
    output_kind = SuperfeatureOutput(PassOptions(added={"superfeature_dtype": dtype}), None)

    spec, scale = output_kind.fields(None, output)
    encoded = output_kind.encode(None, output, None)

    assert (spec.name, spec.shape, spec.dtype) == ("superfeature_logits", (8, 100), dtype)
    assert (spec.codec, spec.when_moved, spec.frame) == ("maxabs", "refuse", None)
    assert (scale.name, scale.shape, scale.dtype) == ("superfeature_logits_scale", (8,), "float32")
    stored, scales = (
        encoded.values["superfeature_logits"],
        encoded.values["superfeature_logits_scale"],
    )
    assert stored.dtype == getattr(torch, dtype)
    assert encoded.fidelity["superfeature_logits"] > 0.999
    back = decode_tensor(stored) * scales[:, :, None]
    assert (back - class_centered(each)).abs().max() < 0.06
    for own, taught in ((back, each), (back.sum(dim=1), each.sum(dim=1))):
        q, p = own.log_softmax(dim=-1), taught.log_softmax(dim=-1)
        assert (p.exp() * (p - q)).sum(dim=-1).mean() < most


# ---- training steps ------------------------------------------------------------------------------

SIDE = 32
CONV = AdditiveModelConfig(name="conv", superfeatures=M, grid=(4, 4), width=3)
METHODS = {
    "ked": KEDConfig(),
    "chimeras": KEDConfig(chimera_fraction=0.5),
    "hint": KEDConfig(lambda_hint=10.0),
    "kd_hint": KEDConfig(mu=0.0, lambda_hint=10.0),
}


MOVING = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
TEACHER = replace(CONV, weights="random")


def ked_config(**options):
    return DistillConfig(
        store=StoreOptions(path="store"),
        optimizer=OptimizerOptions(),
        subset=SubsetOptions(),
        **{
            "student": CONV,
            "method": KEDConfig(),
            "augment": AugmentOptions(),
            "trainer": TrainerOptions(),
            **options,
        },
    )


def ked_training(method):
    torch.manual_seed(0)
    teacher, model = freeze(build_model(CONV, K)), build_model(CONV, K)
    loss = build_loss(method)
    loss.plan(ked_config(method=method, mode="live", teacher=TEACHER), [], K)
    size = random_frames(0).shape[-2:]
    targets = LiveTeacher("t", teacher, gradcam, size, needs=loss.needs)
    batch = live_batch(0)
    output = model(batch.inputs / 255)
    student = student_output(logits=output.logits, extras=output.extras)
    loss.build(student, targets(batch, TargetRequest((4, 4), with_maps=False))[0])
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer = build_optimizer(OptimizerOptions(), parameters)
    training = Training(model=model, loss=loss, optimizer=optimizer, targets=targets)
    return training, batch, size


@pytest.mark.parametrize("name", METHODS)
def test_a_step_beside_a_live_teacher_reaches_every_parameter(name):
    training, batch, size = ked_training(METHODS[name])

    terms = batch_loss(training, batch, size)
    terms.total.backward()

    has_hint = "hint" in name
    assert set(terms.terms) == {
        *("ce", "kd"),
        *([] if name == "kd_hint" else ["ked"]),
        *(["hint"] if has_hint else []),
    }
    for parameter in [*training.model.parameters(), *training.loss.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert len(list(training.loss.parameters())) == (2 if has_hint else 0)


def test_chimeras_in_a_step_are_what_the_teacher_would_have_said():
    training, batch, _ = ked_training(METHODS["chimeras"])
    torch.manual_seed(3)
    images = batch.inputs / 255
    (targets,) = training.targets(batch, TargetRequest((4, 4), with_maps=False))

    inputs = StepInputs(images=images, labels=batch.labels)
    (chimeras,) = training.loss.transforms
    inputs = chimeras(inputs, batch)
    mixed, labels, (change,) = inputs.images, inputs.labels, inputs.on_targets
    taught = change(targets)

    torch.manual_seed(0)
    teacher = freeze(build_model(CONV, K))
    asked = teacher(mixed)
    assert len(mixed) == len(images) + len(images) // 2
    assert torch.allclose(
        taught.intermediates["superfeature_logits"], class_centered(asked.extras[LOGITS]), atol=1e-5
    )
    said, would_say = (t.softmax(dim=1) for t in (taught.logits, asked.logits))
    assert torch.allclose(said, would_say, atol=1e-5)
    assert labels.tolist() == [*batch.labels.tolist(), *[NO_LABEL] * (len(images) // 2)]


# ---- options -------------------------------------------------------------------------------------


def test_views_that_move_are_refused_where_explanations_cannot():
    with pytest.raises(ConfigError, match=r"operations.*augment=none.*mode=replay.*allow_view_mis"):
        ked_config(augment=MOVING)
    ked_config()
    ked_config(augment=MOVING, mode="replay")
    ked_config(augment=MOVING, mode="live", teacher=TEACHER)
    ked_config(augment=MOVING, method=KEDConfig(allow_view_mismatch=True))
    ked_config(augment=MOVING, method=KEDConfig(mu=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": CifarModelConfig()}, r"student=cifar has none: set student=additive"),
        (
            {"method": KEDConfig(mu=0.0, lambda_hint=1.0), "augment": MOVING},
            r"superfeatures of method=ked cannot be warped.*augment=none",
        ),
        (
            {
                "method": KEDConfig(mu=0.0, lambda_hint=1.0),
                "student": CifarModelConfig(),
                "mode": "live",
                "teacher": TEACHER,
            },
            r"student=cifar has none.*method.lambda_hint=0",
        ),
        (
            {"method": KEDConfig(chimera_fraction=0.5), "student": AdditiveModelConfig()},
            r"chimera_fraction=0.5.*student.name=conv or mlp",
        ),
        (
            {
                "method": KEDConfig(chimera_fraction=0.5),
                "mode": "live",
                "teacher": TEACHER,
                "augment": AugmentOptions(mix=(MixConfig(kind="mixup"),)),
            },
            r"augment.mix mixes them; set augment.mix=\[\], or",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ked_config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_ked": 1.1}, r"method.lambda_ked must be in \[0, 1\], got 1.1"),
        ({"mu": -0.1}, r"method.mu must be in \[0, 1\]"),
        ({"tau": 0.0}, r"method.tau must be > 0"),
        ({"tau_superfeatures": 0.0}, r"method.tau_superfeatures must be > 0"),
        ({"lambda_hint": -1.0}, r"method.lambda_hint must be >= 0"),
        ({"superfeature_control": "noise", "mu": 0.0}, r"superfeature_control=noise belongs to"),
        ({"superfeatures": 0}, r"method.superfeatures must be >= 1 or null"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KEDConfig(**options)


def test_many_labels_are_refused():
    with pytest.raises(ConfigError, match=r"method=kd method.logits=mld"):
        build_loss(KEDConfig()).check_labels(many=True)


def test_hidden_layers_of_other_levels_are_refused():
    hidden = torch.zeros(B, M, 3)
    student = student_output(
        logits=torch.zeros(B, K), extras={LOGITS: superfeature_values(0), HIDDEN: hidden}
    )
    targets = targets_of(superfeature_values(1, B, 2, K))
    targets = replace(
        targets, intermediates=targets.intermediates | {"superfeature_hidden": hidden[:, :2]}
    )

    with pytest.raises(ConfigError, match=r"have 4, 2 and 2 superfeatures.*method.lambda_hint=0"):
        build_loss(KEDConfig(lambda_hint=1.0)).build(student, targets)
