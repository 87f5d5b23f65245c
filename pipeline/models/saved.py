"""A trained network on disk: model.safetensors, and model.json with everything needed to build it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.builder import build_config
from pipeline.config.models import MODELS, TimmModelConfig
from pipeline.config.runs import to_plain_dict
from pipeline.config.store import JPEG_DECODERS, JpegDecoder, SubsetOptions
from pipeline.core.errors import ConfigError
from pipeline.core.files import write_atomically
from pipeline.models.trained_weights import (
    DESCRIPTION_NAME,
    FILES_OF_A_NETWORK,
    MODEL_NAME,
)

if TYPE_CHECKING:
    from pipeline.config.models import ModelConfig
    from pipeline.models.classifier import Classifier

EXPORT_FOLDER = "export"


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Content of model.json: everything needed in addition to the weights to build the network again."""

    config: ModelConfig
    num_classes: int
    input_size: tuple[int, int]
    """Input size (height, width)."""
    classes: tuple[str, ...] = ()
    """Class names, if the outputs are the classes of the data."""
    teachers: tuple[str, ...] = ()
    """Names of the passes it was trained on."""
    split: str = "train"
    subset: SubsetOptions = field(default_factory=SubsetOptions)
    """Subset of the split that it was trained on, so that the held-out records can be evaluated."""
    jpeg_decoder: JpegDecoder = "cpu"
    """Device that decoded the JPEGs that it was trained on."""


def is_finished(folder: Path) -> bool:
    """Return whether the folder contains a trained model, whose description is written last."""
    return (folder / DESCRIPTION_NAME).exists()


def save_model(folder: Path, model: Classifier, trained: TrainedModel) -> None:
    """Write the weights, then the description that marks the run as finished.

    The weights have the names of their provider. A timm network is also exported to export/ in the format of timm's
    hub, and loads from there with timm.create_model("local-dir:<folder>").
    """
    from safetensors.torch import save

    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.network.state_dict().items()
    }
    write_atomically(folder / MODEL_NAME, save(state))
    if isinstance(trained.config, TimmModelConfig):
        from pipeline.models.timm import save_for_hub

        save_for_hub(
            model,
            folder / EXPORT_FOLDER,
            trained.config,
            name=folder.parent.name or folder.name,
            classes=trained.classes,
            num_classes=trained.config.classes or trained.num_classes,
            size=trained.input_size,
        )
    description = {
        "model": to_plain_dict(trained.config),
        "num_classes": trained.num_classes,
        "classes": list(trained.classes),
        "input_size": list(trained.input_size),
        "teachers": list(trained.teachers),
        "split": trained.split,
        "subset": to_plain_dict(trained.subset),
        "jpeg_decoder": trained.jpeg_decoder,
    }
    write_atomically(folder / DESCRIPTION_NAME, json.dumps(description, indent=1).encode())


def load_model(folder: Path) -> tuple[Classifier, TrainedModel]:
    """Load the trained network of a finished run, frozen, and its description."""
    from pipeline.models.providers import build_model, freeze
    from pipeline.models.weights import load_weights

    trained = read_description(folder)
    model = build_model(trained.config, trained.num_classes)
    load_weights(model, folder / MODEL_NAME)
    return freeze(model), trained


def read_description(folder: Path) -> TrainedModel:
    """Read model.json of a finished run."""
    if not is_finished(folder):
        raise ConfigError(f"{folder} holds no finished model; run its stage first, or correct run=")
    values = json.loads((folder / DESCRIPTION_NAME).read_text())
    kind = values["model"]["kind"]
    if kind not in MODELS:
        raise ConfigError(
            f"{folder / DESCRIPTION_NAME} names a network of kind {kind}, which is not among "
            f"{', '.join(MODELS)}; name the plug-in that adds it in PERMAFROST_PLUGINS"
        )
    return TrainedModel(
        # The trained weights, with any partition, are next to the description, so the original files are not needed.
        config=build_config(
            MODELS[kind],
            values["model"]
            | {name: None for name in FILES_OF_A_NETWORK if name in values["model"]},
            DESCRIPTION_NAME,
        ),
        num_classes=values["num_classes"],
        classes=tuple(values["classes"]),
        input_size=tuple(values["input_size"]),
        teachers=tuple(values["teachers"]),
        split=values["split"],
        subset=build_config(SubsetOptions, values["subset"], "subset"),
        jpeg_decoder=values.get("jpeg_decoder", JPEG_DECODERS[0]),  # older files have no entry
    )
