"""The pooled feature before the teacher's classifier, for losses that bring a projection of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.payloads.inner import EXTRAS
from pipeline.payloads.payload import Encoded
from pipeline.records import FieldSpec
from pipeline.store.codecs import lowest_cosine

if TYPE_CHECKING:
    from pipeline.config import ExplainerConfig, PassConfig
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import Inner, ModelOutput
    from pipeline.payloads.payload import Described


class FeaturePayload:
    """feature f16 [d]; it has no place in the frame, so a view that moves keeps it."""

    def __init__(self, config: PassConfig, explainer: ExplainerConfig) -> None:
        pass

    @property
    def inner(self) -> Inner:
        """What the forward pass must give."""
        return EXTRAS["feature"].inner

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        assert output.pooled is not None
        return [
            FieldSpec(
                name="feature", shape=(output.pooled.shape[1],), dtype="float16", axes=("feature",)
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: Described) -> Encoded:
        assert output.pooled is not None
        values = output.pooled.detach().cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # the annotator names what does not fit
            stored = values.astype("float16")
            fidelity = lowest_cosine(values, stored)
        return Encoded({"feature": stored}, {"feature": fidelity})
