"""Files of runs: one writer, a damaged file is named, and other programs read the sound ones."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from permafrost.cli import stage_main
from permafrost.config.teaching import TeachConfig
from permafrost.core.errors import ConfigError
from permafrost.models.weights import read_state_dict
from permafrost.runs.folder import read_config, read_cost
from permafrost.runs.mirrors import RUNS
from permafrost.storage.lock import LockedError, folder_lock
from permafrost.storage.signed_files import (
    DamagedFileError,
    DigestError,
    read_json,
    read_yaml,
    write_json,
    write_yaml,
)
from permafrost.training import checkpoint, loop
from permafrost.training.metric_log import METRIC_LOG_NAME, MetricWriter, read_metrics
from permafrost_report.student_results import read_sweep
from tests.support import run_corruptions, run_files
from tests.support.composition import config_of
from tests.support.kills import killed_at
from tests.support.paths import PYTHONPATH
from tests.support.run_corruptions import CASES, Runs, attempt, damage_file, trials
from tests.support.runs import distill_config, evaluate_config, save_student
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, evaluate, teach


@pytest.fixture(scope="module")
def prepared(frozen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = Runs(frozen, folder)
        runs.prepare()
    return runs


# ---- damage --------------------------------------------------------------------------------------


def unnamed(found):
    return [trial for trial in found if trial.outcome != "named"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_damaged_file_of_a_run_is_trained_on_evaluated_or_reported(
    prepared, tmp_path, count_trials
):
    cases = 4 * CASES

    done = list(trials(prepared, cases, np.random.default_rng(126), tmp_path))

    for verb in dict.fromkeys(case.verb for case in CASES):
        outcomes = Counter(trial.outcome for trial in done if trial.case.verb == verb)
        count_trials(f"a file of a run: {verb}", outcomes)
    assert unnamed(done) == []


@pytest.mark.slow
def test_every_case_goes_on_without_damage(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(run_corruptions, "damage_file", lambda path, random, kind: "none")

    found = list(trials(prepared, CASES, np.random.default_rng(0), tmp_path))

    assert [trial for trial in found if trial.outcome != "silent"] == []


@pytest.fixture(scope="module")
def interrupted(frozen, tmp_path_factory):
    """Folder with a finished and an interrupted student, and the verbs that read them."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = Runs(frozen, folder)
        distill.run(runs.distill["one"])
        evaluate.run(evaluate_config(frozen, splits=("test",)))
        with killed_at(loop, "train_step", 7):
            distill.run(runs.distill["half"])
    return runs


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.run in ("half", "one") and case.verb != "report"],
    ids=str,
)
def test_a_damaged_file_is_named_by_the_verb_that_reads_it(interrupted, case, tmp_path):
    random = np.random.default_rng(sum(map(ord, "".join(case))))

    assert unnamed(trials(interrupted, [case], random, tmp_path)) == []


def test_the_damaged_description_of_a_teacher_is_named(tmp_path):
    (tmp_path / "model.json").write_bytes(b"{}")

    with pytest.raises(ConfigError, match=r"is not one \(.*model\.json: it does not list its own"):
        config_of("precompute", "teacher=folds", f"teacher.weights={tmp_path}")


@pytest.mark.parametrize("kind", sorted(set(run_corruptions.DAMAGES)))
def test_damage_anywhere_in_a_signed_text_is_seen(kind, tmp_path):
    random = np.random.default_rng(5)
    write_json(tmp_path / "j.json", {"a": [1, 2.5, "text"], "b": {"c": None}})
    write_yaml(tmp_path / "y.yaml", "a: [1, 2]\nb: {c: text}\n")
    for name, read in (("j.json", read_json), ("y.yaml", read_yaml)):
        sound = (tmp_path / name).read_bytes()
        for _ in range(30):
            damage_file(tmp_path / name, random, kind)
            if (tmp_path / name).read_bytes() == sound:
                continue
            with pytest.raises(DamagedFileError, match=rf"{name} is damaged: .*; write it again"):
                read(tmp_path / name, "write it again")
            (tmp_path / name).write_bytes(sound)


def test_what_is_signed_is_checked_for_its_form(tmp_path):
    path = tmp_path / "cost.json"
    for values in ({"seconds": -1, "records": 2}, {"seconds": "1", "records": 2}, {"seconds": 1.0}):
        write_json(path, values)
        with pytest.raises(DamagedFileError, match=r"cost\.json is damaged: (seconds|records) is"):
            read_cost(tmp_path)
    for text in ("- a\n", "a: &x [1]\nb: *x\n"):
        write_yaml(tmp_path / "config.yaml", text)
        with pytest.raises(DamagedFileError, match=r"config\.yaml is damaged"):
            read_config(tmp_path / "config.yaml", TeachConfig)
    write_yaml(tmp_path / "config.yaml", "seed: text\n")
    with pytest.raises(DamagedFileError, match="seed must be a whole number"):
        read_config(tmp_path / "config.yaml", TeachConfig)
    (RUNS / "s").mkdir(parents=True)
    run_files.write_table(
        RUNS / "s", [{"variant": "a", "point": {}, "seed": 0, "run": "../../etc"}]
    )
    with pytest.raises(DamagedFileError, match="leaves the folder"):
        read_sweep("s")


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "junk", "append", "zeros"])
def test_damage_anywhere_in_a_checkpoint_is_seen_before_torch_reads_it(interrupted, kind, tmp_path):
    sound = (interrupted.folder / RUNS / "half/distill/checkpoint.pt").read_bytes()
    random = np.random.default_rng(7)
    path = tmp_path / "checkpoint.pt"
    for _ in range(30):
        path.write_bytes(sound)
        damage_file(path, random, kind)
        with pytest.raises(DigestError):
            checkpoint._check_digest(path)
    path.write_bytes(sound)
    checkpoint._check_digest(path)


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "junk", "append", "zeros"])
def test_damage_anywhere_in_the_metrics_is_seen(kind, tmp_path):
    random = np.random.default_rng(9)
    lines = [{"step": step, "total": 1 / step, "epoch": 0} for step in range(1, 9)]
    run_files.write_lines(tmp_path, lines)
    sound = (tmp_path / METRIC_LOG_NAME).read_bytes()

    def open_again():
        with MetricWriter(run_files.tracked_run(tmp_path), 8):
            pass

    assert list(read_metrics(tmp_path, 8)) == lines
    for _ in range(50):
        (tmp_path / METRIC_LOG_NAME).write_bytes(sound)
        damage_file(tmp_path / METRIC_LOG_NAME, random, kind)
        outcome, message = attempt(lambda: list(read_metrics(tmp_path, 8)), METRIC_LOG_NAME)
        assert outcome == "named", message
        outcome, message = attempt(open_again, METRIC_LOG_NAME)
        if outcome == "silent":  # what follows the last line is dropped when a training goes on
            assert (tmp_path / METRIC_LOG_NAME).read_bytes().startswith(sound), kind
        else:
            assert outcome == "named", message


def test_lines_are_not_taken_from_another_place(tmp_path):
    run_files.write_lines(tmp_path, [{"step": n, "total": 1.0} for n in (1, 2, 3, 4)])
    first, second, *rest = (tmp_path / METRIC_LOG_NAME).read_text().splitlines(keepends=True)

    for changed in ([second, first, *rest], [first, *rest], [first, second, second, *rest]):
        (tmp_path / METRIC_LOG_NAME).write_text("".join(changed))
        with pytest.raises(DamagedFileError, match=r"metrics\.jsonl is damaged: line"):
            list(read_metrics(tmp_path))


def test_a_tail_that_the_checkpoint_does_not_cover_is_dropped(tmp_path):
    run_files.write_lines(tmp_path, [{"step": n, "total": 1.0} for n in (2, 4, 6)])
    with (tmp_path / METRIC_LOG_NAME).open("ab") as file:
        file.write(bytes(500) + b"\n")  # as after a power failure

    with MetricWriter(run_files.tracked_run(tmp_path), 4) as writer:
        writer.write({"step": 6, "total": 2.0})

    assert [line["total"] for line in read_metrics(tmp_path, 6)] == [1.0, 1.0, 2.0]


def test_the_files_of_another_run_are_not_taken_for_its_own(frozen):
    other = replace(distill_config(frozen, run="other"), seed=1)
    for config in (distill_config(frozen, run="one"), other):
        distill.run(config)
    one, two = (RUNS / run / "distill" for run in ("one", "other"))
    steps = len(list(read_metrics(one)))
    assert steps == len(list(read_metrics(two)))  # nothing else tells them apart

    shutil.copy(two / METRIC_LOG_NAME, one)
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl is damaged: line 1 .* another run"):
        list(read_metrics(one))
    for name in ("model.json", "model.safetensors"):
        shutil.copy(two / name, one)
    with pytest.raises(
        DamagedFileError, match=r"model\.json is damaged: it is that of another run"
    ):
        evaluate.run(evaluate_config(frozen, splits=("test",)))


# ---- sound files ---------------------------------------------------------------------------------


def test_other_programs_read_every_file(interrupted):
    one = interrupted.folder / RUNS / "one"
    half = interrupted.folder / RUNS / "half/distill"

    state = torch.load(half / "checkpoint.pt", weights_only=True)
    assert state["position"][0] == 1
    assert torch.load(half / "checkpoint.pt", weights_only=True, mmap=True)["position"]
    with zipfile.ZipFile(half / "checkpoint.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    assert load_file(one / "distill/model.safetensors").keys() == state["model"].keys()
    assert json.loads((one / "distill/model.json").read_text())["num_classes"] == 10
    assert yaml.safe_load((one / "distill/config.yaml").read_text())["seed"] == 0
    assert json.loads((one / "evaluate/metrics.json").read_text())["splits"]["test"]["records"]
    for line in (one / "distill/metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"]


def test_a_deleted_checkpoint_is_the_way_out_and_gives_the_same_student(interrupted, tmp_path):
    shutil.copytree(interrupted.folder / RUNS / "half", RUNS / "half")
    path = RUNS / "half/distill/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DamagedFileError, match=r"delete it, and the training starts again at epoch 0"
    ):
        interrupted.verb("distill", "half")

    path.unlink()

    assert interrupted.verb("distill", "half").trained_epochs == 3


def test_a_damaged_network_is_trained_again_to_the_same_one(interrupted):
    shutil.copytree(interrupted.folder / RUNS / "one", RUNS / "one")
    weights, described = (RUNS / "one/distill" / n for n in ("model.safetensors", "model.json"))
    sound = weights.read_bytes(), described.read_bytes()
    weights.write_bytes(sound[0][:-1])
    with pytest.raises(
        DamagedFileError, match=r"delete .*model\.json and run the command that trained"
    ):
        interrupted.verb("distill", "one")

    described.unlink()
    assert interrupted.verb("distill", "one").trained_epochs > 0

    assert (weights.read_bytes(), described.read_bytes()) == sound


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", bytes(1000), b"junk" * 99])
def test_weights_of_another_program_that_cannot_be_read_are_one_line(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)

    outcome, message = attempt(lambda: read_state_dict(tmp_path / name), name)

    assert outcome == "named", message


HOLD = """
    import os, sys, time
    from pathlib import Path
    from permafrost.storage.lock import folder_lock

    with folder_lock(Path(sys.argv[1])):
        runs, tell = os.pipe()
        child = os.fork()  # as a loader's worker, which may live longer than its parent
        if child:
            os.read(runs, 1)  # so that it has let go of the lock, as any child does first
            print(child, flush=True)
        else:
            os.write(tell, b"1")
        time.sleep(600)
"""


@pytest.fixture
def holder():
    """Function that starts a process which holds the lock of a folder, and has a child."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOLD), folder],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )
        started.append((process, int(process.stdout.readline())))
        return process

    yield hold
    for process, child in started:
        process.kill()
        os.kill(child, 9)
        process.wait()
        process.stdout.close()


def test_a_second_training_of_a_run_is_refused_until_the_first_is_gone(frozen, holder):
    folder = RUNS / "one" / "distill"
    process = holder(folder)
    before = tree_bytes(folder)

    with pytest.raises(
        LockedError, match=r"another process is writing to runs/one/distill; wait .* run$"
    ):
        distill.run(distill_config(frozen))
    assert tree_bytes(folder) == before

    process.kill()
    process.wait()  # its child lives on
    assert distill.run(distill_config(frozen)).trained_epochs == 3


def test_a_teacher_and_an_evaluation_are_locked_too(frozen, tmp_path):
    save_student(frozen, "one")
    with folder_lock(RUNS / "one" / "evaluate"), pytest.raises(LockedError, match="one/evaluate"):
        evaluate.run(evaluate_config(frozen))
    with folder_lock(RUNS / "taught" / "teach"), pytest.raises(LockedError, match="taught/teach"):
        teach.run(Runs(frozen, tmp_path).teach["taught"])


def test_a_sweep_that_is_refused_leaves_the_config_of_the_running_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["permafrost sweep", "experiment=demo", "seeds=[7]"])
    (RUNS / "demo").mkdir(parents=True)
    with folder_lock(RUNS / "demo"), pytest.raises(SystemExit) as end:
        stage_main("sweep")

    assert end.value.code == 1
    assert "another process is writing to runs/demo; wait" in capsys.readouterr().err
    assert not (RUNS / "demo" / "sweep.yaml").exists()
