"""Run frozen teachers once, store their logits and explanations, and distill many students from the store.

The names below are public and imported on first use, and so are the verbs of packages, as in `permafrost.report(...)`.
All others are internal and may change. An import changes no setting of the process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permafrost.cluster.store_dataset import ray_dataset
    from permafrost.config.models import Picture
    from permafrost.core.errors import UserError
    from permafrost.functions import distill, evaluate, precompute, preview, sweep, teach
    from permafrost.library import (
        OpenStore,
        augmentation,
        explain,
        list_evaluators,
        list_explainers,
        list_methods,
        list_networks,
        load_store,
        load_student,
        open_store,
    )
    from permafrost.loading.record_loader import RecordLoader
    from permafrost.loading.store_samples import StoreSamples
    from permafrost.losses.labels import bce_loss
    from permafrost.losses.logit_distances import kd_loss, mld_loss
    from permafrost.losses.map_distances import map_cosine

_MODULES = {
    "Picture": "permafrost.config.models",
    "RecordLoader": "permafrost.loading.record_loader",
    "StoreSamples": "permafrost.loading.store_samples",
    "UserError": "permafrost.core.errors",
    "bce_loss": "permafrost.losses.labels",
    "kd_loss": "permafrost.losses.logit_distances",
    "map_cosine": "permafrost.losses.map_distances",
    "mld_loss": "permafrost.losses.logit_distances",
    "ray_dataset": "permafrost.cluster.store_dataset",
    **dict.fromkeys(
        ("distill", "evaluate", "precompute", "preview", "sweep", "teach"), "permafrost.functions"
    ),
}

__all__ = [
    "OpenStore",
    "Picture",
    "RecordLoader",
    "StoreSamples",
    "UserError",
    "augmentation",
    "bce_loss",
    "distill",
    "evaluate",
    "explain",
    "kd_loss",
    "list_evaluators",
    "list_explainers",
    "list_methods",
    "list_networks",
    "load_store",
    "load_student",
    "map_cosine",
    "mld_loss",
    "open_store",
    "precompute",
    "preview",
    "ray_dataset",
    "sweep",
    "teach",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "permafrost.library")), name)
    if not name.startswith("_"):
        from permafrost.config.verbs import VERBS

        if name in VERBS:  # of a package
            return import_module("permafrost.functions").verb_function(name)
    raise AttributeError(f"module 'permafrost' has no attribute {name!r}")


def __dir__() -> list[str]:
    from permafrost.config.verbs import VERBS

    return sorted({*__all__, *VERBS, *(name for name in globals() if name.startswith("__"))})
