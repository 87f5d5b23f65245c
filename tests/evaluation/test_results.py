"""Results of an evaluation: an evaluator that is done is not run again, and other options are refused."""

from dataclasses import replace

import pytest

from permafrost.config.builder import to_plain_dict
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.results import (
    add_result,
    evaluator_options,
    keep_options,
    missing_evaluators,
)
from permafrost.runs.folder import CONFIG_NAME, save_config
from permafrost_papers.interpretability.options import GradientAlignmentOptions

NAME = "gradient_alignment"


def config_of(**options):
    return EvaluateConfig(
        store=StoreOptions(path="store"),
        evaluate=EvaluateOptions(added={"gradient_alignment": GradientAlignmentOptions(**options)}),
        evaluators=("accuracy", NAME),
    )


def test_results_of_other_options_are_refused(tmp_path):
    options = evaluator_options(NAME, config_of(records=16))
    add_result(
        tmp_path, NAME, {"test": {"score": 1.0}}, options=options, files={}, records={"test": 5}
    )

    with pytest.raises(ConfigError, match=r"records=16, but this one has .*delete .* again"):
        missing_evaluators(tmp_path, config_of())


def test_an_option_that_a_later_command_does_not_name_keeps_its_value(tmp_path, caplog):
    first = config_of(records=16)
    first = replace(first, evaluate=replace(first.evaluate, region="masks", batch_size=32))
    save_config(tmp_path / CONFIG_NAME, to_plain_dict(first.shared) | {"inputs": {}})
    options = evaluator_options(NAME, first)
    add_result(tmp_path, NAME, {"test": {}}, options=options, files={}, records={"test": 5})
    caplog.set_level("INFO")

    later = replace(config_of(), command=("evaluate", "evaluate.batch_size=256"))
    kept = keep_options(later, tmp_path)

    assert kept.evaluate.region == "masks"
    assert kept.evaluate.of(GradientAlignmentOptions).records == 16
    assert kept.evaluate.batch_size == 256  # which the command names
    assert missing_evaluators(tmp_path, kept) == ("accuracy",)
    assert "evaluate.region=masks" in caplog.text
    assert keep_options(later, tmp_path / "elsewhere") is later
