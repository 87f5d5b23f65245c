"""The superfeatures of an additive network, as outputs of a teacher pass and as an explanation.

The outputs are the logits and the last hidden layer of each superfeature at the teacher's finest level. Logits of
coarser levels are sums. The explanation is the contribution of each superfeature to a class: its logit, class-centered.
In an additive game this is the exact Shapley value of the superfeature, so no sampling is needed (KED).
"""

from __future__ import annotations

from torch import Tensor

from permafrost.annotation.outputs import BatchInfo, EncodedFields, OutputKind, lowest_cosine
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import FieldSpec
from permafrost.models.classifier import Classifier, ModelOutput
from permafrost.models.compute import exact_float32
from permafrost.store.codecs import encode_unit
from permafrost_papers.ked.losses import superfeature_fields
from permafrost_papers.ked.partition import class_centered
from permafrost_papers.ked.subnets import HIDDEN, LOGITS, AdditiveClassifier


class SuperfeatureOutput(OutputKind):
    """Fields superfeature_logits [M, K], centered over classes with maximum 1, and superfeature_logits_scale f32 [M].

    They have no spatial position, so they cannot be transformed with a view.
    """

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        self.dtype = config.added["superfeature_dtype"]

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        shape = tuple(output.extras[LOGITS].shape[1:])
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
        values = superfeature_fields(output)[LOGITS].detach()
        stored, scale = encode_unit(values, self.dtype, axes=(2,))
        return EncodedFields(
            {"superfeature_logits": stored, "superfeature_logits_scale": scale},
            {"superfeature_logits": lowest_cosine(values.flatten(0, 1), stored.flatten(0, 1))},
        )


class HiddenOutput(OutputKind):
    """Field superfeature_hidden f16 [M, width]: the last hidden layer of each subnet, for method.lambda_hint.

    It has no spatial position, so it cannot be transformed with a view.
    """

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [
            FieldSpec(
                name=HIDDEN,
                shape=tuple(output.extras[HIDDEN].shape[1:]),
                dtype="float16",
                when_moved="refuse",
                axes=("superfeature", "unit"),
            )
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        values = output.extras[HIDDEN].detach()
        stored = values.half()  # the annotator reports overflows
        lowest = lowest_cosine(values.flatten(0, 1), stored.flatten(0, 1))
        return EncodedFields({HIDDEN: stored}, {HIDDEN: lowest})


def superfeature_contributions(
    model: Classifier, output: ModelOutput, target_class: Tensor
) -> Tensor:
    """Compute signed maps of the given classes on the grid of the model's features, float32 or wider.

    Args:
        model: An additive network with a partition of cells or columns.
        output: Output of `model`, whose features are used if it has no superfeatures.
        target_class: i64 [B, E], where a negative entry results in a zero map.

    Returns:
        [B, E, 1, rows, columns], with a table's columns in one row.

    Raises:
        ConfigError: If the network is not an additive one, or divides channels.
    """
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"explainer=superfeatures explains additive networks (teacher=additive, student=additive), not "
            f"{type(model.network).__name__}; set explainer={model.explainer}, or choose additive networks for both"
        )
    require(
        not model.of_channels,
        "explainer=superfeatures spreads a contribution over the cells of its superfeature, and groups of channels "
        "(trunk_features=channels) have none; set explainer=gradcam",
    )
    if (logits := output.extras.get(LOGITS)) is None:
        with exact_float32(output.features.device):
            dtype = next(model.parameters()).dtype
            logits = model.forward_superfeatures(output.features.to(dtype)).logits
    group = model.assignments[-1]
    index = target_class.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    shares = class_centered(logits).gather(2, index) / group.bincount()[:, None]  # [B, M, E]
    cells = shares[:, group].transpose(1, 2) * (target_class >= 0)[:, :, None]  # [B, E, d]
    rows, columns = model.grid or (1, len(group))
    return cells.reshape(*target_class.shape, 1, rows, columns)
