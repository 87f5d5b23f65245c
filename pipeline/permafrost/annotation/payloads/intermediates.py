"""Payloads of spatial intermediates: attention of the stages, and class maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from permafrost.annotation.payloads.payload import BatchInfo, EncodedFields
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.losses.at import attention_fields
from permafrost.losses.cat_kd import class_map_fields
from permafrost.models.classifier import Classifier
from permafrost.models.output import Intermediates, ModelOutput
from permafrost.store.codecs import encode_maxabs, lowest_cosine


class _SpatialPayload(ABC):
    """Base for fields [..., h, w] f16 with spatial maximum 1, and <field>_scale f32 [...] ([1] for a single map)."""

    intermediates: ClassVar[Intermediates]

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.config = config

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        specs = []
        for name, values in self.values(output).items():
            shape = tuple(values.shape[1:])
            owners = ("class",) * (len(shape) - 2)
            specs.append(
                FieldSpec(
                    name=name,
                    shape=shape,
                    dtype="float16",
                    codec="maxabs",
                    when_moved="warp",
                    frame="full",
                    axes=(*owners, "y", "x"),
                )
            )
            specs.append(
                FieldSpec(
                    name=f"{name}_scale",
                    shape=shape[:-2] or (1,),
                    dtype="float32",
                    axes=owners or ("map",),
                )
            )
        return specs

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        fields: dict[str, NDArray[np.generic]] = {}
        fidelity = {}
        for name, values in self.values(output).items():
            array = values.cpu().numpy()
            stored, scale = encode_maxabs(array, "float16", axes=(array.ndim - 2, array.ndim - 1))
            fields |= {name: stored, f"{name}_scale": scale.reshape(len(array), -1)}
            maps = array.reshape(-1, *array.shape[-2:])
            fidelity[name] = lowest_cosine(maps, stored.reshape(maps.shape))
        return EncodedFields(fields, fidelity)

    @abstractmethod
    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        """Compute the fields before encoding."""


class AttentionPayload(_SpatialPayload):
    """Fields attention_<stage> [h, w]: Q of attention transfer, 8 kB per record for a ResNet at 224 pixels."""

    intermediates = Intermediates(stages=True)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        return attention_fields(output)


class ClassMapPayload(_SpatialPayload):
    """Field class_maps [K, r, r]: the maps of all classes, pooled to annotate.class_map_size cells per side."""

    intermediates = Intermediates(class_maps=True)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        return {
            name: F.adaptive_avg_pool2d(maps, self.config.class_map_size)
            for name, maps in class_map_fields(output).items()
        }
