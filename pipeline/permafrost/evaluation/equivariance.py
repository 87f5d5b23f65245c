"""Equivariance of a teacher: stored targets of a transformed view compared with the teacher's output on that view.

Frozen mode keeps a record's logits and applies the view's transform to its map. Both are approximations. Their
quality depends on the teacher and on the augmentation, and this module measures it for one kind of operation at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.core.files import sha256_json
from permafrost.core.records import Batch
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.loading.transfer import copy_to, iter_on_device
from permafrost.losses.e2kd import map_cosine
from permafrost.models.classifier import Classifier
from permafrost.models.explanations import (
    Explainer,
    explainer_named,
    forward_to_explain,
    pass_precision,
)
from permafrost.models.fingerprint import describe_teacher
from permafrost.models.providers import (
    build_model,
    freeze,
    resolve_device,
    teacher_input_size,
    with_preprocessing,
)
from permafrost.models.resolve import require_images
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store

if TYPE_CHECKING:
    from permafrost.config.models import ModelConfig
    from permafrost.config.verbs import VerifyConfig


UNMOVED = "none"
"""Name of the measurement on the whole frame, which shows the error of the store's rounding alone."""
_BATCH = 64


@torch.no_grad()
def teacher_equivariance(config: VerifyConfig, store: Store, teacher: ModelConfig) -> str:
    """Run `measure_equivariance` for the teacher of one pass of the store, and format one line per operation."""
    require_images(store, "equivariance=true", "set it to false")
    num_classes = len(store.manifest.classes)
    asked = sha256_json(
        describe_teacher(teacher, num_classes, pass_precision(config.annotate, config.explainer))
    )
    passes = [store.open_pass(folder.name) for folder in store.pass_folders()]
    taught = [
        t
        for t in passes
        if sha256_json(t.manifest.teacher) == asked and t.explainer == config.explainer.kind
    ]
    if not taught:
        raise StoreMismatchError(
            f"{store.path} contains no pass of this teacher with explainer={config.explainer.kind}; it contains: "
            + ", ".join(t.name for t in passes)
        )
    rows = rows_of_split(store.index, config.split)
    chosen = np.sort(
        np.random.default_rng(0).permutation(np.asarray(rows))[: config.equivariance_records]
    )
    side = teacher_input_size(with_preprocessing(teacher, num_classes))
    device = resolve_device("device", "auto")
    dataset = StoreDataset(store, chosen, taught[:1], decode_threads=resolve_decode_threads(None))
    measured = measure_equivariance(
        freeze(build_model(teacher, num_classes)).to(device),
        explainer_named(config.explainer.kind),
        store.size if side is None else (side, side),
        dataset,
        config.augment.operations,
    )
    lines = [
        f"  {kind:16s} map cosine {values['map_cosine']:.4f}  KL {values['logits_kl']:.4f}  "
        f"top-1 agrees {values['top1_agreement']:.3f}"
        for kind, values in measured.items()
    ]
    return "\n" + "\n".join(lines)


def measure_equivariance(
    model: Classifier,
    explain: Explainer,
    input_size: tuple[int, int],
    dataset: StoreDataset,
    operations: Sequence[OperationConfig],
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure each kind of operation, always applied, over the dataset's first canonical pass.

    map_cosine     mean cosine between the warped stored map and the recomputed map of the stored class, at the
                   teacher's input size, without pairs in which either is zero
    logits_kl      mean KL(recomputed || stored) of the softmax at temperature 1
    top1_agreement share of records whose stored and recomputed logits have the same top-1 class

    model       the teacher of the pass, frozen
    input_size  (height, width) of the views that it receives
    """
    alone: dict[str, tuple[OperationConfig, ...]] = {UNMOVED: ()}
    alone |= {operation.kind: (replace(operation, p=1.0),) for operation in operations}
    one_aspect = dataset.has_frame_aspect
    schedules = {
        kind: ViewSchedule(
            AugmentOptions(operations=drawn), dataset.store.size, seed, one_aspect=one_aspect
        )
        for kind, drawn in alone.items()
    }
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in alone}
    device = next(model.parameters()).device
    on_host = iter_batches(dataset, _BATCH)  # each image is decoded once
    for number, (batch, moved) in enumerate(iter_on_device(on_host, device)):
        for kind, schedule in schedules.items():
            views = schedule.views(0, number * _BATCH, batch.aspects)
            drawn = None if views is None else copy_to(views, device)
            seen = replace(moved, canonical_from_view=drawn)
            parts[kind].append(_compare(model, explain, input_size, seen))
    measured = {}
    for kind, compared in parts.items():
        cosine, kl, agrees = (torch.cat(v).double() for v in zip(*compared, strict=True))
        measured[kind] = {
            "map_cosine": float(cosine.nanmean()),
            "logits_kl": float(kl.mean()),
            "top1_agreement": float(agrees.mean()),
        }
    return measured


def _compare(
    model: Classifier, explain: Explainer, input_size: tuple[int, int], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each record, the cosine (nan if a map is zero), the KL and the top-1 agreement, each [n]."""
    stored = batch.targets[0]
    assert stored.explained_class is not None
    output = forward_to_explain(model, view_images(batch, input_size))
    logits = output.logits.detach()
    recomputed = explain(model, output, stored.explained_class)
    grid = (recomputed.shape[-2], recomputed.shape[-1])
    moved = view_maps(batch, stored, grid)
    cosine, valid = map_cosine(moved, recomputed, input_size)
    kl = F.kl_div(
        F.log_softmax(stored.logits, dim=1),
        F.log_softmax(logits, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    agrees = stored.logits.argmax(dim=1) == logits.argmax(dim=1)
    return cosine.masked_fill(~valid, float("nan")).flatten().cpu(), kl.cpu(), agrees.cpu()
