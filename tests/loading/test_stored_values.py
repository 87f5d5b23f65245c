"""Stored values: they leave the loader as stored, and are decoded to the same float32 as in the store's code."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from permafrost.config.store import PassOptions
from permafrost.core.batches import StoredTargets
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import (
    TargetRequest,
    decode_intermediates,
    decode_maps,
    view_targets,
)
from permafrost.loading.transfer import move_batch
from permafrost.store.codecs import decode_unit
from permafrost.store.reader import Store
from tests.support.stores import precompute_config
from tests.support.tensors import encode_maxabs
from tests.support.verbs import precompute


def targets_of(maps, **fields):
    classes = torch.zeros(len(maps), 1, dtype=torch.int64)
    return StoredTargets(teacher="t", logits=None, target_class=classes, maps=maps, **fields)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_maps_are_decoded_to_the_bits_of_the_stores_code(dtype):
    values = np.random.default_rng(0).normal(size=(8, 1, 6, 5, 5)).astype(np.float32)
    stored, _ = encode_maxabs(values, dtype, (2, 3, 4))

    decoded = decode_maps(targets_of(torch.from_numpy(stored)))

    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded, decode_unit(stored))


def test_every_int8_is_its_number_of_steps_of_1_127():
    steps = np.arange(-127, 128)

    decoded = decode_maps(targets_of(torch.from_numpy(steps.astype(np.int8))))

    np.testing.assert_array_equal(decoded, (steps / 127).astype(np.float32))


def test_an_intermediate_is_multiplied_by_its_scale_only_if_it_has_one():
    targets = replace(
        targets_of(torch.zeros(2, 1)),
        intermediates={
            "attention_1": torch.tensor([[[127, -127]], [[0, 127]]], dtype=torch.int8),
            "pooled": torch.tensor([[0.5], [3.0]], dtype=torch.float16),
        },
        scales={"attention_1": torch.tensor([2.0, 10.0])},
    )

    decoded = decode_intermediates(targets)

    assert decoded["attention_1"].tolist() == [[[2.0, -2.0]], [[0.0, 10.0]]]
    assert decoded["pooled"].tolist() == [[0.5], [3.0]]
    assert decoded["pooled"].dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", ["float16", "int8", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_what_leaves_the_loader_and_moves_to_the_device_has_the_stored_dtype(
    tmp_path, tiny_teacher, dtype
):
    annotate = PassOptions(
        batch_size=8, map_dtype=dtype, outputs=("logits", "maps", "attention"), min_fidelity=0.9
    )
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, annotate=annotate))
    store = Store(tmp_path / "store")
    passes = store.open_passes()
    stored = {spec.name: spec.dtype for spec in passes[0].manifest.fields}
    dataset = StoreDataset(store, range(8), passes, output="attention")

    batch = dataset.__getitems__(list(range(8)))

    (targets,) = batch.targets
    dtypes = {name: getattr(torch, stored[name]) for name in targets.intermediates}
    assert stored["map"] == dtype
    assert torch.float16 in dtypes.values()
    for on_device in (batch, move_batch(batch, torch.device("meta"))):
        (held,) = on_device.targets
        assert held.maps.dtype == getattr(torch, dtype)
        assert {name: values.dtype for name, values in held.intermediates.items()} == dtypes
        (viewed,) = view_targets(on_device, TargetRequest((4, 4)))
        assert viewed.maps.dtype == torch.float32
        assert {values.dtype for values in viewed.intermediates.values()} == {torch.float32}
