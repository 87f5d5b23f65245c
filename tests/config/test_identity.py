"""Identity of a run: every option but those that change no result, and those that `inputs` has a fingerprint of."""

from permafrost.config.builder import build_verb_config
from permafrost.config.compose import compose
from permafrost.config.distillation import DistillConfig
from permafrost.config.runs import identity, to_plain_dict


def test_an_identity_has_every_option_that_changes_results_also_at_its_default():
    config = build_verb_config("distill", compose("distill", ["store.teacher=[first]"]))
    values = to_plain_dict(config)

    found = identity(values | {"inputs": {"store": "fingerprint"}}, DistillConfig)

    assert set(found) == {*values, "inputs"} - {"cluster", "curve"}
    assert found["store"] == {}
    assert found["augment"] == values["augment"]
    assert set(values["student"]) - set(found["student"]) == {"weights", "sha256"}
    assert "epochs" in found["trainer"]
    assert "log_every_steps" not in found["trainer"]
