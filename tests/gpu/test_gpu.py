"""The run of `make gpu`: the same code on the CPU with tiny networks, its budget, and what its checks detect."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import checks
from tests.gpu.budget import Budget, SkippedError
from tests.gpu.outcomes import Row
from tests.gpu.ranks import build_tiny, gradient_of_ranks
from tests.gpu.rows import ROWS, measure_rows
from tests.gpu.scale import TINY
from tests.gpu.table import markdown
from tests.gpu.workplace import Workplace
from tests.support.batches import random_batch
from tests.support.paths import PYTHONPATH, ROOT

CPU = torch.device("cpu")


def run_command(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_tiny_run_on_the_cpu_measures_every_row_and_writes_both_files(tmp_path):
    done = run_command(tmp_path, "--device", "cpu", "--tiny")

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs/gpu/gpu.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(ROWS)
    for row in found["rows"]:
        assert row["status"] == "measured", row
        assert row["ratio"] == row["images_per_second"] / row["baseline_images_per_second"] > 0
        parts = row["milliseconds"]
        assert 0 < parts["compute"] < parts["wall"]
        assert parts["wall"] == pytest.approx(1e3 / row["images_per_second"], rel=1e-6)
        assert parts["host"] > 0
        assert row["utilization"] is None
    statuses = {check["name"]: check["status"] for check in found["checks"]}
    assert {name for name, status in statuses.items() if status == "pass"} == {
        check.__name__ for check in checks.QUICK_CHECKS
    }
    skipped = {check["name"]: check["reason"] for check in found["checks"] if check["reason"]}
    assert "two GPUs" in skipped["nccl_ranks"]
    table = (tmp_path / "runs/gpu/table.md").read_text()
    assert table == done.stdout
    assert table.count("not measured") == len(ROWS)


@pytest.mark.slow
def test_without_a_cuda_device_one_line_says_what_is_needed(tmp_path):
    done = run_command(tmp_path)

    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"gpu: torch \S+ \(built .*\) of .* finds no CUDA device; .*NVIDIA.*--device cpu --tiny",
        line,
    )
    assert not (tmp_path / "runs").exists()


def test_missing_packages_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        command, "PACKAGES", {"torch": "torch", "no_such_module": "no-such-package"}
    )

    assert command.main([]) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks no-such-package; install" in line
    assert "make gpu PY=" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cpu"], "add --tiny"), (["--minutes", "0.1"], "--minutes must be > 0.5")],
)
def test_options_that_cannot_work_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_no_longer_fits_is_skipped_with_its_reason(tmp_path):
    rows, outcomes = [], []

    measure_rows(Workplace(CPU, TINY, tmp_path), Budget(0.5), rows)
    checks.run_checks(checks.QUICK_CHECKS, CPU, TINY, Budget(0.5), outcomes)

    assert [row.name for row in rows] == list(ROWS)
    for outcome in (*rows, *outcomes):
        assert outcome.status == "skip"
        assert re.search(r"takes about \d s, and \d s are left; raise --minutes", outcome.reason)
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_run_is_cut_off():
    called = threading.Event()

    Budget(0.05).cut_off(called.set)

    assert called.wait(30)


@pytest.mark.slow
def test_a_run_that_hangs_writes_what_it_has_and_exits_with_an_error(tmp_path):
    script = (
        "import time, torch\n"
        "from tests.gpu import __main__ as command, rows\n"
        "rows.ROWS = {'hanging': (lambda place: time.sleep(600), 0)}\n"
        "command.STARTED = time.monotonic()\n"
        "command.run(torch.device('cpu'), is_tiny=True, minutes=0.2)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 1
    found = json.loads((tmp_path / "runs/gpu/gpu.json").read_text())
    assert [row["reason"] for row in found["rows"]] == [
        "cut off after 0.2 minutes, which --minutes raises"
    ]
    assert [check["status"] for check in found["checks"]] == ["pass"] * len(checks.QUICK_CHECKS)
    assert not list(tmp_path.glob("gpu-*"))


def test_an_error_fails_its_check_and_not_the_others():
    def broken(device, scale):
        raise RuntimeError("no kernel image")

    def missing(device, scale):
        raise SkippedError("needs two GPUs")

    def fine(device, scale):
        return "as it should be"

    outcomes = []
    checks.run_checks(dict.fromkeys((broken, missing, fine), 1), CPU, TINY, Budget(60), outcomes)

    assert [(o.name, o.status, o.reason) for o in outcomes] == [
        ("broken", "fail", "RuntimeError: no kernel image"),
        ("missing", "skip", "needs two GPUs"),
        ("fine", "pass", "as it should be"),
    ]


def test_a_wrong_gradient_is_detected():
    other = build_tiny(CPU)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.05)

    with pytest.raises(AssertionError, match=r"gradient is .* away, more than 0\.001"):
        checks._compare(other, build_tiny(CPU), 1e-3)


def test_a_step_that_reads_a_value_is_detected(monkeypatch):
    original = checks.train_step
    monkeypatch.setattr(
        checks, "train_step", lambda *a, **options: original(*a, **options).total.item()
    )

    with pytest.raises(AssertionError, match="the host reads _local_scalar_dense"):
        checks._steps_without_waiting(CPU, [random_batch(seed) for seed in range(3)])


def test_every_test_of_the_suite_that_needs_a_gpu_is_listed():
    mark = r"@pytest\.mark\.skipif\(not torch\.cuda\.is_available\(\)[^\n]*\n(?:@[^\n]*\n)*def (test_\w+)"
    found = [
        f"{path.relative_to(ROOT)}::{name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in re.findall(mark, path.read_text())
    ]

    assert found == list(checks.PYTEST_CHECKS)


@pytest.mark.slow
def test_the_tests_of_the_suite_run_without_its_plugins():
    assert "skipped" in checks.run_pytest()  # there is no GPU here


@pytest.mark.slow
def test_two_ranks_on_the_cpu_have_the_gradient_of_one_process(tmp_path):
    found = gradient_of_ranks(tmp_path, "gloo", "cpu", 120)

    assert "within" in checks.compare_ranks(found, CPU)
    with pytest.raises(AssertionError, match="away from one process"):
        checks.compare_ranks(found * 1.01, CPU)


@pytest.mark.slow
@pytest.mark.ray
def test_two_actors_on_the_cpu_have_the_logits_of_one_process():
    assert "two actors" in checks.compare_ray(gpus_per_actor=0.0)


def test_a_row_of_the_table_states_ratio_parts_and_utilization():
    measured = Row(
        name="steps",
        status="measured",
        images_per_second=1500.0,
        baseline="labels",
        baseline_images_per_second=3000.0,
        milliseconds={"wall": 0.5, "compute": 0.25},
        utilization=87.4,
    )
    skipped = Row(name="rest", status="skip", reason="no time | left")

    lines = markdown({"device": "H200", "cuda": None}, [], [measured, skipped]).splitlines()

    assert lines[0] == "device H200"
    assert lines[-2] == "| steps | 1,500 | labels | 3,000 | 0.5 | 0.5 |  |  | 0.25 | 87 % |  |"
    assert lines[-1].endswith("| skip: no time / left |")
    assert {line.count("|") for line in lines[-4:]} == {12}
