"""Cache of a teacher's activations and distances in the store, so that the next student needs no teacher network."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.context import Trial
from pipeline.store.artifacts import Artifact


def teacher_artifact(trial: Trial, kind: str, **made_from: Any) -> Artifact:
    """The artifact of the trial's teacher on its store's records.

    made_from  what else changes the numbers, as JSON: which records in which order
    """
    described = trial.networks.described_teacher
    made_from |= {
        # It runs in float32, whatever its pass did.
        "teacher": {name: value for name, value in described.items() if name != "dtype"},
        "store": trial.store.manifest.fingerprint,
        "frame": trial.options.frame,
    }
    return Artifact(trial.store.path, kind, made_from, "stages.evaluate with teacher=")
