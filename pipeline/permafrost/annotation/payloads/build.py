"""Construction of the payloads that options name."""

from __future__ import annotations

import pkgutil

from permafrost.annotation.payloads.payload import Payload
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PAYLOADS, PassOptions


def build_payloads(config: PassOptions, explainer: ExplainerConfig) -> list[Payload]:
    """Build one payload for each of `annotate.payloads`, in that order."""
    return [
        pkgutil.resolve_name(PAYLOADS[name].implementation)(config, explainer)
        for name in config.payloads
    ]
