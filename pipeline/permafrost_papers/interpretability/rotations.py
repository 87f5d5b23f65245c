"""The four rotations of a view by multiples of 90 degrees: stored views of a pass, and those of a step of mode=live."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from permafrost.config.augment import AugmentOptions, ViewsConfig
from permafrost.core.batches import Batch, Moves
from permafrost.loading.geometry import canonical_from_view
from permafrost.loading.windows import Views
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry
from permafrost_papers.interpretability.options import NUM_ROTATIONS


def rotations() -> Tensor:
    """Return the exact canonical_from_view of the four rotations by multiples of 90 degrees, f64 [4, 3, 3]."""
    return torch.tensor(
        [
            [[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]
            for cosine, sine in ((1, 0), (0, 1), (-1, 0), (0, -1))
        ],
        dtype=torch.float64,
    )


def turn_views(batch: Batch) -> Batch:
    """Repeat each record of a batch without targets in the four rotations of its view, upright first: 4 B records.

    Only crops and flips are rotated. Pixel augmentation is drawn afterwards, for each rotation.
    """
    assert not batch.targets
    turns = rotations().float().to(batch.inputs.device)
    turned = canonical_from_view(batch)[:, None] @ turns
    count = len(batch.keys)
    rows = torch.arange(count).repeat_interleave(NUM_ROTATIONS)
    moves = batch.moves
    if (
        batch.has_windows or moves is not None
    ):  # a window is turned, a frame sampled by the turned matrix
        windows = torch.eye(3, device=turns.device).repeat(count, 1, 1)
        places = torch.arange(count, device=turns.device)  # moved ones come first
        between: tuple[Tensor, ...] = ()
        if moves is not None:
            windows = windows.index_copy(0, moves.rows, moves.window_from_view)
            places = places.index_copy(0, moves.rows, places[: len(moves.rows)] - count).argsort()
            between = tuple((each[:, None] @ turns).flatten(0, 1) for each in moves.between)
        turned_rows = places[:, None] * NUM_ROTATIONS + torch.arange(
            NUM_ROTATIONS, device=turns.device
        )
        moves = Moves(
            rows=turned_rows.flatten(),
            window_from_view=(windows[places][:, None] @ turns).flatten(0, 1),
            between=between,
        )
    device_rows = rows.to(batch.inputs.device)
    host_labels = batch.host_labels
    return replace(
        batch,
        keys=tuple(batch.keys[row] for row in rows.tolist()),
        record_index=batch.record_index[device_rows],
        inputs=batch.inputs[device_rows],
        canonical_from_view=turned.flatten(0, 1),
        moves=moves,
        view_index=torch.arange(NUM_ROTATIONS, device=device_rows.device).repeat(len(batch.keys)),
        original_size=batch.original_size[device_rows],
        labels=batch.labels[device_rows],
        groups=batch.groups[device_rows],
        masks=None if batch.masks is None else batch.masks[device_rows],
        boxes=tuple(batch.boxes[row] for row in rows.tolist()) if batch.boxes else (),
        host_labels=None if host_labels is None else host_labels[rows],
    )


def draw_rotations(
    config: ViewsConfig, augment: AugmentOptions, store: Store, shard: ShardEntry
) -> Views:
    """Return the rotations of the whole frame for all records of a shard, [n, 4]."""
    return Views(rotations().expand(shard.records, -1, -1, -1).float())
