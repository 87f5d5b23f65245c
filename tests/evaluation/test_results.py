"""Results of an evaluation: an evaluator that is done is not run again, and other options are refused."""

import pytest

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.results import add_result, evaluator_options, missing_evaluators
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
