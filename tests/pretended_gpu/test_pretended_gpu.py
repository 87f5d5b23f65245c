"""Paths of the pipeline on a pretended GPU: what raises there, what waits, and how much is launched and copied."""

import hashlib
import json
import os
import sys

import pytest

from tests.support.paths import PYTHONPATH, ROOT
from tests.support.processes import run_program

extension = pytest.importorskip("tests.pretended_gpu.extension")
REASON = extension.missing_part()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no pretended GPU: {REASON}")
TABLE = ROOT / "tests/pretended_gpu/table.json"


def run(module, *words):
    """Run a module of this folder in a process of its own, which has the device for good, and read its JSON."""
    done = run_program(
        [sys.executable, "-m", f"tests.pretended_gpu.{module}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(
    scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)], ids=str
)
def results(request):
    return run("__main__", *(["--few"] if request.param == "few" else []))


def test_every_path_runs_to_its_end(results):
    assert {name: values for name, values in results["paths"].items() if "error" in values} == {}
    assert len(results["paths"]) > 18


def test_no_step_waits_for_the_device(results):
    waits = {
        name: values["waits"]
        for name, values in results["paths"].items()
        if isinstance(values.get("waits"), dict)
    }
    assert len(waits) > 10
    assert {name: places for name, places in waits.items() if places} == {}


def test_a_pass_waits_once_a_batch_whatever_it_stores(results):
    waits = {
        name: values["waits_a_batch"]
        for name, values in results["paths"].items()
        if name.startswith("pass.")
    }
    assert len(waits) >= 5
    assert {name: count for name, count in waits.items() if not 1 <= count <= 2} == {}
    assert waits["pass.frozen"] == waits["pass.strong_views"] == 1


def test_sums_have_a_fixed_order_unless_an_option_gives_that_up(results):
    unrepeatable = {
        name: values["unrepeatable"]
        for name, values in results["paths"].items()
        if values.get("unrepeatable")
    }
    assert "convolution_backward" in unrepeatable.pop("e2kd.free")
    assert unrepeatable == {}


def test_a_resumed_training_has_the_weights_of_one_that_was_not_interrupted(results):
    assert results["paths"]["resume"] == {"equal": True}


def test_tf32_is_a_precision_that_is_named_and_that_a_cpu_does_not_have(results):
    precision = dict(results["paths"]["precision"])
    refusal = precision.pop("refusal")
    assert precision == {"pass": "tf32", "compared": "tf32", "student": "tf32"}
    assert refusal.startswith("trainer.precision=tf32: cpu has no TF32")


def test_a_pass_names_the_devices_of_its_shards_and_not_that_of_its_driver(results):
    assert results["paths"]["devices"] == {"actors": "Pretended GPU", "driver": "cpu"}


@pytest.mark.slow
def test_float32_is_not_tf32():
    """Torch's default for convolutions has errors of half precision in what subtracts gradients: the control."""
    errors = run("products")
    assert errors["logits.float32"] < 1e-5 < 1e-4 < errors["logits.tf32"]
    assert errors["dependency.float32"] < 1e-4 < 5e-3 < errors["dependency.torch_default"]
    for number in (4, 8, 16):
        assert (
            errors[f"partition{number}.float32"] == 1 > errors[f"partition{number}.torch_default"]
        )


def test_launches_waits_and_bytes_are_those_of_the_table(results):
    table = json.loads(TABLE.read_text())
    if table["torch"] != results["torch"]:
        pytest.skip(f"the table was written with torch {table['torch']}")
    expected = {name: table["paths"][name] for name in results["paths"]}
    assert results["paths"] == expected, "python -m tests.pretended_gpu --write, and CHANGELOG.md"


def test_a_change_of_the_table_is_in_the_changelog():
    digest = hashlib.sha256(TABLE.read_bytes()).hexdigest()[:8]
    assert f"tests/pretended_gpu/table.json {digest}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_faults_are_found():
    shown = run("faults")
    sound = shown.pop("")
    assert sound == ""
    assert len(shown) >= 12
    assert [name for name, what in shown.items() if not what] == []
