"""Width of each subnet, so that networks of different numbers of superfeatures are compared at equal terms."""

from __future__ import annotations

from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import require

_TOLERANCE = 0.2
"""Largest part of the parameters by which a network of constant=parameters may differ from one superfeature's."""


def subnet_width(config: AdditiveModelConfig, outputs: int, *, inputs: int) -> int:
    """Return the width of each subnet, which `constant` derives from `width`.

    outputs  number of classes
    inputs   values of the input that all subnets read together: of an image or a row with name=mlp, channels otherwise

    Raises ConfigError if no width has nearly as many parameters as constant=parameters asks for.
    """
    match config.constant:
        case "subnet_width":
            return config.width
        case "total_width":
            return config.width // config.superfeatures
    wanted = count_subnet_parameters(config, 1, config.width, outputs, inputs)

    def difference(width: int) -> int:
        found = count_subnet_parameters(config, config.superfeatures, width, outputs, inputs)
        return abs(found - wanted)

    width = min(range(1, config.width + 1), key=difference)
    share = difference(width) / wanted
    require(
        share <= _TOLERANCE,
        f"constant=parameters: with superfeatures={config.superfeatures} and width={config.width} the subnets of "
        f"{width} units differ by {share:.0%} from the {wanted:,} parameters of one superfeature; raise width or lower "
        "superfeatures",
    )
    return width


def count_subnet_parameters(
    config: AdditiveModelConfig, subnets: int, width: int, outputs: int, inputs: int
) -> int:
    """Count the parameters of all subnets, without those of a trunk."""
    output = subnets * (width + 1) * outputs
    if config.name == "conv":
        norms = 2 * subnets * width * config.depth
        first, further = 9 * inputs * width, (config.depth - 1) * 9 * width**2
        return subnets * (first + further) + norms + output
    # Each column, pixel or channel of a group has one weight for each unit, each cell of a trunk shares those of its
    # subnet.
    shared = config.name == "trunk" and config.trunk_features == "cells"
    first = (inputs * (subnets if shared else 1) + subnets) * width
    return first + (config.depth - 1) * subnets * (width + 1) * width + output
