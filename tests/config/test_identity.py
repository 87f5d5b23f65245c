"""Identity of a run: every option but those that change no result, and those that `inputs` has a fingerprint of."""

from permafrost.config.builder import to_plain_dict
from permafrost.config.distillation import DistillConfig
from permafrost.runs.folder import identity, save_options
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import read_yaml
from tests.support.composition import config_of


def test_an_identity_has_every_option_that_changes_results_also_at_its_default():
    config = config_of("distill", "store.teacher=[first]")
    values = to_plain_dict(config)

    found = identity(values | {"inputs": {"store": "fingerprint"}}, DistillConfig)

    assert set(found) == {*values, "inputs"} - {"cluster", "curve", "logger", "command"}
    assert found["store"] == {}
    (operation,) = values["augment"]["operations"][:1]
    assert set(operation) - set(found["augment"]["operations"][0]) == {"padding_mode"}
    assert values["augment"].keys() - found["augment"].keys() == {"mix"}  # after files without it
    assert set(values["student"]) - set(found["student"]) == {"weights", "weights_key", "sha256"}
    assert "epochs" in found["trainer"]
    assert "log_every_steps" not in found["trainer"]


def test_a_repeated_call_keeps_its_first_words_and_each_call_of_precompute_its_own_file():
    for verb in ("precompute", "sweep"):
        path = RUNS / "one" / f"{verb}.yaml"
        save_options(path, {"run": "one", "seed": 0}, [verb, "run=one"])
        save_options(path, {"run": "one", "seed": 0}, [verb, "seed=0", "run=one"])
        assert read_yaml(path, "")["command"] == [verb, "run=one"]

        save_options(path, {"run": "one", "seed": 1}, [verb, "seed=1"])

    assert sorted(path.name for path in (RUNS / "one").iterdir()) == [
        "precompute-2.yaml", "precompute.yaml", "sweep.yaml",
    ]  # fmt: skip
    assert read_yaml(RUNS / "one/precompute.yaml", "")["command"] == ["precompute", "run=one"]
    assert read_yaml(RUNS / "one/sweep.yaml", "")["command"] == ["sweep", "seed=1"]
