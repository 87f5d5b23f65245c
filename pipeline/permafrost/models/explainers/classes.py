"""Selection of the classes that a teacher explains (`explainer.explained_classes`), stored or live.

The selection depends only on the record: its logits, its labels and its key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from permafrost.config.explainers import ExplainerConfig
from permafrost.core.errors import require
from permafrost.core.labels import multi_hot
from permafrost.core.records import NO_CLASS
from permafrost.core.seeds import derive_seed
from permafrost.store.reader import Store

ClassChoice = Callable[[Any, Tensor, Tensor, Sequence[str]], Tensor]
"""(explainer config, logits [B, K], labels in the form of Batch, keys) -> i64 [B, E], NO_CLASS after the last one."""


def explained_classes(
    config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]
) -> Tensor:
    """Select the classes that a teacher with these logits [B, K] explains: i64 [B, E], NO_CLASS after the last one.

    Several classes are ordered by descending logit. For a record without labels, choices by label select none. The
    function does not synchronize with the device.
    """
    return CLASS_CHOICES[config.explained_classes](config, logits.detach(), labels, keys)


def _top1(config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Tensor:
    return logits.argmax(dim=1, keepdim=True)


def _topk(config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Tensor:
    return logits.sort(dim=1, descending=True, stable=True).indices[:, : config.max_classes]


def _all_gt(config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Tensor:
    own = multi_hot(labels, logits.shape[1]) > 0
    scores = logits.masked_fill(~own, -torch.inf)
    highest, classes = scores.sort(dim=1, descending=True, stable=True)
    return classes.masked_fill(highest == -torch.inf, NO_CLASS)[:, : config.max_classes]


def _sample_gt(
    config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]
) -> Tensor:
    own = multi_hot(labels, logits.shape[1]) > 0
    count = own.sum(dim=1)
    seeds = torch.tensor([derive_seed(config.seed, "explained class", key) for key in keys])
    if logits.is_cuda:
        seeds = seeds.pin_memory()  # a copy from pageable memory would synchronize with the device
    drawn = seeds.to(logits.device, non_blocking=True) % count.clamp(min=1)
    chosen = own & (own.cumsum(dim=1) == drawn[:, None] + 1)
    return torch.where(count > 0, chosen.byte().argmax(dim=1), NO_CLASS)[:, None]


CLASS_CHOICES: dict[str, ClassChoice] = {
    "top1": _top1,
    "topk": _topk,
    "all_gt": _all_gt,
    "sample_gt": _sample_gt,
}


def resolve_explainer(config: ExplainerConfig, store: Store, num_classes: int) -> ExplainerConfig:
    """Return the options with E filled in, for a teacher with `num_classes` outputs on a store's records.

    Raises ConfigError if the store lacks the labels that the choice needs.
    """
    chosen = f"explainer.explained_classes={config.explained_classes}"
    if config.explained_classes in ("all_gt", "sample_gt"):
        classes = len(store.manifest.classes)
        require(
            num_classes == classes,
            f"{chosen} needs labels, but the teacher's {num_classes} classes are not the {classes} of the data; "
            "set explainer.explained_classes=top1",
        )
        most = store.index.most_labels()
        require(
            most > 0,
            f"{chosen} needs labels, but {store.path} has none; set explainer.explained_classes=top1",
        )
        if config.explained_classes == "all_gt" and config.max_classes is None:
            return replace(config, max_classes=min(most, num_classes))
    require(
        config.max_classes is None or config.max_classes <= num_classes,
        f"explainer.max_classes={config.max_classes} must be <= {num_classes}, the number of the teacher's classes",
    )
    return config
