"""The study's arms from a store: pooled features, and students of FT, CRD and SSKD."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import AugmentConfig, OperationConfig, PassConfig
from pipeline.dataset import StoreDataset
from pipeline.geometry import view_targets
from pipeline.models import build_model, freeze
from pipeline.models.output import Inner
from pipeline.selection import rows_of_split
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store
from pipeline.stream import TrainingStream
from pipeline.views import ViewSchedule
from stages import precompute
from tests.conftest import Frozen, precompute_config

PASS = PassConfig(batch_size=8, payloads=("logits", "feature"))
SIZE = (16, 16)


def store_with(path, teacher, **options):
    config = precompute_config(path, teacher, annotate=PASS, **options)
    precompute.run(config)
    return Frozen(Store(path), config)


@pytest.fixture(scope="module")
def featured(tmp_path_factory, tiny_teacher):
    """A store with the canonical pass of logits and features."""
    return store_with(tmp_path_factory.mktemp("featured") / "store", tiny_teacher)


def dataset_of(frozen, extra="feature", **options):
    store = frozen.store
    passes = store.open_passes(**options)
    return StoreDataset(store, rows_of_split(store.index, "train"), passes, extra=extra)


# ---- what a pass holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_pass_holds_the_teachers_pooled_features(featured, tmp_path, tiny_teacher, backend):
    store = featured
    if backend == "webdataset":
        store = store_with(tmp_path / "store", tiny_teacher, backend=backend)
    (teacher,) = store.store.open_passes()
    (spec,) = [s for s in teacher.manifest.fields if s.name == "feature"]
    batch = dataset_of(store).__getitems__([0, 5, 30])
    model = freeze(build_model(store.config.teacher, 10))

    wanted = model(batch.inputs.float() / 255, Inner(pooled=True)).pooled
    found = batch.targets[0].extra["feature"]

    assert (spec.shape, spec.dtype, spec.codec) == ((16,), "float16", "raw")
    assert (spec.when_moved, spec.frame) == ("keep", None)
    assert teacher.manifest.fidelity["feature"] > 0.99999
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert list(verify_store(store.store.path)) == []


def test_a_pooled_feature_is_kept_where_the_image_moves(featured):
    flip = AugmentConfig(operations=(OperationConfig(kind="horizontal_flip", p=1.0),))
    views = ViewSchedule(flip, featured.store.size, seed=0)
    batch = next(TrainingStream(dataset_of(featured), views, batch_size=8, seed=0).epoch(0))

    (targets,) = view_targets(batch, (4, 4))

    assert batch.canonical_from_view is not None
    assert torch.equal(targets.extra["feature"], batch.targets[0].extra["feature"])
