"""Raw logits, never probabilities: the temperature is the student's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.models.output import NOTHING
from pipeline.payloads.payload import Encoded
from pipeline.records import FieldSpec

if TYPE_CHECKING:
    from pipeline.config import ExplainerConfig, PassConfig
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import ModelOutput
    from pipeline.payloads.payload import Described


class LogitsPayload:
    """logits f16 [K]."""

    inner = NOTHING

    def __init__(self, config: PassConfig, explainer: ExplainerConfig) -> None:
        pass

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [
            FieldSpec(
                name="logits", shape=(output.logits.shape[1],), dtype="float16", axes=("class",)
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: Described) -> Encoded:
        with np.errstate(over="ignore"):  # the annotator names a record whose logits do not fit
            stored = output.logits.detach().cpu().numpy().astype("float16")
        return Encoded({"logits": stored}, {})
