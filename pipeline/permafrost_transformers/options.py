"""Options of a network of transformers, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from permafrost.config.models import MODELS, LayerModelConfig
from permafrost.config.options import Role


@dataclass(frozen=True, kw_only=True)
class TransformersModelConfig(LayerModelConfig):
    """Network of transformers by its folder, or its id at the Hugging Face hub: google/vit-base-patch16-224."""

    implementation: ClassVar[str] = "permafrost_transformers.classifiers:PROVIDER"
    digests: ClassVar[str] = "permafrost_transformers.classifiers:file_digests"
    digests_in_passes: ClassVar[bool] = True

    kind: Literal["transformers"] = "transformers"
    prompts: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Text file for CLIP and SigLIP with a line per class, in the order of the classes: a photo of a cat. The logits
    are then the network's similarities of image and text. null takes the embedding of the image, without a head."""


MODELS["transformers"] = TransformersModelConfig
