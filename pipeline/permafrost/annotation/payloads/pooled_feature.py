"""Pooled feature before the teacher's classifier, for losses with a separate projection."""

from __future__ import annotations

import numpy as np

from permafrost.annotation.payloads.payload import BatchInfo, EncodedFields
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.models.classifier import Classifier
from permafrost.models.output import Intermediates, ModelOutput
from permafrost.store.codecs import lowest_cosine


class FeaturePayload:
    """Field pooled f16 [d], which has no spatial position and is not changed by a view's transform."""

    intermediates = Intermediates(pooled=True)

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        pass

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        assert output.pooled is not None
        return [
            FieldSpec(
                name="pooled", shape=(output.pooled.shape[1],), dtype="float16", axes=("feature",)
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        assert output.pooled is not None
        values = output.pooled.detach().cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # the annotator reports overflows
            stored = values.astype("float16")
            fidelity = lowest_cosine(values, stored)
        return EncodedFields({"pooled": stored}, {"pooled": fidelity})
