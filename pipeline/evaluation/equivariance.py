"""What a stored target is worth once the view moves: against the teacher asked again on that very view.

Frozen mode keeps a record's logits and moves its map along. Both are approximations, and how good they are
depends on the teacher and on the augmentation; this measures it, one kind of operation at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.augment import AugmentOptions, OperationConfig
from pipeline.core.files import sha256_json
from pipeline.core.records import Batch
from pipeline.loading.dataset import StoreDataset, iter_batches
from pipeline.loading.geometry import view_images, view_maps
from pipeline.loading.loader import move_batch
from pipeline.loading.selection import rows_of_split
from pipeline.loading.views import ViewSchedule
from pipeline.losses.map_cosine import map_cosine
from pipeline.models.classifier import Classifier
from pipeline.models.devices import resolve_device
from pipeline.models.explainers.explain import EXPLAINERS, Explainer, forward_to_explain
from pipeline.models.fingerprint import describe_teacher
from pipeline.models.providers import build_model, freeze, teacher_input_size
from pipeline.models.resolve import require_images
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config.models import ModelConfig
    from pipeline.config.verbs import VerifyConfig


UNMOVED = "none"
"""The whole frame: what the store's rounding alone costs."""
_BATCH = 64


@torch.no_grad()
def teacher_equivariance(config: VerifyConfig, store: Store, teacher: ModelConfig) -> str:
    """`measure_equivariance` of the teacher that made a pass of the store, as a line a kind of operation."""
    require_images(store, "equivariance=true", "verify it without")
    num_classes = len(store.manifest.classes)
    asked = sha256_json(describe_teacher(teacher, num_classes, config.annotate.precision))
    passes = [store.open_pass(folder.name) for folder in store.pass_folders()]
    taught = [
        t
        for t in passes
        if sha256_json(t.manifest.teacher) == asked and t.explainer == config.explainer.kind
    ]
    if not taught:
        raise StoreMismatchError(
            f"{store.path} holds no pass of this teacher and explainer={config.explainer.kind}; it holds: "
            + ", ".join(t.name for t in passes)
        )
    rows = rows_of_split(store.index, config.split)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[: config.equivariance_records])
    side = teacher_input_size(teacher)
    measured = measure_equivariance(
        freeze(build_model(teacher, num_classes)).to(resolve_device("device", "auto")),
        EXPLAINERS[config.explainer.kind],
        store.size if side is None else (side, side),
        StoreDataset(store, chosen, taught[:1]),
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
    """Of each kind of operation, always applied, over the dataset's first canonical pass:

    map_cosine     mean cosine of the warped stored map with the recomputed one, of the stored class, at the
                   teacher's input size; pairs in which either is zero are left out
    logits_kl      mean KL(recomputed || stored) of the softmax at temperature 1
    top1_agreement of stored and recomputed logits

    model       the pass's own teacher, frozen
    input_size  (height, width) at which it sees a view
    """
    alone: dict[str, tuple[OperationConfig, ...]] = {UNMOVED: ()}
    alone |= {operation.kind: (replace(operation, p=1.0),) for operation in operations}
    height, width = dataset.store.size
    one_aspect = bool((dataset.aspects == width / height).all())
    schedules = {
        kind: ViewSchedule(
            AugmentOptions(operations=drawn), dataset.store.size, seed, one_aspect=one_aspect
        )
        for kind, drawn in alone.items()
    }
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in alone}
    device = next(model.parameters()).device
    for number, batch in enumerate(iter_batches(dataset, _BATCH)):  # each image is decoded once
        for kind, schedule in schedules.items():
            views = schedule.views(0, number * _BATCH, dataset.aspects[batch.record_index])
            seen = move_batch(replace(batch, canonical_from_view=views), device)
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
    """Of each record: cosine (nan where a map is zero), KL, whether the top-1 agrees; each [n]."""
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
