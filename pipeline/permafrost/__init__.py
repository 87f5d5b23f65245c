"""Run frozen teachers once, store their logits and explanations, and distill many students from the store.

The names below are public and imported on first use. All others are internal and may change.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from permafrost.config.environment import THREAD_ENVIRONMENT

if TYPE_CHECKING:
    from permafrost.core.errors import UserError
    from permafrost.library import (
        OpenStore,
        attach,
        augmentation,
        distill,
        evaluate,
        explain,
        export,
        ingest,
        load_student,
        open_store,
        precompute,
        preview,
        report,
        share,
        sweep,
        teach,
    )
    from permafrost.loading.record_loader import RecordLoader
    from permafrost.losses.logit_distances import kd_loss
    from permafrost.losses.map_distances import map_cosine


def _let_threads_sleep() -> None:
    """Set how OpenMP's threads wait, which PyTorch reads when it is imported, unless OMP_WAIT_POLICY is set."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    if "torch" in sys.modules:
        logging.getLogger("permafrost").warning(
            "PyTorch was imported before permafrost, so its threads spin while they wait; on a busy machine, import "
            "permafrost first, or set OMP_WAIT_POLICY=PASSIVE"
        )
    else:
        for name, value in THREAD_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


_let_threads_sleep()

_MODULES = {
    "RecordLoader": "permafrost.loading.record_loader",
    "UserError": "permafrost.core.errors",
    "kd_loss": "permafrost.losses.logit_distances",
    "map_cosine": "permafrost.losses.map_distances",
}

__all__ = [
    "OpenStore",
    "RecordLoader",
    "UserError",
    "attach",
    "augmentation",
    "distill",
    "evaluate",
    "explain",
    "export",
    "ingest",
    "kd_loss",
    "load_student",
    "map_cosine",
    "open_store",
    "precompute",
    "preview",
    "report",
    "share",
    "sweep",
    "teach",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'permafrost' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "permafrost.library")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
