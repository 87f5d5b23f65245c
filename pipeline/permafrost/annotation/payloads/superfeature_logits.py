"""Logits of each superfeature of an additive teacher at its finest level, of which coarser levels are sums."""

from __future__ import annotations

from permafrost.annotation.payloads.payload import BatchInfo, EncodedFields
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.losses.ked import superfeature_fields
from permafrost.models.classifier import Classifier
from permafrost.models.output import Intermediates, ModelOutput
from permafrost.store.codecs import encode_maxabs, lowest_cosine


class SuperfeaturePayload:
    """Fields superfeature_logits [M, K], class-centered with maximum absolute value 1 over classes, and
    superfeature_logits_scale f32 [M].

    They have no spatial position, so they cannot be transformed with a view.
    """

    intermediates = Intermediates(superfeatures=True)

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.dtype = config.superfeature_dtype

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        assert output.superfeature_logits is not None
        shape = tuple(output.superfeature_logits.shape[1:])
        return [
            FieldSpec(
                name="superfeature_logits",
                shape=shape,
                dtype=self.dtype,
                codec="maxabs",
                when_moved="refuse",
                axes=("superfeature", "class"),
            ),
            FieldSpec(
                name="superfeature_logits_scale",
                shape=shape[:1],
                dtype="float32",
                axes=("superfeature",),
            ),
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        values = superfeature_fields(output)["superfeature_logits"].cpu().numpy()
        stored, scale = encode_maxabs(values, self.dtype, axes=(2,))
        rows = values.reshape(-1, values.shape[2])
        return EncodedFields(
            {"superfeature_logits": stored, "superfeature_logits_scale": scale},
            {"superfeature_logits": lowest_cosine(rows, stored.reshape(rows.shape))},
        )
