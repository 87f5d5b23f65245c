"""What a teacher pass can store. A payload turns one forward pass into arrays, and declares them."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.annotation.payloads.explanation_map import MapPayload
from pipeline.annotation.payloads.intermediates import AttentionPayload, ClassMapPayload
from pipeline.annotation.payloads.logits import LogitsPayload
from pipeline.annotation.payloads.payload import Payload
from pipeline.annotation.payloads.pooled_feature import FeaturePayload
from pipeline.annotation.payloads.superfeature_logits import SuperfeaturePayload
from pipeline.config.models import ExplainerConfig
from pipeline.config.store import PassConfig

PAYLOADS: dict[str, Callable[[PassConfig, ExplainerConfig], Payload]] = {
    "logits": LogitsPayload,
    "map": MapPayload,
    "at": AttentionPayload,
    "cat": ClassMapPayload,
    "feature": FeaturePayload,
    "ked_z": SuperfeaturePayload,
}
