"""The layers of a network by name, from the finest to the deepest, and which of two networks' belong together.

    layer1, layer2, ...   the ends of its stages, where those are known here (models/output.py)
    features              the explained layer, of networks whose stages are not (VGG, a ViT)
    pooled                the average over places of the deepest of them
    logits                of networks that show neither (an additive perceptron, a B-cos ViT)

Shape letters: B records, C channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.evaluation.forward import EvaluatedModel
from pipeline.models.classifier import Classifier
from pipeline.models.output import Intermediates

POOLED = "pooled"
_LOGITS = "logits"


def activations(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """What each layer but `pooled` says of images [B, 3, H, W]: [B, C, h, w]; logits are [B, K]."""
    try:
        output = model(images, Intermediates(stages=True))
    except ConfigError:  # its stages are not known here
        output = model(images)
    if output.stages:
        stages = enumerate(output.stages, start=1)
        return {f"layer{number}": stage.output.detach() for number, stage in stages}
    if model.explainer == "gradcam":
        return {"features": output.features.detach()}
    return {_LOGITS: output.logits.detach()}  # the features of such a network are its input


def layer_features(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features [B, p] of every layer, the activations flattened, with `pooled`."""
    features = {name: values.flatten(1) for name, values in found.items()}
    deepest = list(found.values())[-1]
    return features if deepest.dim() == 2 else features | {POOLED: pool(deepest)}


def pool(activation: Tensor) -> Tensor:
    """Averages over places, [B, C]."""
    return activation.mean(dim=(2, 3))


@torch.no_grad()
def layer_names(model: EvaluatedModel) -> list[str]:
    """Of a network, from the finest layer to the deepest; one blank image is asked."""
    blank = torch.zeros(1, 3, *model.input_size, device=model.device)
    return list(layer_features(activations(model.network, blank)))


def pair_layers(own: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Layers of one network -> those of another, from the deepest; the finer ones of the longer are left out."""
    paired = zip(reversed(own), reversed(others), strict=False)
    return dict(reversed(list(paired)))


def check_layers(
    option: str, named: Mapping[str, str], own: Sequence[str], others: Sequence[str]
) -> None:
    """ConfigError where an option names a layer that either network does not show."""
    for title, names, known in (
        ("the student", named.keys(), own),
        ("the teacher", named.values(), others),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{option} names {name}, which {title} does not show; it shows: {', '.join(known)}"
                )
