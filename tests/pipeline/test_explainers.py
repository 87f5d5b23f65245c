"""The closed-form GradCAM against autograd, and the class that it explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
import torchvision

from pipeline.config import CifarModelConfig, E2KDConfig, GradCamConfig, OptimizerConfig, PassConfig
from pipeline.explainers.gradcam import gradcam, gradcam_from_head
from pipeline.geometry import view_targets
from pipeline.losses.e2kd import E2KDLoss
from pipeline.losses.terms import StudentOutput
from pipeline.models import freeze
from pipeline.models.cifar import CifarResNet
from pipeline.payloads.explanation_map import MapPayload
from pipeline.records import NO_CLASS, Batch, StoredTargets
from pipeline.training import Training, batch_loss, build_optimizer

if TYPE_CHECKING:
    from torch import Tensor, nn

NUM_CLASSES = 10
FRAME = (16, 16)


def resnet18() -> tuple[nn.Module, nn.Linear]:
    model = torchvision.models.resnet18(weights=None, num_classes=NUM_CLASSES)
    return model, model.fc


def resnet18_features(model: nn.Module, images: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


def densenet121() -> tuple[nn.Module, nn.Linear]:
    model = torchvision.models.densenet121(weights=None, num_classes=NUM_CLASSES)
    return model, model.classifier


def densenet121_features(model: nn.Module, images: Tensor) -> Tensor:
    return F.relu(model.features(images))


def autograd_gradcam(features: Tensor, logits: Tensor, explained_class: Tensor) -> Tensor:
    """GradCAM by its definition, with the graph of its second-order gradient: [B, E, 1, h, w]."""
    maps = []
    for classes in explained_class.T:
        score = logits.gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features, create_graph=True)
        alpha = gradient.mean(dim=(2, 3), keepdim=True)
        maps.append((alpha * features).sum(dim=1, keepdim=True).relu())
    return torch.stack(maps, dim=1)


def largest_relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; plain where all of those are zero."""
    difference = (found - expected).detach().abs().max()
    largest = expected.detach().abs().max()
    return float(difference / largest if largest > 0 else difference)


def tiny_model(seed: int, *, top1: int | None = None) -> CifarResNet:
    """A network whose highest logit is `top1` for every input: the bias never enters GradCAM."""
    torch.manual_seed(seed)
    model = CifarResNet(CifarModelConfig(name="resnet8", width=4), NUM_CLASSES)
    if top1 is not None:
        model.linear.bias.data[top1] = 100.0
    return model.eval()


def random_frames(records: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (records, 3, *FRAME), generator=generator, dtype=torch.uint8)


def map_term_of_class(student: CifarResNet, batch: Batch, loss: E2KDLoss, explained: int) -> Tensor:
    """The map term that the loss gives for the student's maps of one class."""
    output = student(batch.inputs.float() / 255)
    explained_class = torch.full((len(batch.inputs), 1), explained)
    maps = gradcam_from_head(output.features, student.linear.weight, explained_class)
    (targets,) = view_targets(batch, (output.features.shape[-2], output.features.shape[-1]))
    student_output = StudentOutput(logits=output.logits, maps=maps, input_size=FRAME)
    return loss(student_output, targets, batch.labels).terms["map"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize(
    ("build", "forward_features"),
    [(resnet18, resnet18_features), (densenet121, densenet121_features)],
    ids=["resnet18", "densenet121"],
)
def test_closed_form_equals_autograd_gradcam_in_map_and_all_parameter_gradients(
    build, forward_features, dtype, tolerance
):
    torch.manual_seed(0)
    model, head = build()
    model.to(dtype).eval()
    images = torch.randn(2, 3, 96, 96, dtype=dtype)
    explained_class = torch.tensor([[3, 7], [1, 9]])
    features = forward_features(model, images)
    logits = head(features.mean(dim=(2, 3)))
    expected = autograd_gradcam(features, logits, explained_class)

    maps = gradcam_from_head(features, head.weight, explained_class)

    weights = torch.randn_like(maps)
    gradients, expected_gradients = (
        torch.autograd.grad(
            (weights * candidate).sum() + candidate.square().sum(),
            list(model.parameters()),
            retain_graph=True,
            materialize_grads=True,
        )
        for candidate in (maps, expected)
    )
    assert largest_relative_difference(logits, model(images)) <= tolerance
    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= tolerance
    names = [name for name, _ in model.named_parameters()]
    without_gradient = []
    for name, found, wanted in zip(names, gradients, expected_gradients, strict=True):
        assert largest_relative_difference(found, wanted) <= tolerance, name
        if wanted.count_nonzero() == 0:
            without_gradient.append(name)
    assert without_gradient == [names[-1]]  # the head's bias


def test_gradcam_of_a_cifar_resnet_equals_autograd_gradcam():
    model = tiny_model(0).double()
    output = model(random_frames(3).double() / 255)
    explained_class = torch.tensor([[0, 1], [2, 3], [4, 5]])
    expected = autograd_gradcam(output.features, output.logits, explained_class)

    maps = gradcam(model, output, explained_class)

    assert maps.shape == (3, 2, 1, 4, 4)
    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= 1e-10


def test_gradcam_matches_a_hand_computed_map():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 1.0]]]])  # two channels of 1 x 2 places
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])

    maps = gradcam_from_head(features, weight, torch.tensor([[1]]))

    # relu((1 - 3, 2 - 1)) / 2
    assert torch.equal(maps, torch.tensor([[[[[0.0, 0.5]]]]]))


def test_negative_class_gives_a_zero_map_and_leaves_its_neighbour_alone():
    features = torch.ones(2, 3, 4, 4)
    weight = torch.ones(5, 3)
    explained_class = torch.tensor([[NO_CLASS, 0], [2, NO_CLASS]])

    maps = gradcam_from_head(features, weight, explained_class)

    expected = torch.zeros(2, 2, 1, 4, 4)
    expected[0, 1] = expected[1, 0] = 3 / 16
    assert torch.equal(maps, expected)


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_gradcam_without_grad_equals_gradcam_with_grad(without_grad):
    model = tiny_model(0)
    images = random_frames(3).float() / 255
    explained_class = torch.tensor([[0], [1], [2]])
    expected = gradcam(model, model(images), explained_class)

    with without_grad():
        maps = gradcam(model, model(images), explained_class)

    assert expected.requires_grad
    assert expected.count_nonzero() > 0
    assert torch.equal(maps, expected)


def test_explained_class_in_a_step_is_the_teachers_top1():
    label, student_top1, teacher_top1 = 0, 1, 2
    teacher, student = freeze(tiny_model(1, top1=teacher_top1)), tiny_model(2, top1=student_top1)
    inputs = random_frames(3)
    teacher_output = teacher(inputs.float() / 255)
    stored = MapPayload(PassConfig(), GradCamConfig()).encode(teacher, teacher_output).values
    targets = StoredTargets(
        teacher="teacher",
        logits=teacher_output.logits,
        explained_class=torch.from_numpy(stored["explained_class"]).long(),
        maps=torch.from_numpy(stored["map"]).float(),
        map_from_canonical=torch.eye(3).expand(3, 3, 3),
    )
    batch = Batch(
        keys=("a", "b", "c"),
        record_index=torch.arange(3),
        inputs=inputs,
        canonical_from_view=None,
        view_index=torch.zeros(3, dtype=torch.long),
        original_size=torch.full((3, 2), 32.0),
        labels=torch.full((3,), label),
        groups=torch.full((3,), -1),
        targets=(targets,),
    )
    loss = E2KDLoss(E2KDConfig())
    optimizer = build_optimizer(OptimizerConfig(), list(student.parameters()))

    terms = batch_loss(Training(model=student, loss=loss, optimizer=optimizer), batch, FRAME)

    assert targets.explained_class.flatten().tolist() == [teacher_top1] * 3
    assert (student(inputs.float() / 255).logits.argmax(dim=1) == student_top1).all()
    assert terms.statistics["valid_map_fraction"] > 0
    assert torch.equal(terms.terms["map"], map_term_of_class(student, batch, loss, teacher_top1))
    for other in (label, student_top1):
        assert not torch.equal(terms.terms["map"], map_term_of_class(student, batch, loss, other))
