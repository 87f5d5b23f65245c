"""Levels to compare with: what untrained networks of the same architecture have on the same records.

A network that has learned nothing also has an FSS or a cosine of maps other than 0, as it sees the same images. The
store keeps the results (<store>/artifacts/random-network-<fp8>/), so that other students of that architecture reuse
them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.config.builder import to_plain_dict
from permafrost.config.evaluation import EVALUATORS
from permafrost.core.digests import plain_values
from permafrost.core.errors import require
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import evaluator_named
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.evaluation.per_label import AT_HALF
from permafrost.evaluation.results import PER_LABEL, evaluator_options
from permafrost.models.classifier import Classifier
from permafrost.models.cost import sha256_tensors
from permafrost.models.providers import build_untrained, freeze
from permafrost.models.saved import TrainedModel
from permafrost.store.artifacts import Artifact

logger = logging.getLogger("permafrost.evaluate")


def untrained_network(trained: TrainedModel, model: EvaluatedModel, number: int) -> Classifier:
    """Build an untrained network with the architecture and the normalization of an evaluated one, on the CPU."""
    config = replace(trained.config, weights=None, weights_key=None, sha256=None)
    network = build_untrained(config, config.classes or trained.num_classes, number)
    network.network.load_state_dict(_learned_buffers(model.network.network), strict=False)
    network.explainer_of_training = model.network.explainer_of_training
    return freeze(network)


def check_untrained(trained: TrainedModel, model: EvaluatedModel, count: int) -> None:
    """Raise ConfigError if the code of a network returns the same weights every time."""
    networks = [untrained_network(trained, model, number).parameters() for number in range(2)]
    require(
        not all(torch.equal(one, other) for one, other in zip(*networks, strict=True)),
        f"evaluate.random_networks={count}: the code of {trained.config.kind} {trained.config.name} returns the same "
        "weights every time, so there is no untrained network to compare with; set evaluate.random_networks=0",
    )


def measure_untrained(
    context: EvaluationContext,
    trained: TrainedModel,
    network: Classifier,
    files: Mapping[str, Mapping[str, str]],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Return the metrics of an untrained network on a split, from the store if it has them.

    Args:
        context: Evaluation of the trained network.
        trained: Facts of the trained network.
        network: The untrained one.
        files: For each evaluator to run, SHA-256 of the files that it reads, by path.
        inputs: Fingerprints of everything else that the evaluation reads.
    """
    general = to_plain_dict(context.options)
    described: dict[str, Any] = {
        "inputs": {name: inputs[name] for name in inputs if name != context.config.model},
        "network": to_plain_dict(trained.config) | {"weights": sha256_tensors(network)},
        "options": {name: general[name] for name in ("region", "iou_threshold", "group_sets")},
        "split": context.split,
        "subset": [trained.split, to_plain_dict(trained.subset)],
    }
    metrics: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        untrained = replace(
            context,
            model=replace(
                context.model, network=network.to(context.model.device), thresholds=AT_HALF
            ),
            folder=Path(folder),
            fingerprint=described["network"]["weights"],
            written={},
            pooled_features={},
        )
        for name, read in files.items():
            artifact = Artifact(
                context.store.folder,
                "random-network",
                {**described, name: evaluator_options(name, context.config), "files": read},
                "permafrost evaluate with evaluate.random_networks=",
            )
            if artifact.exists:
                values = artifact.description
            else:
                values = plain_values(dict(evaluator_named(name).run(untrained)))
                values.pop(PER_LABEL, None)
                try:
                    artifact.save({}, values)
                except OSError as error:  # of a store that may only be read
                    logger.info("%s is not kept for other students: %s", artifact.folder, error)
            metrics |= values if EVALUATORS[name].is_flat else {name: values}
    return metrics


def _learned_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not statistics of a batch norm, such as a normalization of images or a partition."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in network.named_modules()
        if not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }
