"""What each superfeature of an additive teacher says, at its finest level: coarser ones are sums of it."""

from __future__ import annotations

from pipeline.annotation.payloads.payload import Described, Encoded
from pipeline.config.explainers import ExplainerConfig
from pipeline.config.store import PassConfig
from pipeline.core.records import FieldSpec
from pipeline.losses.ked import superfeature_fields
from pipeline.models.classifier import Classifier
from pipeline.models.output import Inner, ModelOutput
from pipeline.store.codecs import encode_maxabs, lowest_cosine


class SuperfeaturePayload:
    """ked_z [M, K], class-centred, max-abs 1 over classes; ked_z_scale f32 [M].

    It has no place in the frame, so nothing moves it along with a view.
    """

    inner = Inner(superfeatures=True)

    def __init__(self, config: PassConfig, explainer: ExplainerConfig) -> None:
        self.dtype = config.ked_dtype

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        assert output.superfeature_logits is not None
        shape = tuple(output.superfeature_logits.shape[1:])
        return [
            FieldSpec(
                name="ked_z",
                shape=shape,
                dtype=self.dtype,
                codec="maxabs",
                when_moved="refuse",
                axes=("superfeature", "class"),
            ),
            FieldSpec(name="ked_z_scale", shape=shape[:1], dtype="float32", axes=("superfeature",)),
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: Described) -> Encoded:
        values = superfeature_fields(output)["ked_z"].cpu().numpy()
        stored, scale = encode_maxabs(values, self.dtype, axes=(2,))
        rows = values.reshape(-1, values.shape[2])
        return Encoded(
            {"ked_z": stored, "ked_z_scale": scale},
            {"ked_z": lowest_cosine(rows, stored.reshape(rows.shape))},
        )
