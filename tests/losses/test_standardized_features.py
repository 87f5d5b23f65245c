"""Standardized targets: closed forms of the maps, their scale, and the statistics that students share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from permafrost.config.methods import EmbeddingConfig, FeaturesConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.loading import channel_moments
from permafrost.loading.channel_moments import stored_moments
from permafrost.losses import standardized_features
from permafrost.losses.restored_features import RestoredFeatures
from permafrost.losses.standardized_features import equalizing_rotation, standardizing_matrix
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from tests.support.runs import distill_config, weights_of
from tests.support.stores import Frozen, precompute_config
from tests.support.tensors import gaussian
from tests.support.verbs import distill, precompute


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_teacher):
    path = tmp_path_factory.mktemp("standardized") / "store"
    options = PassOptions(batch_size=8, outputs=("logits", "features", "pooled"))
    config = precompute_config(path, tiny_teacher, annotate=options)
    precompute.run(config)
    return Frozen(Store(path), config)


def covariance_of(channels, seed=0):
    values = gaussian(seed, 4 * channels, channels).double() * torch.logspace(-1, 1, channels)
    return values, torch.cov(values.T, correction=0)


@pytest.mark.parametrize("order", [2, 3, 5, 12, 64, 100])
@pytest.mark.parametrize("kind", ["distinct", "repeated", "zero", "one"])
def test_the_rotation_is_orthogonal_and_equalizes_the_diagonal(order, kind):
    variances = torch.linspace(5, 1, order).double()
    if kind == "repeated":
        variances = variances.round()
    elif kind != "distinct":
        variances[1 if kind == "one" else order // 2 :] = 0

    rotation = equalizing_rotation(variances)

    torch.testing.assert_close(rotation @ rotation.T, torch.eye(order).double(), rtol=0, atol=1e-10)
    diagonal = (rotation * variances @ rotation.T).diagonal()
    torch.testing.assert_close(diagonal, variances.mean().expand(order), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_channels_have_variance_1_and_phi_s_keeps_the_ratio_of_distances(kind):
    values, covariance = covariance_of(6)

    moved = values @ standardizing_matrix(covariance, kind).T

    variances = torch.cov(moved.T, correction=0).diagonal()
    torch.testing.assert_close(variances, torch.ones(6).double())
    ratios = torch.pdist(values) ** 2 / torch.pdist(moved) ** 2
    is_phi = torch.allclose(ratios, covariance.diagonal().mean())
    assert is_phi == (kind == "phi_s")


@pytest.mark.parametrize("config", [FeaturesConfig, EmbeddingConfig])
@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_a_student_does_not_depend_on_the_scale_of_its_teacher(store, monkeypatch, config, kind):
    """It is the same to the bit for a power of 2, and for other factors up to rounding."""

    def student_of(factor):
        def scaled(self, targets):
            values = {name: factor * each for name, each in targets.intermediates.items()}
            return replace(targets, intermediates=values)

        def moments(*args):
            mean, covariance = stored_moments(*args)
            return factor * mean, factor**2 * covariance

        monkeypatch.setattr(RestoredFeatures, "forward", scaled)
        monkeypatch.setattr(standardized_features, "stored_moments", moments)
        method, run = config(standardize=kind, distance="mse"), f"times-{factor}"
        distill.run(distill_config(store, method=method, run=run))
        return torch.cat([each.double().flatten() for each in weights_of(run).values()])

    one, power, other = map(student_of, (1, 1024, 1000))

    assert torch.equal(one, power)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_constant_channels_are_divided_by_a_floor_and_named(caplog):
    matrix = standardizing_matrix(torch.diag(torch.tensor([4.0, 0.0]).double()), "channel")

    assert matrix[0, 0] == pytest.approx(0.5)
    assert torch.isfinite(matrix).all()
    assert "1 of 2 channels hardly vary" in caplog.text


@pytest.mark.parametrize("field", ["features_3", "pooled"])
def test_moments_are_those_of_the_stored_values_and_are_computed_once(store, field, monkeypatch):
    teacher = store.store.open_pass(store.store.pass_folders()[0].name)
    shards = [store.store.shards[n] for n in store.store.shards.splits["train"]]
    parts = [teacher.read_shard(shard) for shard in shards]
    values = np.concatenate([part[field].astype(np.float64) for part in parts])
    if f"{field}_scale" in parts[0]:
        scale = np.concatenate([part[f"{field}_scale"] for part in parts])
        steps = 127 if parts[0][field].dtype == np.int8 else 1
        values = values / steps * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    channels = values.shape[-3] if field != "pooled" else values.shape[-1]
    rows = (
        np.moveaxis(values.reshape(-1, channels, *values.shape[-2:]), 1, -1)
        if field != "pooled"
        else values
    )
    rows = rows.reshape(-1, channels)

    mean, covariance = stored_moments(teacher, field, "train")
    monkeypatch.setattr(channel_moments, "_measure", None)
    again = stored_moments(teacher, field, "train")

    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(again[1], covariance)
    with pytest.raises(TypeError):  # another split has statistics of its own
        stored_moments(teacher, field, "test")


def test_a_store_that_cannot_be_written_keeps_nothing(store, monkeypatch):
    teacher = store.store.open_pass(store.store.pass_folders()[0].name)
    expected = stored_moments(teacher, "pooled", "test_swapped")
    refused = SimpleNamespace(
        exists=False, save=lambda *args, **options: Path("/dev/null/x").mkdir()
    )
    monkeypatch.setattr(channel_moments, "Artifact", lambda *args: refused)

    assert torch.equal(stored_moments(teacher, "pooled", "test_swapped")[1], expected[1])


@pytest.mark.parametrize("config", [FeaturesConfig, EmbeddingConfig])
@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_students_learn_in_standardized_units_and_a_live_teacher_is_refused(store, config, kind):
    method = config(standardize=kind, distance="mse")

    distill.run(distill_config(store, method=method))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    with pytest.raises(
        ConfigError, match=f"standardize={kind} is computed from .* mode=live has none"
    ):
        distill.run(
            distill_config(
                store, method=method, mode="live", teacher=store.config.teacher, run="live"
            )
        )
