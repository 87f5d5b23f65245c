"""Layers of a network by name, from the finest to the deepest, and the pairing of two networks' layers.

    layer1, layer2, ...   ends of the stages, if they are known (models/output.py); for VGG before each pool
    features              the explained layer, for networks whose stages are not known (EfficientNet, a ViT)
    pooled                spatial average of the deepest of these layers
    logits                for networks that have neither (a perceptron, a B-cos ViT)

Shape letters: B records, C channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.models.classifier import Classifier
from permafrost.models.output import Intermediates

POOLED = "pooled"
_LOGITS = "logits"


def activations(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Activations [B, C, h, w] of each layer except `pooled` for images [B, 3, H, W], or logits [B, K]."""
    try:
        output = model(images, Intermediates(stages=True))
    except ConfigError:  # the stages of this network are not known
        output = model(images)
    if output.stages:
        stages = enumerate(output.stages, start=1)
        return {f"layer{number}": stage.output.detach() for number, stage in stages}
    if model.explainer == "gradcam":
        return {"features": output.features.detach()}
    return {_LOGITS: output.logits.detach()}  # the features of such a network are its input


def layer_features(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features [B, p] of every layer: the flattened activations, and `pooled`."""
    features = {name: values.flatten(1) for name, values in found.items()}
    deepest = list(found.values())[-1]
    return features if deepest.dim() == 2 else features | {POOLED: pool(deepest)}


def pool(activation: Tensor) -> Tensor:
    """Average an activation [B, C, h, w] over space: [B, C]."""
    return activation.mean(dim=(2, 3))


@torch.no_grad()
def layer_names(model: EvaluatedModel) -> list[str]:
    """Names of a network's layers from the finest to the deepest, found by a forward pass of one blank image."""
    blank = torch.zeros(1, 3, *model.input_size, device=model.device)
    return list(layer_features(activations(model.network, blank)))


def pair_layers(own: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Pair layers of one network with those of another, starting at the deepest.

    If one network has more layers, its finest ones are left out.
    """
    paired = zip(reversed(own), reversed(others), strict=False)
    return dict(reversed(list(paired)))


def check_layers(
    option: str, named: Mapping[str, str], own: Sequence[str], others: Sequence[str]
) -> None:
    """Raise ConfigError if an option names a layer that a network does not have."""
    for title, names, known in (
        ("the student", named.keys(), own),
        ("the teacher", named.values(), others),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{option} names {name}, which {title} does not have; its layers are: {', '.join(known)}"
                )
