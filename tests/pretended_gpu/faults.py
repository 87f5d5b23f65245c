"""Faults that only a GPU shows, put into the code one at a time: the pretended GPU must find each of them.

python -m tests.pretended_gpu.faults          prints what was found, as JSON
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.pretended_gpu import paths
from tests.support import settings

from permafrost.annotation import outputs  # isort: skip
from permafrost.loading import geometry, transfer  # isort: skip
from permafrost.losses import e2kd, feature_kd  # isort: skip
from permafrost.training import loop, step  # isort: skip

CPU = torch.device("cpu")
_TRAIN = {"method": settings.E2KD}
_STRONG = {**_TRAIN, "augment": settings.STRONG}
_WHOLE = {**_TRAIN, "augment": replace(settings.NONE, size=24)}


def after(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a patch that changes what a function returns."""
    return lambda original: lambda *words, **options: change(original(*words, **options))


def _reads_loss(terms: Any) -> Any:
    terms.total.item()
    return terms


def _selects(images: Any) -> Any:
    return images[(images.mean((1, 2, 3)) > -1e9)]


def _counts(outcome: Any) -> Any:
    torch.unique(outcome[1])
    return outcome


def _on_host(targets: Any) -> Any:
    tensors = {name: value for name, value in vars(targets).items() if torch.is_tensor(value)}
    return replace(targets, **{name: value.cpu() for name, value in tensors.items()})


def _indexes(images: Any) -> Any:
    return images[torch.arange(len(images))]


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], dict[str, Any] | None]] = {
    "an identity on the host": (
        *(geometry, "canonical_from_view"),
        lambda _: lambda batch: torch.eye(3).expand(len(batch.inputs), 3, 3),
        _WHOLE,
    ),
    "changes that stay on the host": (
        *(transfer, "_move_changed"),
        lambda original: (
            lambda changed, device: (original((changed[0], None), device)[0], changed[1])
        ),
        _STRONG,
    ),
    "batches that stay on the host": (
        *(transfer, "move_batch", lambda _: lambda batch, _: batch),
        _TRAIN,
    ),
    "copies from pageable memory": (
        *(transfer, "copy_to", lambda _: lambda value, device: value.to(device)),
        _TRAIN,
    ),
    "a truth value in a loss": (
        *(e2kd, "map_cosine", after(lambda pair: (bool(pair[1].any()), pair)[1])),
        _TRAIN,
    ),
    "a loss that is read in each step": (step, "batch_loss", after(_reads_loss), _TRAIN),
    "a mask in a step": (step, "view_images", after(_selects), _TRAIN),
    "a count in a step": (e2kd, "map_cosine", after(_counts), _TRAIN),
    "indices of the host": (step, "view_images", after(_indexes), _TRAIN),
    "images in NumPy": (
        *(step, "view_images", after(lambda images: (images.detach().numpy(), images)[1])),
        _TRAIN,
    ),
    "maps of teachers on the host": (step, "mix_targets", after(_on_host), _TRAIN),
    "a synchronization in a step": (
        *(step, "view_images", after(lambda images: (torch.cuda.synchronize(), images)[1])),
        _TRAIN,
    ),
    "algorithms whose sums have no fixed order": (
        *(loop, "deterministic_algorithms", lambda _: lambda *_, **__: nullcontext()),
        _TRAIN,
    ),
    "a pooling whose gradient has no fixed order": (
        *(feature_kd, "pool_cells", lambda _: F.adaptive_avg_pool2d),
        {"method": settings.METHODS["cat_kd"]},
    ),
    "a network that stays on the host": (
        *(loop, "build_training", after(lambda training: (training.model.cpu(), training)[1])),
        _TRAIN,
    ),
    "a map in NumPy, in a pass": (
        *(outputs, "explainer_named"),
        lambda original: (
            lambda kind: (
                lambda *words: (lambda maps: (maps.detach().numpy(), maps)[1])(
                    original(kind)(*words)
                )
            )
        ),
        None,
    ),
    "classes on the host, in a pass": (
        *(outputs, "target_classes", after(lambda classes: classes.cpu())),
        None,
    ),
}
"""Module, function, patch, and the training that it is in, None for a pass."""


def found(name: str) -> str:
    """Run a path with a fault, and return what shows it; empty if nothing does."""
    module, function, patch, options = FAULTS[name]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(module, function, patch(getattr(module, function)))
        try:
            if options is None:
                paths.run_pass("faulty", outputs=("logits", "maps", "pooled"))
                return ""
            numbers = paths.run_training("faulty", **options)
        except (RuntimeError, TypeError, AssertionError) as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return ", ".join([*numbers["waits"], *numbers["unrepeatable"]])


def main() -> None:
    """Print what shows each fault."""
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp(prefix="faults-"))
    paths.run_pass("frozen", outputs=("logits", "maps", "class_maps"))
    sound = paths.run_training("sound", **_STRONG)
    results = {
        "": ", ".join([*sound["waits"], *sound["unrepeatable"]]),
        **{name: found(name) for name in FAULTS},
    }
    print(json.dumps(results, indent=1), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
