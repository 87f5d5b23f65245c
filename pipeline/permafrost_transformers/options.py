"""Options of a network of transformers, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from permafrost.config.models import MODELS, ModelConfig
from permafrost.config.options import Role
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class TransformersModelConfig(ModelConfig):
    """Image network of Hugging Face transformers: a folder or a hub id with its configuration, such as
    google/vit-base-patch16-224."""

    implementation: ClassVar[str] = "permafrost_transformers.networks:PROVIDER"
    digests: ClassVar[str] = "permafrost_transformers.networks:digest_prompts"

    kind: Literal["transformers"] = "transformers"
    name: str = ""
    """Folder, or id of the hub. weights=pretrained takes its weights, from safetensors; pretrained:<revision> those of
    a branch, tag or commit of the hub. null builds the network of its configuration anew. Its code is never run."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in [0, 1]; null takes that of the image processor."""
    std: tuple[float, ...] | None = None
    layer: str = ""
    """Name of the module that is explained, as with kind=module."""
    layout: Annotated[str, Role.IF_SET] = ""
    """Layout of its output, as with kind=module."""
    prompts: Annotated[str | None, Role.FILE, Role.IF_SET] = None
    """Text file with a line for each class, in the order of the classes, such as "a photo of a cat": makes CLIP or
    SigLIP a classifier, whose logits are the scaled cosines of image and texts. null has their embedding only."""

    def resolve(self, option: str, store: str, columns: int | None) -> Any:
        require(
            bool(self.name),
            f"{option}=transformers needs {option}.name=, a folder or an id of the hub, such as "
            "google/vit-base-patch16-224",
        )
        return super().resolve(option, store, columns)


MODELS["transformers"] = TransformersModelConfig
