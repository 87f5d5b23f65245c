"""Distances between records by a network's layers; a teacher's are kept in the store, so that it is asked once.

    <store>/artefacts/distances-<fp8>/    manifest.json and distances.safetensors: "<layer>/<block>" condensed f64

An artefact is named by the teacher, the records in their blocks, the frame in which they are seen and the form: `plain`
features, or each record's divided by their length (`unit`). The second student of a teacher needs no teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pipeline.evaluation.distance_correlation import feature_distances
from pipeline.evaluation.layers import activations, layer_features, layer_names
from pipeline.evaluation.probe_set import iter_views
from pipeline.store.artefact import (
    artefact_folder,
    is_committed,
    publish,
    read_tensors,
    write_tensors,
)
from pipeline.store.files import sha256_json
from pipeline.store.lock import LockedError, lock_folder
from pipeline.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, from_dict, read_checked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from pipeline.dataset import StoreDataset
    from pipeline.evaluation.judge import Subject
    from pipeline.evaluation.probe_set import ProbeSet
    from pipeline.evaluation.trial import Trial

Form = Literal["plain", "unit"]
Distances = dict[str, list["Tensor"]]
"""Layer, from the finest to the deepest -> condensed distances f64 [n (n - 1) / 2], a block each."""
TENSORS_NAME = "distances.safetensors"
_REPAIR = "delete its folder and run stages.evaluate with teacher="


@dataclass(frozen=True, kw_only=True)
class DistancesManifest:
    """<store>/artefacts/distances-<fp8>/manifest.json."""

    fingerprint: str
    """Of made_from."""
    made_from: dict[str, Any]
    layers: tuple[str, ...]
    """From the finest to the deepest."""
    records: tuple[int, ...]
    """Of each block."""
    files: dict[str, str]
    kind: str = "distances"
    schema: int = SCHEMA_VERSION


@torch.no_grad()
def network_distances(
    subject: Subject, dataset: StoreDataset, probes: ProbeSet, trial: Trial, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Of each form, asked of the network itself; a block's features lie in memory together."""
    found: dict[Form, Distances] = {form: {} for form in forms}
    for block in probes.blocks:
        parts: dict[str, list[Tensor]] = {}
        for images, _ in iter_views(subject, dataset, block.tolist(), trial.options):
            for layer, values in layer_features(activations(subject.model, images)).items():
                parts.setdefault(layer, []).append(values.cpu())
        for layer in list(parts):
            features = torch.cat(parts.pop(layer))
            for form in forms:
                distances = feature_distances(features, l2norm=form == "unit")
                found[form].setdefault(layer, []).append(distances)
    return found


# ---- the teacher's -------------------------------------------------------------------------------


def has_teacher_distances(trial: Trial, probes: ProbeSet, forms: Sequence[Form]) -> bool:
    """Whether the store holds the teacher's distances of these records."""
    return all(is_committed(_folder(trial, probes, form)) for form in forms)


def teacher_layers(trial: Trial, probes: ProbeSet, form: Form) -> list[str]:
    """The teacher's layers, from what the store holds or from the network."""
    folder = _folder(trial, probes, form)
    if is_committed(folder):
        return list(_read_manifest(folder).layers)
    return layer_names(trial.networks.teacher)


def teacher_distances(
    trial: Trial, probes: ProbeSet, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Of each form, from the store; the network is asked for those that are not there, and they are kept."""
    missing = [form for form in forms if not is_committed(_folder(trial, probes, form))]
    asked: dict[Form, Distances] = {}
    if missing:
        asked = network_distances(trial.networks.teacher, trial.dataset, probes, trial, missing)
    for form, distances in asked.items():
        _save(trial, probes, form, distances)
    return {form: asked.get(form) or _load(_folder(trial, probes, form)) for form in forms}


def _made_from(trial: Trial, probes: ProbeSet, form: Form) -> dict[str, Any]:
    teacher = trial.networks.described_teacher
    return {
        # It is asked in float32, whatever its pass did.
        "teacher": {name: value for name, value in teacher.items() if name != "dtype"},
        "store": trial.store.manifest.fingerprint,
        "frame": trial.options.frame,
        "records": [len(block) for block in probes.blocks],
        "keys_sha256": probes.keys_sha256,
        "form": form,
    }


def _folder(trial: Trial, probes: ProbeSet, form: Form) -> Path:
    fingerprint = sha256_json(_made_from(trial, probes, form))
    return artefact_folder(trial.store.path, "distances", fingerprint)


def _save(trial: Trial, probes: ProbeSet, form: Form, distances: Distances) -> None:
    made_from = _made_from(trial, probes, form)
    folder = _folder(trial, probes, form)
    try:
        with lock_folder(folder):
            files = write_tensors(
                folder,
                TENSORS_NAME,
                {
                    f"{layer}/{number}": condensed
                    for layer, blocks in distances.items()
                    for number, condensed in enumerate(blocks)
                },
            )
            publish(
                folder,
                DistancesManifest(
                    fingerprint=sha256_json(made_from),
                    made_from=made_from,
                    layers=tuple(distances),
                    records=tuple(len(block) for block in probes.blocks),
                    files=files,
                ),
            )
    except LockedError:
        return  # another student's judge is writing the very same


def _read_manifest(folder: Path) -> DistancesManifest:
    values = read_checked(folder / MANIFEST_NAME, made_by="stages.evaluate with teacher=")
    return from_dict(
        DistancesManifest,
        values | {"layers": tuple(values["layers"]), "records": tuple(values["records"])},
    )


def _load(folder: Path) -> Distances:
    manifest = _read_manifest(folder)
    tensors = read_tensors(folder, TENSORS_NAME, manifest.files, _REPAIR)
    return {
        layer: [tensors[f"{layer}/{number}"] for number in range(len(manifest.records))]
        for layer in manifest.layers
    }
