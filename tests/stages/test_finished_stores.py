"""Passes on a finished store: without its data, with a name, and by teachers of other classes."""

import shutil
from dataclasses import replace

import pytest

from permafrost.config.data import NoDataConfig
from permafrost.core.errors import ConfigError
from permafrost.store.reader import Store
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def test_a_finished_store_takes_a_named_pass_without_its_data(tmp_path, tiny_teacher):
    store = tmp_path / "store"
    precompute.run(precompute_config(store))
    weights = shutil.copy(tiny_teacher.weights, tmp_path / "w.safetensors")
    config = precompute_config(
        store, replace(tiny_teacher, weights=str(weights)), data=NoDataConfig()
    )
    named = replace(config, annotate=replace(config.annotate, name="guided"))

    assert precompute.run(named).teacher_records == 72
    again = precompute.run(config)  # without the name, which is no part of the identity

    assert again.teacher_records == 0
    assert Store(str(store)).open_pass("guided").manifest.made_with["weights"] == "w.safetensors"


def test_without_data_a_store_must_be_finished(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher, data=NoDataConfig())

    with pytest.raises(ConfigError, match=r"holds no finished store; name the data .*data="):
        precompute.run(config)
    assert not (tmp_path / "store").exists()
