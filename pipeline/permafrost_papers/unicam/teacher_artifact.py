"""Cache of a teacher's activations and distances in the store, so that later students need no teacher network."""

from __future__ import annotations

from typing import Any

from permafrost.evaluation.context import EvaluationContext
from permafrost.store.artifacts import Artifact


def teacher_artifact(context: EvaluationContext, kind: str, **made_from: Any) -> Artifact:
    """Return the artifact of the context's teacher on the records of its store.

    Args:
        context: Evaluation of the split.
        kind: First part of the artifact's name.
        made_from: Everything else that determines the numbers, as JSON: the records and their order.
    """
    made_from |= {
        "teacher": {
            name: value
            for name, value in context.networks.described_teacher.items()
            if name != "dtype"  # evaluators run the teacher in float32, independent of its pass
        },
        "store": context.store.manifest.fingerprint,
        "frame": context.frame,
    }
    return Artifact(context.store.folder, kind, made_from, "permafrost evaluate with teacher=")
