"""GradCAM: closed forms against autograd and by hand, and heads without a closed form."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from permafrost.annotation.outputs import BatchInfo, MapsOutput
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Batch, StoredTargets
from permafrost.core.records import NO_CLASS
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.losses.e2kd import E2KDLoss
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Classifier, GapLinear, Normalize
from permafrost.models.explanations import gradcam, gradcam_from_head
from permafrost.models.providers import build_model, freeze
from permafrost.models.torchvision import TorchvisionClassifier, TorchvisionVit
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost_timm.classifiers import TimmClassifier, TimmVit
from permafrost_timm.options import TimmModelConfig
from tests.support.gradcam import (
    NUM_CLASSES,
    autograd_gradcam,
    largest_relative_difference,
    randomize_head,
    timm_vit,
    torchvision_model,
)
from tests.support.outputs import student_output
from tests.support.slow import slow
from tests.support.tensors import random_images

FRAME = (16, 16)


def torchvision_vit() -> Classifier:
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=NUM_CLASSES,
    )
    randomize_head(network.heads.head)
    return TorchvisionVit(TorchvisionModelConfig(name="vit"), network).eval()


def small_vgg() -> Classifier:
    """VGG's structure with one convolution and a narrow classifier."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    network = torchvision.models.VGG(nn.Identity(), num_classes=1, init_weights=False)
    network.features = trunk
    network.classifier = nn.Sequential(
        nn.Linear(8 * 49, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, NUM_CLASSES)
    )
    return TorchvisionClassifier(TorchvisionModelConfig(name="vgg"), network).eval()


AUTOGRAD_MODELS = {
    "vgg": small_vgg,
    "squeezenet": lambda: torchvision_model("squeezenet1_1").eval(),
    "mobilenet_v3": lambda: torchvision_model("mobilenet_v3_small").eval(),
    "torchvision_vit": torchvision_vit,
    "timm_vit": timm_vit,
    "timm_vit_map": lambda: timm_vit("map"),
    "timm_vit_registers": lambda: timm_vit(reg_tokens=2, init_values=0.5, qk_norm=True),
}


def model_with_top1(seed: int, *, top1: int | None = None) -> CifarResNet:
    """Network that predicts class `top1` for every input, by a bias, which does not affect GradCAM."""
    torch.manual_seed(seed)
    model = CifarResNet(CifarModelConfig(name="resnet8", width=4), NUM_CLASSES)
    if top1 is not None:
        model.linear.bias.data[top1] = 100.0
    return model.eval()


def same_frames(records: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (records, 3, *FRAME), generator=generator, dtype=torch.uint8)


def map_term_of_class(student: CifarResNet, batch: Batch, loss: E2KDLoss, explained: int) -> Tensor:
    """Map term of the loss for the student's maps of one class."""
    output = student(batch.inputs.float() / 255)
    target_class = torch.full((len(batch.inputs), 1), explained)
    maps = gradcam_from_head(output.features, student.linear.weight, target_class)
    (targets,) = view_targets(
        batch, TargetRequest((output.features.shape[-2], output.features.shape[-1]))
    )
    student = student_output(logits=output.logits, maps=maps, input_size=FRAME)
    return loss(student, targets, batch.labels).terms["map"]


# ---- heads without a closed form -----------------------------------------------------------------


@pytest.mark.parametrize("build", [torchvision_vit, timm_vit], ids=["torchvision", "timm"])
def test_a_class_token_sees_the_patches_at_the_last_blocks_input_only(build):
    model = build()
    images = random_images(32)
    output = model(images)
    network = model.network
    if build is torchvision_vit:
        x = network._process_input(model.normalize(images))
        x = torch.cat([network.class_token.expand(2, -1, -1), x], dim=1)
        tokens = network.encoder.layers(x + network.encoder.pos_embedding)
        logits = network.heads(network.encoder.ln(tokens)[:, 0])
    else:
        x = network._pos_embed(network.patch_embed(model.normalize(images)))
        tokens = network.blocks(x)
        logits = network.forward_head(network.norm(tokens))

    (at_output,) = torch.autograd.grad(logits[:, 3].sum(), tokens)
    (at_input,) = torch.autograd.grad(output.logits[:, 3].sum(), output.features)

    assert torch.allclose(logits, output.logits, atol=1e-6)
    assert (at_output[:, 1:] == 0).all()
    assert at_output[:, 0].count_nonzero() > 0
    assert (at_input != 0).all()


def test_fused_attention_has_no_second_derivative_and_the_head_avoids_it():
    query = torch.rand(1, 1, 4, 8, requires_grad=True)
    fused = F.scaled_dot_product_attention(query, query, query)
    (gradient,) = torch.autograd.grad(fused.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()

    for model in (torchvision_vit(), timm_vit()):
        maps = gradcam(model, model(random_images(32)), torch.tensor([[3], [1]]))
        maps.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", list(AUTOGRAD_MODELS))
def test_second_order_gradients_match_finite_differences(name):
    model = AUTOGRAD_MODELS[name]().double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator).double()
    target_class = torch.tensor([[3], [1]])
    parameters = list(model.parameters())
    directions = [
        torch.randn(p.shape, generator=generator).double() * p.detach().abs().mean()
        for p in parameters
    ]
    maps = gradcam(model, model(images), target_class)
    weights = torch.rand(maps.shape, generator=generator).double()

    gradients = torch.autograd.grad((weights * maps).sum(), parameters, materialize_grads=True)

    step = 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append((weights * gradcam(model, model(images), target_class)).sum())
    numeric = (values[0] - values[1]) / (2 * step)
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert model.head is None
    assert maps.count_nonzero() > 0
    assert abs(numeric) > 1e-12
    assert float(analytic) == pytest.approx(float(numeric), rel=1e-4)


@pytest.mark.parametrize("name", list(AUTOGRAD_MODELS))
def test_several_classes_are_explained_one_by_one(name):
    model = AUTOGRAD_MODELS[name]()
    output = model(random_images(32))
    target_class = torch.tensor([[3, 7], [1, 9]])
    expected = autograd_gradcam(output.features, output.logits, target_class)

    maps = gradcam(model, output, target_class)

    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= 1e-5


@pytest.mark.parametrize("name", list(AUTOGRAD_MODELS))
def test_a_frozen_models_trunk_gets_no_graph_and_its_maps_are_the_students(name):
    model = AUTOGRAD_MODELS[name]()
    images = random_images(32)
    target_class = torch.tensor([[3, NO_CLASS], [1, 0]])
    expected = gradcam(model, model(images), target_class)
    freeze(model)
    with torch.no_grad():
        output = model(images)

    maps = gradcam(model, output, target_class)

    assert expected.requires_grad
    assert expected.count_nonzero() > 0
    assert not maps.requires_grad
    assert not output.features.requires_grad
    assert maps[0, 1].count_nonzero() == 0
    assert largest_relative_difference(maps, expected) <= 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_student_with_a_frozen_trunk_still_gets_its_heads_gradient():
    model = small_vgg()
    model.network.features.requires_grad_(False)
    images = random_images(32)

    gradcam(model, model(images), torch.tensor([[3], [1]])).sum().backward()

    last = model.network.classifier[-1]
    assert last.weight.grad.count_nonzero() > 0
    assert all(parameter.grad is None for parameter in model.network.features.parameters())


def test_inference_mode_is_refused_where_the_head_must_be_differentiated():
    model = small_vgg()

    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        gradcam(model, model(random_images(32, 1)), torch.tensor([[3]]))


def test_an_active_dropout_is_part_of_the_gradient():
    model = torchvision_model("mobilenet_v2")
    images = random_images(64, 4)
    target_class = torch.tensor([[3], [1], [0], [2]])
    assert isinstance(model.eval().head, GapLinear)
    output = model.train()(images)
    expected = autograd_gradcam(output.features, output.logits, target_class)

    maps = gradcam(model, output, target_class)

    undropped = gradcam_from_head(output.features, model.network.classifier[1].weight, target_class)
    assert model.head is None
    assert largest_relative_difference(maps, expected) <= 1e-5
    assert largest_relative_difference(undropped, expected) > 1e-3


def test_a_timm_head_with_dropout_is_left_to_autograd_in_training():
    network = timm.create_model("resnet10t", num_classes=NUM_CLASSES, drop_rate=0.2)
    model = TimmClassifier("resnet10t", Normalize((0.5,) * 3, (0.5,) * 3), network)

    assert isinstance(model.eval().head, GapLinear)
    assert model.train().head is None


@pytest.mark.parametrize("build", [lambda: torchvision_model("resnet18"), small_vgg, timm_vit])
def test_maps_under_autocast_are_float32_and_keep_their_graph(build):
    model = build().eval()
    images = random_images(32)
    target_class = torch.tensor([[3], [1]])
    expected = gradcam(model, model(images), target_class).flatten()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        maps = gradcam(model, output, target_class)
        with torch.no_grad():
            without_graph = gradcam(model, model(images), target_class)
    maps.sum().backward()

    assert output.features.dtype == torch.bfloat16 or build is timm_vit
    assert maps.dtype == without_graph.dtype == torch.float32
    for found in (maps, without_graph):
        assert F.cosine_similarity(found.flatten(), expected, dim=0) > 0.98
    assert any(parameter.grad is not None for parameter in model.parameters())


# ---- the closed form by hand ---------------------------------------------------------------------


def test_gradcam_of_a_cifar_resnet_equals_autograd_gradcam():
    model = model_with_top1(0).double()
    output = model(same_frames(3).double() / 255)
    target_class = torch.tensor([[0, 1], [2, 3], [4, 5]])
    expected = autograd_gradcam(output.features, output.logits, target_class)

    maps = gradcam(model, output, target_class)

    assert maps.shape == (3, 2, 1, 4, 4)
    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= 1e-10


def test_gradcam_matches_a_hand_computed_map():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 1.0]]]])  # two channels of 1 x 2 cells
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])

    maps = gradcam_from_head(features, weight, torch.tensor([[1]]))

    # relu((1 - 3, 2 - 1)) / 2
    assert torch.equal(maps, torch.tensor([[[[[0.0, 0.5]]]]]))


def test_negative_class_gives_a_zero_map_and_leaves_its_neighbor_alone():
    features = torch.ones(2, 3, 4, 4)
    weight = torch.ones(5, 3)
    target_class = torch.tensor([[NO_CLASS, 0], [2, NO_CLASS]])

    maps = gradcam_from_head(features, weight, target_class)

    expected = torch.zeros(2, 2, 1, 4, 4)
    expected[0, 1] = expected[1, 0] = 3 / 16
    assert torch.equal(maps, expected)


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_gradcam_without_grad_equals_gradcam_with_grad(without_grad):
    model = model_with_top1(0)
    images = same_frames(3).float() / 255
    target_class = torch.tensor([[0], [1], [2]])
    expected = gradcam(model, model(images), target_class)

    with without_grad():
        maps = gradcam(model, model(images), target_class)

    assert expected.requires_grad
    assert expected.count_nonzero() > 0
    assert torch.equal(maps, expected)


def test_target_class_in_a_step_is_the_teachers_top1():
    label, student_top1, teacher_top1 = 0, 1, 2
    teacher, student = (
        freeze(model_with_top1(1, top1=teacher_top1)),
        model_with_top1(2, top1=student_top1),
    )
    inputs = same_frames(3)
    teacher_output = teacher(inputs.float() / 255)
    records = BatchInfo(("a", "b", "c"), torch.full((3,), label))
    output_kind = MapsOutput(PassOptions(), GradCamConfig())
    stored = output_kind.encode(teacher, teacher_output, records).values
    targets = StoredTargets(
        teacher="teacher",
        logits=teacher_output.logits,
        target_class=stored["target_class"].long(),
        maps=stored["map"].float(),
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
    optimizer = build_optimizer(OptimizerOptions(), list(student.parameters()))

    terms = batch_loss(Training(model=student, loss=loss, optimizer=optimizer), batch, FRAME)

    assert targets.target_class.flatten().tolist() == [teacher_top1] * 3
    assert (student(inputs.float() / 255).logits.argmax(dim=1) == student_top1).all()
    assert terms.statistics["valid_map_fraction"] > 0
    assert torch.equal(terms.terms["map"], map_term_of_class(student, batch, loss, teacher_top1))
    for other in (label, student_top1):
        assert not torch.equal(terms.terms["map"], map_term_of_class(student, batch, loss, other))


def timm_model(name: str) -> Classifier:
    return build_model(TimmModelConfig(name=name, weights="random"), NUM_CLASSES)


def resnet18_features(network: nn.Module, x: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def densenet121_features(network: nn.Module, x: Tensor) -> Tensor:
    return F.relu(network.features(x))


def convnext_features(network: nn.Module, x: Tensor) -> Tensor:
    return network.features(x)


def parameter_gradients(maps: Tensor, weights: Tensor, model: nn.Module) -> list[Tensor]:
    return torch.autograd.grad(
        (weights * maps).sum() + maps.square().sum(),
        list(model.parameters()),
        retain_graph=True,
        materialize_grads=True,
    )


def assert_same_maps_and_parameter_gradients(
    maps: Tensor, expected: Tensor, model: nn.Module, tolerance: float
) -> list[str]:
    """Compare maps and their gradients, and return the names of the parameters without a gradient in both."""
    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= tolerance
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0)).to(maps)
    gradients = parameter_gradients(maps, weights, model)
    expected_gradients = parameter_gradients(expected, weights, model)
    without_gradient = []
    names = [name for name, _ in model.named_parameters()]
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for name, found, wanted in zip(names, gradients, expected_gradients, strict=True):
        # Up to rounding, a bias before a norm has no gradient.
        if wanted.abs().max() <= largest * tolerance:
            without_gradient.append(name)
            assert found.abs().max() <= largest * tolerance, name
        else:
            assert largest_relative_difference(found, wanted) <= tolerance, name
    return without_gradient


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize(
    ("name", "forward_features", "head_layers", "blind"),
    [
        ("resnet18", resnet18_features, lambda net: net.fc, ["fc.bias"]),
        slow("densenet121", densenet121_features, lambda net: net.classifier, ["classifier.bias"]),
        pytest.param(
            "convnext_tiny",
            convnext_features,
            lambda net: nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), net.classifier),
            ["classifier.0.bias", "classifier.2.bias"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["resnet18", "densenet121", "convnext_tiny"],
)
def test_closed_form_equals_autograd_gradcam_in_map_and_all_parameter_gradients(
    name, forward_features, head_layers, blind, dtype, tolerance
):
    model = torchvision_model(name).to(dtype).eval()
    images = random_images(64).to(dtype)
    target_class = torch.tensor([[3, 7], [1, 9]])
    network = model.network
    features = forward_features(network, model.normalize(images))
    logits = head_layers(network)(features.mean(dim=(2, 3)))
    expected = autograd_gradcam(features, logits, target_class)

    maps = gradcam(model, model(images), target_class)

    assert model.head is not None
    assert largest_relative_difference(logits, network(model.normalize(images))) <= tolerance
    without_gradient = assert_same_maps_and_parameter_gradients(maps, expected, model, tolerance)
    assert without_gradient[-len(blind) :] == [f"inner.{name}" for name in blind]


@pytest.mark.parametrize(
    "build",
    [
        *(
            lambda name=name: torchvision_model(name)
            for name in ("mobilenet_v2", "shufflenet_v2_x0_5")
        ),
        *(
            slow(lambda name=name: torchvision_model(name))
            for name in ("efficientnet_b0", "googlenet", "mnasnet0_5", "regnet_y_400mf")
        ),
        lambda: timm_model("resnet10t"),
        *(
            slow(lambda name=name: timm_model(name))
            for name in ("convnext_atto", "efficientnet_lite0")
        ),
        lambda: timm_vit("avg"),
        lambda: timm_vit("avg", fc_norm=False),
        lambda: timm_vit("avg", class_token=False),
    ],
)
def test_closed_form_equals_autograd_gradcam_for_every_averaged_head(build):
    model = build().double().eval()
    side = 32 if isinstance(model, TimmVit) else 64
    images = random_images(side).double()
    target_class = torch.tensor([[3, 7], [1, 9]])
    output = model(images)
    expected = autograd_gradcam(output.features, output.logits, target_class)

    maps = gradcam(model, output, target_class)

    assert model.head is not None
    assert_same_maps_and_parameter_gradients(maps, expected, model, 1e-10)


def test_the_plain_class_weight_is_not_the_gradient_of_a_head_with_a_norm():
    model = torchvision_model("convnext_tiny").eval()
    with torch.no_grad():
        output = model(random_images(64))
        target_class = torch.tensor([[3], [1]])
        maps = gradcam(model, output, target_class).flatten(1)

        naive = gradcam_from_head(output.features, model.head.linear.weight, target_class)

    assert (F.cosine_similarity(maps, naive.flatten(1)) < 1 - 1e-3).any()
