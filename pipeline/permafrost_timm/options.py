"""Options of a network of timm, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from permafrost.config.models import MODELS, NormalizedModelConfig
from permafrost.config.options import Role


@dataclass(frozen=True, kw_only=True)
class TimmModelConfig(NormalizedModelConfig):
    """Image classifier of timm by its name, hf-hub:<owner>/<model> or local-dir:<folder>."""

    implementation: ClassVar[str] = "permafrost_timm.classifiers:PROVIDER"
    suits_channels_last: ClassVar[bool] = True

    kind: Literal["timm"] = "timm"
    name: str = "resnet18"
    license: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """License of a trained student as written to its export (an SPDX name); null writes none."""


MODELS["timm"] = TimmModelConfig
