"""What lies inside the teacher: where its stages are active, and where it sees each class.

`EXTRAS` says how these fields follow from a forward pass, for the store and for a live teacher alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.annotation.payloads.payload import Described, Encoded
from pipeline.config.models import ExplainerConfig
from pipeline.config.store import PassConfig
from pipeline.core.records import FieldSpec
from pipeline.losses.at import attention_map
from pipeline.losses.review_kd import review_levels
from pipeline.models.additive.hierarchy import class_centred
from pipeline.models.classifier import Classifier
from pipeline.models.output import Inner, ModelOutput, wide
from pipeline.store.codecs import encode_maxabs, lowest_cosine


class Extra(NamedTuple):
    """Fields of `Targets.extra` that one method reads."""

    inner: Inner
    """What the forward pass must give."""
    fields: Callable[[ModelOutput], dict[str, Tensor]]
    """f32, without a graph."""


def _attention_fields(output: ModelOutput) -> dict[str, Tensor]:
    """at_1, ... [B, h, w]: Q of each stage (pipeline/losses/at.py)."""
    return {
        f"at_{number}": attention_map(stage.output.detach())
        for number, stage in enumerate(output.stages, start=1)
    }


def _class_map_fields(output: ModelOutput) -> dict[str, Tensor]:
    """cat [B, K, h, w], on the features' grid."""
    assert output.class_maps is not None
    return {"cat": output.class_maps.detach()}


def _review_fields(output: ModelOutput) -> dict[str, Tensor]:
    """review_1, ... [B, C, h, w]: the levels that ReviewKD compares; too large to be stored."""
    levels = review_levels(output.stages, preactivation=True)
    return {f"review_{number}": level.detach() for number, level in enumerate(levels, start=1)}


def _last_stage_fields(output: ModelOutput) -> dict[str, Tensor]:
    """ft [B, C, h, w]: what factor transfer paraphrases; too large to be stored."""
    return {"ft": wide(output.stages[-1].output.detach())}


def _superfeature_fields(output: ModelOutput) -> dict[str, Tensor]:
    """ked_z [B, M, K], at the teacher's finest level, class-centred."""
    assert output.superfeature_logits is not None
    return {"ked_z": class_centred(output.superfeature_logits.detach())}


def _superfeature_hint_fields(output: ModelOutput) -> dict[str, Tensor]:
    """The same, and ked_hidden [B, M, width], which is not stored."""
    assert output.superfeature_hidden is not None
    return {**_superfeature_fields(output), "ked_hidden": output.superfeature_hidden.detach()}


def _pooled_fields(output: ModelOutput) -> dict[str, Tensor]:
    """feature [B, d]: the pooled feature before the classifier."""
    assert output.pooled is not None
    return {"feature": output.pooled.detach()}


EXTRAS: dict[str, Extra] = {
    "at": Extra(Inner(stages=True), _attention_fields),
    "cat": Extra(Inner(class_maps=True), _class_map_fields),
    "feature": Extra(Inner(pooled=True), _pooled_fields),
    "review": Extra(Inner(stages=True), _review_fields),
    "ft": Extra(Inner(stages=True), _last_stage_fields),
    "ked_z": Extra(Inner(superfeatures=True), _superfeature_fields),
    "ked_hint": Extra(Inner(superfeatures=True), _superfeature_hint_fields),
}


class _InnerPayload:
    """Fields [..., h, w] f16, max-abs 1 over places, with <field>_scale f32 [...] ([1] for one map a record)."""

    name: ClassVar[str]

    def __init__(self, config: PassConfig, explainer: ExplainerConfig) -> None:
        self.config = config

    @property
    def inner(self) -> Inner:
        """What the forward pass must give."""
        return EXTRAS[self.name].inner

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

    def encode(self, model: Classifier, output: ModelOutput, records: Described) -> Encoded:
        fields: dict[str, NDArray[np.generic]] = {}
        fidelity = {}
        for name, values in self.values(output).items():
            array = values.cpu().numpy()
            stored, scale = encode_maxabs(array, "float16", axes=(array.ndim - 2, array.ndim - 1))
            fields |= {name: stored, f"{name}_scale": scale.reshape(len(array), -1)}
            maps = array.reshape(-1, *array.shape[-2:])
            fidelity[name] = lowest_cosine(maps, stored.reshape(maps.shape))
        return Encoded(fields, fidelity)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        """The fields before they are encoded."""
        return EXTRAS[self.name].fields(output)


class AttentionPayload(_InnerPayload):
    """at_<stage> [h, w] of each stage: attention transfer's Q, 8 kB a record for a ResNet at 224 pixels."""

    name = "at"


class ClassMapPayload(_InnerPayload):
    """cat [K, r, r]: the maps of all classes, pooled to annotate.cat_size cells a side."""

    name = "cat"

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        """Pooled."""
        return {
            name: F.adaptive_avg_pool2d(maps, self.config.cat_size)
            for name, maps in super().values(output).items()
        }
