"""Superfeature-explaining networks (KED): logits are the sum of those of M subnets, each on its own features.

    logits = sum_m z_m(x restricted to S_m),    softmax(logits) = prod_m softmax(z_m), normalized

The partition into superfeatures is stored with the weights, with all its levels, so a weights file is self-contained.
inputs.py has the networks on parts of the input, trunk.py those on a shared trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.additive.base import AdditiveClassifier
from permafrost.models.additive.inputs import AdditiveConv, AdditiveMlp
from permafrost.models.additive.partition import Partition
from permafrost.models.additive.trunk import build_trunk_network
from permafrost.models.classifier import Provider


def build_additive(config: AdditiveModelConfig, outputs: int) -> AdditiveClassifier:
    """Build the named network, newly initialized."""
    return _NETWORKS[config.name](config, outputs)


_NETWORKS: dict[str, Callable[[AdditiveModelConfig, int], AdditiveClassifier]] = {
    "mlp": AdditiveMlp,
    "conv": AdditiveConv,
    "trunk": build_trunk_network,
}


def network_partition(model: Any) -> Partition:
    """Return the partition of an additive network, or raise ConfigError for any other."""
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"{type(model.network).__name__} has no superfeatures, which method=ked and the payload "
            "superfeature_logits need; set teacher=additive, leave superfeature_logits out of annotate.payloads, or "
            "choose another method"
        )
    return model.partition


PROVIDER = Provider(build_additive, lambda config: None)
