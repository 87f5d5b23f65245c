"""Passes on a finished store: without its data, with a name, and by teachers of other classes."""

import json
import shutil
from dataclasses import replace

import pytest

from pipeline.config.file_data import NoDataConfig
from pipeline.core.errors import ConfigError
from pipeline.store.reader import Store
from stages import precompute
from tests.support.stores import precompute_config


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


def test_a_teacher_of_other_classes_is_used_with_a_warning(tmp_path, tiny_teacher, caplog):
    (tmp_path / "model.json").write_text(json.dumps({"classes": [f"kind {k}" for k in range(10)]}))
    weights = shutil.copy(tiny_teacher.weights, tmp_path / "w.safetensors")

    with caplog.at_level("WARNING"):
        precompute.run(
            precompute_config(tmp_path / "store", replace(tiny_teacher, weights=str(weights)))
        )

    assert "the teacher was trained on the classes 'kind 0'" in caplog.text


def test_without_data_a_store_must_be_finished(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher, data=NoDataConfig())

    with pytest.raises(ConfigError, match=r"holds no finished store; name the data .*data="):
        precompute.run(config)
    assert not (tmp_path / "store").exists()
