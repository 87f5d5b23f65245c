"""Trainings whose loss is constant from the first step: one output, and temperatures without a gradient."""

from dataclasses import replace

import pytest
import torch

from permafrost.config.methods import KDConfig
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.losses.logit_distances import LOGIT_LOSSES, describe_flat_temperature
from tests.support.runs import distill_config
from tests.support.stores import precompute_config
from tests.support.verbs import distill, precompute


@pytest.mark.parametrize("mode", ["frozen", "live"])
def test_a_student_of_one_output_is_refused(tmp_path, frozen, mode):
    teacher = replace(frozen.config.teacher, weights="random", classes=1)
    config = precompute_config(tmp_path / "store", teacher)
    precompute.run(config)
    live = {"teacher": teacher, "mode": "live"} if mode == "live" else {}
    store = StoreOptions(path=str(tmp_path / "store"))
    student = distill_config(frozen, store=store, method=KDConfig(), **live)

    with pytest.raises(ConfigError, match=r"one output, whose softmax is always 1, .* \[0, z\]"):
        distill.run(student)


@pytest.mark.parametrize(
    ("tau", "is_flat"), [(1e-6, True), (0.05, False), (4.0, False), (1e9, False)]
)
def test_a_temperature_without_a_gradient_is_a_warning(frozen, caplog, tau, is_flat):
    distill.run(distill_config(frozen, method=KDConfig(tau=tau), run=f"tau-{tau:g}"))

    assert ("method.tau=1e-06: the term kd is nearly constant" in caplog.text) == is_flat
    assert ("nearly constant" in caplog.text) == is_flat


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_the_share_of_the_gradient_decides(loss):
    logits = 3 * torch.randn(8, 20, generator=torch.Generator().manual_seed(0))

    flat = {tau: describe_flat_temperature(loss, logits, tau) for tau in (1e-5, 1.0, 20.0, 1e7)}

    assert [bool(sentence) for sentence in flat.values()] == [
        loss != "mld",
        False,
        False,
        loss == "mld",
    ]
