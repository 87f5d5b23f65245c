"""Mixtures of two records of a batch (MixUp, CutMix): their draws, images, labels and stored targets.

Rows 2i and 2i + 1 of a batch are each other's second image. Pairs stay together when a batch is divided among ranks,
and since the order of an epoch is random, so are the pairs. Each record has a share and a box of its own.

Shape letters: B batch, E target classes, A map channels, K classes, C channels, h w cells at any resolution.

Not here: mixtures of more than two images, and partners that are chosen by their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.augment import MixConfig
from permafrost.core.batches import (
    AnyLabels,
    Batch,
    Logits,
    MapTargets,
    MixedLabels,
    MixedLogits,
    MixedMapTargets,
    Mixture,
    Targets,
    TopLogits,
    require_logits,
)
from permafrost.core.errors import require
from permafrost.core.records import MIXTURE_FIELD, NO_CLASS, PARTNER_FIELD
from permafrost.loading.pixel_changes import box_fractions
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import TeacherPass

# ---- draws ---------------------------------------------------------------------------------------


UNMIXED = (1.0, 0.0, 0.0, 0.0, 0.0)
"""Share and box of a record that is not mixed."""


def draw_mixtures(
    mix: Sequence[MixConfig], generator: np.random.Generator, count: int
) -> NDArray[np.float32]:
    """Draw the share lambda and the box x0, y0, x1, y1 of `count` records, f32 [count, 5].

    A box has 1 - lambda' of the area, with lambda' from Beta(alpha, alpha), the aspect ratio of the image and a uniform
    center. It is cut at the edges, and lambda is what it leaves (Yun et al. 2019). Records that no mixture is drawn for
    have lambda = 1 and a box without area.
    """
    drawn = np.tile(np.array(UNMIXED), (count, 1))
    for each in (mixture for mixture in mix if mixture.p > 0):
        is_drawn = generator.random(count) < each.p
        shares = generator.beta(each.alpha, each.alpha, count)
        centers = generator.random((count, 2))
        values = np.zeros((count, 5))
        values[:, 0] = shares
        if each.kind == "cutmix":
            half = np.sqrt(1 - shares)[:, None] / 2
            values[:, 1:3] = (centers - half).clip(0, 1)
            values[:, 3:] = (centers + half).clip(0, 1)
            values[:, 0] = 1 - _areas(values)
        drawn = np.where(is_drawn[:, None], values, drawn)
    return drawn.astype(np.float32)


def _areas(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the areas of the boxes of drawn values [n, 5]."""
    areas: NDArray[np.floating] = np.prod(values[:, 3:] - values[:, 1:3], axis=1)
    return areas


def paired_rows(count: int, per_step: int = 1) -> Tensor:
    """Return the row of each row's partner, i64 [count]: 1, 0, 3, 2 and so on, or its own for a last one without any.

    Args:
        count: Number of rows.
        per_step: Number of views of a record, which are in consecutive rows. The partner of a view is the view of the
            same number.
    """
    rows = torch.arange(count)
    partners = ((rows // per_step) ^ 1) * per_step + rows % per_step
    return torch.where(partners < count, partners, rows)


def draw_partners(generator: np.random.Generator, count: int, block: int) -> NDArray[np.int64]:
    """Draw the row of each record's second image within blocks of rows, i64 [count].

    The rows of a block follow each other in a random circle, so that each is the second image of one other.

    Args:
        generator: Generator of the draws.
        count: Number of rows.
        block: Number of rows of a block. That of the last one is what is left, and a single row has itself.
    """
    partners = np.empty(count, np.int64)
    for start in range(0, count, block):
        order = start + generator.permutation(min(block, count - start))
        partners[order] = np.roll(order, -1)
    return partners


def mixture_of(values: NDArray[np.floating], partners: Tensor) -> Mixture:
    """Return the mixture of drawn or stored values.

    Args:
        values: lambda, x0, y0, x1, y1 of each record, [B, 5]. lambda of a box with an area is what it leaves.
        partners: Row of the second image, i64 [B].
    """
    values = values.astype(np.float32)
    areas = _areas(values)
    shares = np.where(areas > 0, 1 - areas, values[:, 0])
    return Mixture(
        partners=partners,
        shares=torch.from_numpy(shares.astype(np.float32)),
        boxes=torch.from_numpy(values[:, 1:].copy()),
    )


def mixes_of_pass(teacher: TeacherPass) -> bool:
    """Return whether the stored views of a pass are mixtures.

    Raises:
        ManifestError: If its manifest names mixtures and not their fields, or the reverse.
    """
    described = teacher.manifest.views.get("mix")
    fields = {spec.name: spec for spec in teacher.manifest.fields}
    stored = [fields.get(spec.name) for spec in (MIXTURE_FIELD, PARTNER_FIELD)]
    if described is None and stored == [None, None]:
        return False
    require(
        isinstance(described, list)
        and bool(described)
        and stored == [MIXTURE_FIELD, PARTNER_FIELD],
        f"{teacher.folder / MANIFEST_NAME}: views.mix and the fields {MIXTURE_FIELD.name} and {PARTNER_FIELD.name} "
        "do not describe stored mixtures",
        ManifestError,
    )
    return True


def are_mixtures(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return which stored values [..., 5] are a share and a box in [0, 1]."""
    inside = ((values >= 0) & (values <= 1)).all(axis=-1)
    return np.logical_and(inside, (values[..., 1:3] <= values[..., 3:]).all(axis=-1))


# ---- images --------------------------------------------------------------------------------------


def own_weights(mixture: Mixture, size: tuple[int, int]) -> Tensor:
    """Compute the weight of each record's own image in each cell, f32 [B, 1, height, width].

    Args:
        mixture: Shares and boxes.
        size: (height, width) of the grid.
    """
    x0, y0, x1, y1 = mixture.boxes.unbind(dim=1)
    has_box = ((x1 > x0) & (y1 > y0))[:, None, None]
    outside = 1 - box_fractions(mixture.boxes, size)
    return torch.where(has_box, outside, mixture.shares[:, None, None])[:, None]


def mix_images(images: Tensor, mixture: Mixture, seconds: Tensor | None = None) -> Tensor:
    """Mix images, f32 [B, C, h, w]. A pixel at the edge of a box has both by their parts of it.

    Args:
        images: The records' own images.
        mixture: Partners, shares and boxes.
        seconds: Images among which the partners are, None for `images`.
    """
    seconds = (images if seconds is None else seconds)[mixture.partners]
    weights = own_weights(mixture, (images.shape[-2], images.shape[-1]))
    return weights * images + (1 - weights) * seconds


# ---- targets -------------------------------------------------------------------------------------


def labels_of(batch: Batch) -> AnyLabels:
    """Return the labels of a batch, those of both records for mixtures."""
    mixture = None if batch.pixel_augment is None else batch.pixel_augment.mixture
    if mixture is None:
        return batch.labels
    seconds = batch.labels if batch.second is None else batch.second.labels
    return MixedLabels(first=batch.labels, second=seconds[mixture.partners], shares=mixture.shares)


def mixture_of_targets(batch: Batch) -> Mixture | None:
    """Return the mixture of a batch whose stored targets are those of its unmixed images, None for any other batch."""
    augment = batch.pixel_augment
    return None if augment is None or batch.second is not None else augment.mixture


def mix_targets(targets: Targets, *, second_maps: bool = True) -> Targets:
    """Return targets of mixtures from the stored targets of their images (docs/concepts/one-geometry.md).

    Logits stay those of both records, with their shares. Target classes are those of both, each with the cells and
    the share of its record. Other fields are mixed cell by cell, those without cells by the share.

    Args:
        targets: Targets of a batch in its views, returned unchanged if their images are not mixed.
        second_maps: False leaves out the classes of the second record, whose share then counts for nothing.

    Raises:
        ConfigError: If a field is neither a grid nor a vector per record.
    """
    if (mixture := targets.mixture) is None:
        return targets
    fields, coverage = _mix_fields(targets, mixture)
    mixed = replace(targets, intermediates=fields, coverage=coverage)
    if targets.logits is not None:
        first = require_logits(targets.logits)
        assert not isinstance(first, MixedLogits)
        second = _rows_of(first, mixture.partners)
        mixed = replace(
            mixed, logits=MixedLogits(first=first, second=second, shares=mixture.shares)
        )
    return (
        _mix_maps(mixed, mixture, second_maps=second_maps)
        if isinstance(mixed, MapTargets)
        else mixed
    )


def _rows_of(logits: Logits, rows: Tensor) -> Logits:
    if isinstance(logits, Tensor):
        return logits[rows]
    assert isinstance(logits, TopLogits)
    return replace(
        logits, values=logits.values[rows], classes=logits.classes[rows], rest=logits.rest[rows]
    )


def _mix_fields(targets: Targets, mixture: Mixture) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mix intermediates, and their coverage.

    With coverages a and b of both records, a cell has (w a A + (1 - w) b B) / (w a + (1 - w) b), and the divisor is its
    coverage.
    """
    fields, coverage = {}, {}
    for name, values in targets.intermediates.items():
        spec = targets.specs.get(name)
        is_grid = spec is not None and spec.axes[-2:] == ("y", "x")
        require(
            is_grid or values.ndim == 2,
            f"augment.mix has no rule for the field {name} of {targets.teacher}, which is neither a grid nor a "
            "vector per record; set augment.mix=[]",
        )
        shape = (values.shape[-2], values.shape[-1]) if is_grid else (1, 1)
        weights = own_weights(mixture, shape).to(values)
        covered = targets.coverage.get(name)
        seconds = values[mixture.partners]
        if covered is not None:
            first, second = weights * covered, (1 - weights) * covered[mixture.partners]
            coverage[name] = first + second
            total = torch.where(coverage[name] > 0, coverage[name], 1.0)
            fields[name] = (first * values + second * seconds) / total
            continue
        weights = weights if values.ndim == 4 else weights[:, 0]
        weights = weights if is_grid else weights[:, :, 0]
        fields[name] = weights * values + (1 - weights) * seconds
    return fields, coverage


def _mix_maps(targets: MapTargets, mixture: Mixture, *, second_maps: bool) -> MixedMapTargets:
    """Append the target classes of each record's partner, and weight the classes and cells of both."""
    partners, grid = mixture.partners, (targets.maps.shape[-2], targets.maps.shape[-1])
    shares_of_cells = own_weights(mixture, grid)
    pasted = (mixture.boxes[:, 2:] > mixture.boxes[:, :2]).all(dim=1)[:, None, None, None]
    classes, maps, valid, weights, cells = [], [], [], [], []
    parts = [
        (None, mixture.shares, shares_of_cells),
        (partners, 1 - mixture.shares, 1 - shares_of_cells),
    ]
    for rows, shares, cell_shares in parts if second_maps else parts[:1]:
        explained, grids, is_valid = (
            tensor if rows is None else tensor[rows]
            for tensor in (targets.target_class, targets.maps, targets.map_valid)
        )
        counted = (explained >= 0) & (shares > 0)[:, None]
        classes.append(explained.where(counted, torch.full_like(explained, NO_CLASS)))
        maps.append(grids)
        valid.append(is_valid & counted)
        weights.append(shares[:, None] * counted / counted.sum(dim=1, keepdim=True).clamp(min=1))
        cell = torch.where(pasted, cell_shares, 1.0)
        cells.append(cell[:, None].expand(-1, explained.shape[1], -1, -1, -1))
    mixed = {
        "target_class": torch.cat(classes, dim=1),
        "maps": torch.cat(maps, dim=1),
        "map_valid": torch.cat(valid, dim=1),
    }
    return MixedMapTargets(
        **{**vars(targets), **mixed},
        class_weights=torch.cat(weights, dim=1),
        cell_weights=torch.cat(cells, dim=1),
    )
