"""What a teacher pass can store. A payload turns one forward pass into arrays, and declares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.payloads.explanation_map import MapPayload
from pipeline.payloads.inner import AttentionPayload, ClassMapPayload
from pipeline.payloads.logits import LogitsPayload
from pipeline.payloads.pooled_feature import FeaturePayload
from pipeline.payloads.superfeature_logits import SuperfeaturePayload

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import ExplainerConfig, PassConfig
    from pipeline.payloads.payload import Payload

PAYLOADS: dict[str, Callable[[PassConfig, ExplainerConfig], Payload]] = {
    "logits": LogitsPayload,
    "map": MapPayload,
    "at": AttentionPayload,
    "cat": ClassMapPayload,
    "feature": FeaturePayload,
    "ked_z": SuperfeaturePayload,
}
