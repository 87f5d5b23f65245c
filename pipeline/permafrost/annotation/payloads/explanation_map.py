"""Explanation maps of the classes that `explainer.explained_classes` selects, on their native grid."""

from __future__ import annotations

import torch

from permafrost.annotation.payloads.payload import BatchInfo, EncodedFields
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.models.classifier import Classifier
from permafrost.models.explainers.classes import explained_classes
from permafrost.models.explainers.explain import explainer_named
from permafrost.models.output import NO_INTERMEDIATES, ModelOutput
from permafrost.store.codecs import encode_maxabs, lowest_cosine


class MapPayload:
    """Fields map [E, A, h, w] with maximum absolute value 1, map_scale f32 [E] and explained_class i32 [E].

    The classes are selected by the float32 logits and stored, because rounded logits may tie. If a record has fewer
    than E classes, the last entries are NO_CLASS with a map of zeros.
    """

    intermediates = NO_INTERMEDIATES

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.dtype = config.map_dtype
        self.explainer = explainer

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        example = torch.zeros(1, self.explainer.max_classes or 1, dtype=torch.int64)
        maps = explainer_named(self.explainer.kind)(model, output, example.to(output.logits.device))
        shape = tuple(maps.shape[1:])
        return [
            FieldSpec(
                name="map",
                shape=shape,
                dtype=self.dtype,
                codec="maxabs",
                when_moved="warp",
                frame="full",
                axes=("explained", "channel", "y", "x"),
            ),
            FieldSpec(name="map_scale", shape=shape[:1], dtype="float32", axes=("explained",)),
            FieldSpec(name="explained_class", shape=shape[:1], dtype="int32", axes=("explained",)),
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        labels = records.labels.to(output.logits.device)
        classes = explained_classes(self.explainer, output.logits, labels, records.keys)
        maps = explainer_named(self.explainer.kind)(model, output, classes)
        values = maps.cpu().numpy()
        stored, scale = encode_maxabs(values, self.dtype, axes=(2, 3, 4))
        fields = {
            "map": stored,
            "map_scale": scale,
            "explained_class": classes.cpu().numpy().astype("int32"),
        }
        flat = values.reshape(-1, *values.shape[2:])
        return EncodedFields(fields, {"map": lowest_cosine(flat, stored.reshape(flat.shape))})
