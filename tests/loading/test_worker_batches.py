"""Batches of loader processes: the same tensors, of which small ones are sent in the message."""

import pickle
from dataclasses import replace

import numpy as np
import torch

from permafrost.core.batches import Batch, StoredTargets
from permafrost.loading import transfer as worker_batches
from permafrost.loading.transfer import pack_batch, unpack_batch


def batch_of(records, side):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (records, side, side, 3), generator=generator, dtype=torch.uint8)
    return Batch(
        keys=tuple(map(str, range(records))),
        record_index=torch.arange(records),
        inputs=frames.permute(0, 3, 1, 2),
        canonical_from_view=None,
        view_index=torch.full((records,), -1),
        original_size=torch.rand(records, 2, generator=generator),
        labels=torch.arange(records),
        groups=torch.arange(records),
        boxes=(torch.zeros(0, 5), torch.rand(2, 5, generator=generator)),
        targets=(
            StoredTargets(
                teacher="t",
                logits=torch.rand(records, 10, generator=generator),
                maps=torch.rand(records, 1, 1, 64, 64, generator=generator).half(),
                intermediates={"pooled": torch.rand(records, 8, generator=generator)},
            ),
        ),
    )


def leaves(batch):
    found = []
    worker_batches.map_leaves(batch, lambda leaf: found.append(leaf) or leaf)
    return found


def test_a_batch_comes_back_with_the_same_values_and_memory_formats():
    batch = batch_of(16, 8)

    sent = pickle.loads(pickle.dumps(pack_batch(batch)))  # noqa: S301
    received = unpack_batch(sent)

    for before, after in zip(leaves(batch), leaves(received), strict=True):
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert before.stride() == after.stride() or before.numel() == 0
            assert torch.equal(before, after)
        else:
            assert before == after


def test_small_tensors_are_arrays_on_their_way_and_large_or_permuted_ones_are_not(monkeypatch):
    monkeypatch.setattr(worker_batches, "_SMALL", 16 * 64 * 64 * 2 - 1)

    sent = pack_batch(batch_of(16, 8))

    assert isinstance(sent.inputs, torch.Tensor)  # small, but with channels last
    assert isinstance(sent.targets[0].maps, torch.Tensor)  # one byte too large
    assert isinstance(sent.labels, np.ndarray)
    assert isinstance(sent.targets[0].intermediates["pooled"], np.ndarray)
    assert all(isinstance(boxes, np.ndarray) for boxes in sent.boxes)
    assert isinstance(replace(sent, boxes=()).keys[0], str)
