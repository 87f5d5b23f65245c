"""Reference GradCAM by autograd, and networks for comparisons with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from permafrost.config.models import TorchvisionModelConfig
from permafrost.models.classifier import Classifier, Normalize
from permafrost.models.providers import build_model
from permafrost_timm.classifiers import TimmVit

NUM_CLASSES = 10


def torchvision_model(name: str, weights: str | None = "random", **options) -> Classifier:
    return build_model(TorchvisionModelConfig(name=name, weights=weights, **options), NUM_CLASSES)


def randomize_head(layer: nn.Linear) -> None:
    """Randomize a transformer's head, which is initialized with zeros and would give zero maps."""
    nn.init.normal_(layer.weight, std=0.5)


def timm_vit(global_pool: str = "token", **options) -> Classifier:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=32,
        patch_size=8,
        depth=2,
        num_heads=2,
        embed_dim=16,
        num_classes=NUM_CLASSES,
        global_pool=global_pool,
        **options,
    )
    randomize_head(network.head)
    return TimmVit("vit", Normalize((0.5,) * 3, (0.5,) * 3), network).eval()


def autograd_gradcam(features: Tensor, logits: Tensor, target_class: Tensor) -> Tensor:
    """GradCAM [B, E, 1, h, w] by definition, with the graph for second-order gradients."""
    maps = []
    for classes in target_class.T:
        score = logits.gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features, create_graph=True)
        alpha = gradient.mean(dim=(2, 3), keepdim=True)
        maps.append((alpha * features).sum(dim=1, keepdim=True).relu())
    return torch.stack(maps, dim=1)


def largest_relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, divided by the largest expected value unless that is zero."""
    difference = (found - expected).detach().abs().max()
    largest = expected.detach().abs().max()
    return float(difference / largest if largest > 0 else difference)


def gradcam_of_layer(
    network: nn.Module,
    layer: str,
    images: Tensor,
    *,
    channels_last: bool = False,
    reshape: Callable[[Tensor], Tensor] | None = None,
    rectified: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return logits [B, K] of any network, and GradCAM [B, h, w] of the highest one at a layer, by autograd.

    The rest of the network is differentiated with respect to a copy of the layer's output, whose grid [B, C, h, w]
    `reshape` returns.
    """
    network.eval()
    outputs: list[Tensor] = []

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().clone().requires_grad_())
        return outputs[0].clone()

    handle = network.get_submodule(layer).register_forward_hook(replace)
    returned = network(images)
    handle.remove()
    logits = getattr(returned, "logits", returned)
    (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), outputs)
    features = outputs[0].detach()
    if channels_last:
        reshape = partial(torch.permute, dims=(0, 3, 1, 2))
    if reshape is not None:
        features, gradient = reshape(features), reshape(gradient)
    alpha = gradient.mean(dim=(2, 3))
    maps = torch.einsum("bc,bchw->bhw", alpha, features)
    return logits.detach(), maps.relu() if rectified else maps
