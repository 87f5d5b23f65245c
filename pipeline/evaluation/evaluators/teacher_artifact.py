"""Cache of a teacher's activations and distances in the store, so that the next student needs no teacher network."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.context import EvaluationContext
from pipeline.store.artifacts import Artifact


def teacher_artifact(context: EvaluationContext, kind: str, **made_from: Any) -> Artifact:
    """The artifact of the context's teacher on its store's records.

    made_from  what else changes the numbers, as JSON: which records in which order
    """
    described = context.networks.described_teacher
    made_from |= {
        # It runs in float32, whatever its pass did.
        "teacher": {name: value for name, value in described.items() if name != "dtype"},
        "store": context.store.manifest.fingerprint,
        "frame": context.options.frame,
    }
    return Artifact(context.store.path, kind, made_from, "stages.evaluate with teacher=")
