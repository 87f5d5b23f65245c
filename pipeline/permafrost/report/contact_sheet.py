"""Contact sheet of a store: images and every teacher's maps, as stored and under random views.

Image and map are transformed by the same matrix, so a misplaced map is immediately visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from permafrost.config.augment import AugmentOptions
from permafrost.core.records import Batch
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.views import ViewSchedule
from permafrost.models.bcos.layers import add_inverse
from permafrost.models.explainers.bcos_weights import color_picture, is_bcos_weights
from permafrost.report.pictures import class_names, composite_on_white, overlays, readable_classes
from permafrost.report.tiles import PictureRow, TileRow, picture_grid
from permafrost.store.reader import Store, TeacherPass

VIEW_SIZE = (112, 112)
"""Size (height, width) in pixels of a view's picture."""


def contact_sheet(
    store: Store,
    passes: Sequence[TeacherPass],
    augment: AugmentOptions,
    *,
    num_records: int,
    num_views: int,
) -> list[TileRow]:
    """Show records spread over the store in columns.

    Whole images are shown in their original aspect ratio, views as the student's input.
    """
    rows = np.linspace(0, store.num_records() - 1, min(num_records, store.num_records()))
    dataset = StoreDataset(store, np.unique(rows.astype(np.int64)), passes)
    batch = dataset.__getitems__(list(range(len(dataset))))
    one_aspect = dataset.has_frame_aspect
    schedule = ViewSchedule(augment, store.size, seed=0, one_aspect=one_aspect)
    names = class_names(batch.labels.numpy(), readable_classes(store.manifest.classes))
    aspects = dataset.aspects()
    pictures = _rows(batch, "image", names, aspects.tolist())
    for view in range(num_views):
        matrices = schedule.views(epoch=view, start=0, aspects=aspects)
        if matrices is not None:
            moved = replace(batch, canonical_from_view=matrices)
            pictures += _rows(moved, f"view {view + 1}", [""] * len(names), [1.0] * len(names))
    return picture_grid(pictures)


def _rows(batch: Batch, title: str, captions: list[str], aspects: list[float]) -> list[PictureRow]:
    images = view_images(batch, VIEW_SIZE)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shown = [PictureRow(title, list(pixels), captions, aspects=aspects)]
    for stored in batch.targets:
        if stored.maps is None:
            continue
        maps = view_maps(batch, stored, VIEW_SIZE)
        name = stored.teacher.rsplit("-", 1)[0]
        if is_bcos_weights(maps):
            colors = (color_picture(maps, add_inverse(images))[:, 0] * 255).round()
            shown.append(
                PictureRow(
                    name, composite_on_white(colors.to(torch.uint8).numpy()), aspects=aspects
                )
            )
        else:
            heat = overlays(pixels, maps[:, 0].sum(dim=1).numpy())
            shown.append(PictureRow(name, heat, aspects=aspects))
    return shown
