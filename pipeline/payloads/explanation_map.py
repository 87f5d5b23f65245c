"""The explanation of the teacher's own top-1 class, at its native grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.explainers import EXPLAINERS
from pipeline.models.output import NOTHING
from pipeline.payloads.payload import Encoded
from pipeline.records import FieldSpec
from pipeline.store.codecs import encode_maxabs, lowest_cosine

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import ExplainerConfig, PassConfig
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import ModelOutput


class MapPayload:
    """map [E, A, h, w], max-abs 1; map_scale f32 [E]; explained_class i32 [E].

    The class is the argmax of the float32 logits and is stored: rounded logits may tie.
    """

    inner = NOTHING

    def __init__(self, config: PassConfig, explainer: ExplainerConfig) -> None:
        self.dtype = config.map_dtype
        self.explain = EXPLAINERS[explainer.kind]

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        shape = tuple(self._explain(model, output)[1].shape[1:])
        return [
            FieldSpec(
                name="map",
                shape=shape,
                dtype=self.dtype,
                codec="maxabs",
                when_moved="warp",
                frame="full",
            ),
            FieldSpec(name="map_scale", shape=shape[:1], dtype="float32"),
            FieldSpec(name="explained_class", shape=shape[:1], dtype="int32"),
        ]

    def encode(self, model: Classifier, output: ModelOutput) -> Encoded:
        explained_class, maps = self._explain(model, output)
        values = maps.cpu().numpy()
        stored, scale = encode_maxabs(values, self.dtype, axes=(2, 3, 4))
        fields = {
            "map": stored,
            "map_scale": scale,
            "explained_class": explained_class.cpu().numpy().astype("int32"),
        }
        flat = values.reshape(-1, *values.shape[2:])
        return Encoded(fields, {"map": lowest_cosine(flat, stored.reshape(flat.shape))})

    def _explain(self, model: Classifier, output: ModelOutput) -> tuple[Tensor, Tensor]:
        explained_class = output.logits.argmax(dim=1, keepdim=True)  # [B, E = 1]
        return explained_class, self.explain(model, output, explained_class)
