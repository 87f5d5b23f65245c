"""The outputs of a teacher pass: what each stores of a forward pass, and how it is encoded."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.teacher_fields import (
    attention_fields,
    class_map_fields,
    pooled_fields,
    project_features,
    stage_fields,
)
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import OUTPUTS, PassOptions
from permafrost.core.errors import require
from permafrost.core.records import FOLD, REST_LOGITS, TOP_CLASS, TOP_LOGITS, FieldSpec
from permafrost.loading.transfer import copy_to
from permafrost.models.classifier import (
    NO_INTERMEDIATES,
    Classifier,
    Intermediates,
    ModelOutput,
    stage_number,
)
from permafrost.models.explanations import explainer_named, target_classes
from permafrost.models.fold_networks import FoldsClassifier
from permafrost.store.codecs import decode_tensor, encode_unit, lowest_cosine_of_arrays
from permafrost.store.projections import Projection

_TINY = torch.finfo(torch.float32).tiny


class BatchInfo(NamedTuple):
    """Keys and labels of the n records of a batch, from the index."""

    keys: Sequence[str]
    labels: Tensor
    """Labels in the form of Batch."""


class EncodedFields(NamedTuple):
    """Stored form of one output for a batch of n records, on the device of the teacher."""

    values: dict[str, Tensor]
    """Field -> [n, *shape] of its FieldSpec, in its dtype."""
    fidelity: dict[str, Tensor]
    """Lowest cosine between a record's values and their stored form, f64 [1], for each lossy field."""
    finite: dict[str, Tensor] = {}
    """Whether the values of each record are finite, bool [n], which the annotator adds."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Form of the images that the teacher receives for an output."""

    margin: float = 0.0
    """FieldSpec.margin of the fields."""
    mirrored: bool = False
    """True if the teacher also receives horizontal flips, so that fields get a first axis of two."""


class OutputKind(ABC):
    """One kind of teacher output to store. A class of the same members need not derive from it.

    An output may have an attribute `framing: Framing`, if the teacher shall receive other images than the whole frame
    for it. Each of these is another forward pass, and its fields are encoded one by one.
    """

    intermediates: Intermediates = NO_INTERMEDIATES
    """Intermediates of a forward pass that it needs in addition to logits and features."""

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.config = config

    @abstractmethod
    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        """Return the fields that it stores, given an example output."""

    @abstractmethod
    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        """Encode the fields of a batch on its device. The values of a record depend on that record only.

        What is stored is downloaded while the next batch is computed, so nothing here waits for a GPU.

        Args:
            model: Frozen network of the teacher.
            output: Output for the batch, with `intermediates`.
            records: Keys and labels of the batch.
        """


# ---- logits ----------------------------------------------------------------------------------------


_MAX_UINT16 = 2**16 - 1
"""Number of classes that u16 can number, without 65,535, which is padding."""


class LogitsOutput(OutputKind):
    """Field logits f16 [K], or with annotate.logits=topk top_logits f16 [k], top_class [k] and rest_logits f32 [T].

    With annotate.logits_dtype=float32 logits and top_logits are f32. The largest logits are in descending order.
    top_class is u16 up to 65,535 classes and i32 above. rest_logits is log sum exp(logit / tau) over the K - k other
    classes at each of the T temperatures, and 0 if there are none.
    """

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.config = config
        self.dtype: Literal["float16", "float32"] = (
            "float32" if config.logits_dtype == "float32" else "float16"
        )

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        classes = output.logits.shape[1]
        if self.config.logits == "all":
            return [FieldSpec(name="logits", shape=(classes,), dtype=self.dtype, axes=("class",))]
        count = min(self.config.k, classes)
        return [
            FieldSpec(name=TOP_LOGITS, shape=(count,), dtype=self.dtype, axes=("rank",)),
            FieldSpec(
                name=TOP_CLASS,
                shape=(count,),
                dtype="uint16" if classes <= _MAX_UINT16 else "int32",
                axes=("rank",),
            ),
            FieldSpec(
                name=REST_LOGITS,
                shape=(len(self.config.temperatures),),
                dtype="float32",
                axes=("temperature",),
            ),
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        logits = output.logits.detach()
        if self.config.logits == "all":
            return EncodedFields({"logits": self._rounded(logits)}, {})
        values, classes, rest = split_logits(logits, self.config.k, self.config.temperatures)
        _, class_spec, _ = self.fields(model, output)
        stored = {
            TOP_LOGITS: self._rounded(values),
            TOP_CLASS: classes.to(getattr(torch, class_spec.dtype)),
            REST_LOGITS: rest,
        }
        return EncodedFields(stored, {})

    def _rounded(self, logits: Tensor) -> Tensor:
        return logits.to(getattr(torch, self.dtype))  # the annotator reports records that overflow


def split_logits(
    logits: Tensor, k: int, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Split logits [n, K] into the k largest and the sum of all others.

    Args:
        logits: [n, K].
        k: Number of logits to keep; K keeps all.
        temperatures: Temperatures tau at which the others are summed.

    Returns:
        The largest logits [n, k] in descending order, their classes i64 [n, k], and log sum exp(logit / tau) over all
        others at each temperature, f32 [n, T], 0 if k is at least K.
    """
    count = min(k, logits.shape[1])
    values, classes = logits.topk(count, dim=1)
    if count == logits.shape[1]:
        return values, classes, logits.new_zeros(len(logits), len(temperatures))
    others = logits.float().scatter(1, classes, -torch.inf)
    rest = [(others / tau).logsumexp(dim=1) for tau in temperatures]
    return values, classes, torch.stack(rest, dim=1)


# ---- explanation map -------------------------------------------------------------------------------


class MapsOutput(OutputKind):
    """Fields map [E, A, h, w] with maximum absolute value 1, map_scale f32 [E] and target_class i32 [E].

    The classes are selected by the float32 logits and stored, because rounded logits may tie. If a record has fewer
    than E classes, the last entries are NO_CLASS with a map of zeros.
    """

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.dtype = config.map_dtype
        self.explainer = explainer
        self.explain = explainer_named(explainer.line)

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        example = torch.zeros(1, self.explainer.max_classes or 1, dtype=torch.int64)
        shape = tuple(self._maps(model, output, example.to(output.logits.device)).shape[1:])
        return [
            FieldSpec(
                name="map",
                shape=shape,
                dtype=self.dtype,
                codec="maxabs",
                when_moved="warp",
                frame="full",
                axes=("target", "channel", "y", "x"),
            ),
            FieldSpec(name="map_scale", shape=shape[:1], dtype="float32", axes=("target",)),
            FieldSpec(name="target_class", shape=shape[:1], dtype="int32", axes=("target",)),
        ]

    def _maps(self, model: Classifier, output: ModelOutput, classes: Tensor) -> Tensor:
        """Explain classes [B, E], by a function that may be a user's: [B, E, A, h, w]."""
        maps = self.explain(model, output, classes).detach()
        require(
            maps.ndim == 5 and maps.shape[1] == classes.shape[1],
            f"explainer={self.explainer.line} gives maps {list(maps.shape)} of {list(classes.shape)} classes, in place "
            "of [record, class, channel, y, x]; correct its function",
        )
        return maps

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        labels = copy_to(records.labels, output.logits.device)
        classes = target_classes(self.explainer, output.logits, labels, records.keys)
        maps = self._maps(model, output, classes)
        stored, scale = encode_unit(maps, self.dtype, axes=(2, 3, 4))
        return EncodedFields(
            {"map": stored, "map_scale": scale, "target_class": classes.int()},
            {"map": lowest_cosine(maps.flatten(0, 1), stored.flatten(0, 1))},
        )


def lowest_cosine(values: Tensor, stored: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute the lowest cosine between each record's values and their stored form, f64 [1], on their device.

    Args:
        values: [n, ...].
        stored: What `encode_unit` has returned for them.
        scale: Scales by which parts of the stored form are multiplied, with its first axes; None for one of a record.
    """
    decoded = decode_tensor(stored, scale)
    if values.device.type == "cpu":
        lowest = lowest_cosine_of_arrays(
            values.numpy(), decoded.numpy() if scale is not None else stored.numpy()
        )
        return torch.tensor([lowest], dtype=torch.float64)
    original, other = values.flatten(1), decoded.flatten(1)
    original = original / original.abs().amax(dim=1, keepdim=True).clamp(min=_TINY)
    product, squared, other_squared = (
        (left * right).sum(dim=1, dtype=torch.float64)
        for left, right in ((original, other), (original, original), (other, other))
    )
    cosines = product / (squared.sqrt() * other_squared.sqrt())
    both_zero = (squared == 0) & (other_squared == 0)
    return torch.where(both_zero, 1.0, cosines.nan_to_num(0.0)).amin(dim=0, keepdim=True)


# ---- intermediates ---------------------------------------------------------------------------------


class _SpatialOutput(OutputKind):
    """Base for fields [..., h, w] f16 with spatial maximum 1, and <field>_scale f32 [...] ([1] for a single map)."""

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        specs = []
        for name, values in self.values(output).items():
            shape = tuple(values.shape[1:])
            owners = ("class",) * (len(shape) - 2)
            specs += [
                FieldSpec(
                    name=name,
                    shape=shape,
                    dtype="float16",
                    codec="maxabs",
                    when_moved="warp",
                    frame="full",
                    axes=(*owners, "y", "x"),
                ),
                FieldSpec(
                    name=f"{name}_scale",
                    shape=shape[:-2] or (1,),
                    dtype="float32",
                    axes=owners or ("map",),
                ),
            ]
        return specs

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        fields: dict[str, Tensor] = {}
        fidelity = {}
        for name, values in self.values(output).items():
            if (values := values.detach()).dim() == 2:  # without positions
                fields[name] = values.half()  # the annotator reports overflows
                continue
            stored, scale = encode_unit(
                values, self.dtype, axes=(values.dim() - 2, values.dim() - 1)
            )
            fields |= {name: stored, f"{name}_scale": scale.reshape(len(values), -1)}
            fidelity[name] = self.cosine(values, stored, scale)
        return EncodedFields(fields, fidelity)

    @property
    def dtype(self) -> Literal["float16", "int8"]:
        """Storage dtype of the fields with positions."""
        return "float16"

    def cosine(self, values: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        """Return the lowest cosine between a map and its stored form, f64 [1]."""
        maps = values.reshape(-1, *values.shape[-2:])
        return lowest_cosine(maps, stored.reshape(maps.shape))

    @abstractmethod
    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        """Compute the fields before encoding."""


class FeaturesOutput(_SpatialOutput):
    """Fields features_<stage> [C, h, w] before the stage's last ReLU, each with a scale f32 [C], and features_pooled.

    Channels are divided by their largest absolute value in the record. The stages are those of
    annotate.features_stages. features_pooled f16 [C] is the average of the last stage's output, which stays the same
    in every view. 0.1 MB per record for a ResNet-50's last stage at 224 pixels in int8, 1.4 MB for all of its stages.
    With annotate.features_channels the fields have the components of a projection in place of the channels.
    """

    intermediates = Intermediates(stages=True)

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        super().__init__(config, explainer)
        self.framing = Framing(margin=config.features_margin, mirrored=config.features_mirror)
        self.projections: Mapping[str, Projection] = {}
        """Projection of each field that has one, of the fields that it projects."""

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        specs = []
        for name, values in self.values(output).items():
            channels = values.shape[1]
            axis = "component" if name in self.projections else "channel"
            if values.dim() == 2:
                specs.append(
                    FieldSpec(name=name, shape=(channels,), dtype="float16", axes=("channel",))
                )
                continue
            stage = output.stages[stage_number(name) - 1]
            specs.append(
                FieldSpec(
                    name=name,
                    shape=tuple(values.shape[1:]),
                    dtype=self.config.features_dtype,
                    codec="maxabs",
                    when_moved="warp_covered",
                    frame="full",
                    before_relu=stage.preactivation is not stage.output,
                    axes=(axis, "y", "x"),
                )
            )
            scale = f"{name}_scale"
            specs.append(FieldSpec(name=scale, shape=(channels,), dtype="float32", axes=(axis,)))
        return specs

    @property
    def dtype(self) -> Literal["float16", "int8"]:
        return self.config.features_dtype

    def cosine(self, values: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        """Return the lowest cosine between a record's channels and their stored form, f64 [1]."""
        return lowest_cosine(values, stored, scale)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        """Compute the fields before encoding, f32."""
        size = self.config.features_size
        fields = stage_fields(output, self.config.features_stages, self.config.features_margin)
        for name, field in fields.items():
            if size is not None and field.dim() == 4:
                smaller = (min(size, field.shape[2]), min(size, field.shape[3]))
                fields[name] = F.adaptive_avg_pool2d(field, smaller)
            if name in self.projections:
                fields[name] = project_features(fields[name], self.projections[name])
        return fields


class AttentionOutput(_SpatialOutput):
    """Fields attention_<stage> [h, w]: Q of attention transfer, 8 kB per record for a ResNet at 224 pixels."""

    intermediates = Intermediates(stages=True)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        return attention_fields(output)


class ClassMapsOutput(_SpatialOutput):
    """Field class_maps [K, r, r]: the maps of all classes, pooled to annotate.class_map_size cells per side."""

    intermediates = Intermediates(class_maps=True)

    def values(self, output: ModelOutput) -> dict[str, Tensor]:
        return {
            name: F.adaptive_avg_pool2d(maps, self.config.class_map_size)
            for name, maps in class_map_fields(output).items()
        }


# ---- pooled feature --------------------------------------------------------------------------------


class PooledOutput(OutputKind):
    """Field pooled f16 [d], which has no spatial position and is not changed by a view's transform."""

    intermediates = Intermediates(pooled=True)

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [
            FieldSpec(
                name="pooled",
                shape=(output.require("pooled").shape[1],),
                dtype="float16",
                axes=("feature",),
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        values = pooled_fields(output)["pooled"].detach()
        stored = values.half()  # the annotator reports overflows
        return EncodedFields({"pooled": stored}, {"pooled": lowest_cosine(values, stored)})


# ---- fold ------------------------------------------------------------------------------------------


class FoldOutput(OutputKind):
    """Field fold i32 [1]: the fold, from 0, whose network was not trained on the record and has annotated it."""

    def __init__(self, networks: FoldsClassifier) -> None:
        self.networks = networks

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [FieldSpec(name=FOLD, shape=(1,), dtype="int32", axes=("fold",))]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        folds = torch.from_numpy(self.networks.folds_of(records.keys)).int()
        return EncodedFields({FOLD: folds[:, None].to(output.logits.device)}, {})


# ---- build -----------------------------------------------------------------------------------------


def build_outputs(config: PassOptions, explainer: ExplainerConfig) -> list[OutputKind]:
    """Build one output for each of `annotate.outputs`, in that order."""
    return [
        pkgutil.resolve_name(OUTPUTS[name].implementation)(config, explainer)
        for name in config.outputs
    ]
