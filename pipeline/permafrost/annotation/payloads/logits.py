"""Raw logits instead of probabilities, so that the student can choose the temperature."""

from __future__ import annotations

import numpy as np

from permafrost.annotation.payloads.payload import BatchInfo, EncodedFields
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.models.classifier import Classifier
from permafrost.models.output import NO_INTERMEDIATES, ModelOutput


class LogitsPayload:
    """Field logits f16 [K]."""

    intermediates = NO_INTERMEDIATES

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        pass

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [
            FieldSpec(
                name="logits", shape=(output.logits.shape[1],), dtype="float16", axes=("class",)
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        with np.errstate(over="ignore"):  # the annotator reports records whose logits overflow
            stored = output.logits.detach().cpu().numpy().astype("float16")
        return EncodedFields({"logits": stored}, {})
