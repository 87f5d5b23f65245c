"""Explainers `gradient`, `input_x_gradient`, `integrated_gradients` and `smoothgrad`: their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig

_MODULE = "permafrost_explainers.pixel_gradients"


@dataclass(frozen=True, kw_only=True)
class PixelConfig(ExplainerConfig):
    """Base class of the options of signed maps at the pixels, which are made by passes of their own."""

    reads: ClassVar[Literal["output", "images"]] = "images"


@dataclass(frozen=True, kw_only=True)
class GradientConfig(PixelConfig):
    """Gradient of the logit at the pixels, summed over the colors (Simonyan et al. 2014): one more pass."""

    implementation: ClassVar[str] = f"{_MODULE}:gradient"

    kind: Literal["gradient"] = "gradient"


@dataclass(frozen=True, kw_only=True)
class InputXGradientConfig(PixelConfig):
    """Pixel in [0, 1] times gradient, summed over the colors (Shrikumar et al. 2016): one more pass."""

    implementation: ClassVar[str] = f"{_MODULE}:input_x_gradient"

    kind: Literal["input_x_gradient"] = "input_x_gradient"


@dataclass(frozen=True, kw_only=True)
class IntegratedGradientsConfig(PixelConfig):
    """Integrated Gradients (Sundararajan et al. 2017), whose cells sum to the logit minus that of the baseline.

    A map takes `steps` passes of the network, and a step of a student keeps the graphs of all of them.
    """

    implementation: ClassVar[str] = f"{_MODULE}:integrated_gradients"

    kind: Literal["integrated_gradients"] = "integrated_gradients"
    steps: Annotated[int, Ge(1)] = 16
    """Points of the Gauss-Legendre rule on the straight line from the baseline to the image."""
    baseline: float = 0.0
    """Value of all pixels of the baseline, in units where 0 is black and 1 is white."""


@dataclass(frozen=True, kw_only=True)
class SmoothGradConfig(PixelConfig):
    """Mean gradient over noisy copies of the image (Smilkov et al. 2017), with the same noise for every image."""

    implementation: ClassVar[str] = f"{_MODULE}:smoothgrad"

    kind: Literal["smoothgrad"] = "smoothgrad"
    samples: Annotated[int, Ge(1)] = 16
    """Number of noisy copies, each of which is a pass of the network."""
    noise: Annotated[float, Gt(0)] = 0.15
    """Standard deviation of the noise, in units where 0 is black and 1 is white."""
    noise_seed: int = 0
    """Seed of the noise."""


EXPLAINERS["gradient"] = GradientConfig
EXPLAINERS["input_x_gradient"] = InputXGradientConfig
EXPLAINERS["integrated_gradients"] = IntegratedGradientsConfig
EXPLAINERS["smoothgrad"] = SmoothGradConfig
