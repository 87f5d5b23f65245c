"""Distances between records in the layers of a network. A teacher's are cached in the store and computed once.

The tensors in <store>/artifacts/distances-<fp8>/ are named "<layer>/<block>", condensed, float64. The form is `plain`
(features as they are) or `unit` (features of each record divided by their norm), with a separate artifact each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluators.layers import activations, layer_features, layer_names
from permafrost.evaluation.evaluators.probe_set import ProbeSet, iter_views
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.store.artifacts import Artifact
from permafrost.unicam.estimators import feature_distances
from permafrost.unicam.teacher_artifact import teacher_artifact

Form = Literal["plain", "unit"]
Distances = dict[str, list["Tensor"]]
"""Layer, from the finest to the deepest -> condensed distances f64 [n (n - 1) / 2] of each block."""


@torch.no_grad()
def network_distances(
    context: EvaluationContext, model: EvaluatedModel, probes: ProbeSet, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Compute the distances of each form by running the network. All features of a block are held in memory."""
    found: dict[Form, Distances] = {form: {} for form in forms}
    for block in probes.blocks:
        parts: dict[str, list[Tensor]] = {}
        for images in iter_views(model, context.dataset, block.tolist(), context.options):
            for layer, values in layer_features(activations(model.network, images)).items():
                parts.setdefault(layer, []).append(values.cpu())
        for layer in list(parts):
            features = torch.cat(parts.pop(layer))
            for form in forms:
                distances = feature_distances(features, l2norm=form == "unit")
                found[form].setdefault(layer, []).append(distances)
    return found


# ---- the teacher's -------------------------------------------------------------------------------


def has_teacher_distances(
    context: EvaluationContext, probes: ProbeSet, forms: Sequence[Form]
) -> bool:
    """Return whether the store contains the teacher's distances of these records."""
    return all(_artifact(context, probes, form).exists for form in forms)


def teacher_layers(context: EvaluationContext, probes: ProbeSet, form: Form) -> list[str]:
    """Names of the teacher's layers, from the artifact in the store or from the network."""
    artifact = _artifact(context, probes, form)
    if artifact.exists:
        return list(artifact.description["layers"])
    return layer_names(context.networks.teacher)


def teacher_distances(
    context: EvaluationContext, probes: ProbeSet, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Load the distances of each form from the store. Missing ones are computed with the network and stored."""
    missing = [form for form in forms if not _artifact(context, probes, form).exists]
    asked: dict[Form, Distances] = {}
    if missing:
        asked = network_distances(context, context.networks.teacher, probes, missing)
    for form, distances in asked.items():
        tensors = {
            f"{layer}/{number}": condensed
            for layer, blocks in distances.items()
            for number, condensed in enumerate(blocks)
        }
        _artifact(context, probes, form).save(tensors, {"layers": list(distances)})
    return {form: asked.get(form) or _load(context, probes, form) for form in forms}


def _artifact(context: EvaluationContext, probes: ProbeSet, form: Form) -> Artifact:
    return teacher_artifact(
        context,
        "distances",
        records=[len(block) for block in probes.blocks],
        keys_sha256=probes.keys_sha256,
        form=form,
    )


def _load(context: EvaluationContext, probes: ProbeSet, form: Form) -> Distances:
    manifest, tensors = _artifact(context, probes, form).load()
    return {
        layer: [tensors[f"{layer}/{number}"] for number in range(len(probes.blocks))]
        for layer in manifest.description["layers"]
    }
