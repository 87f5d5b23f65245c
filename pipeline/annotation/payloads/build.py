"""Construction of the payloads that options name."""

from __future__ import annotations

import pkgutil

from pipeline.annotation.payloads.payload import Payload
from pipeline.config.explainers import ExplainerConfig
from pipeline.config.store import PAYLOADS, PassOptions


def build_payloads(config: PassOptions, explainer: ExplainerConfig) -> list[Payload]:
    """Build one payload for each of `annotate.payloads`, in that order."""
    return [
        pkgutil.resolve_name(PAYLOADS[name].implementation)(config, explainer)
        for name in config.payloads
    ]
