"""The process after a verb is called from Python: threads, generators, dtypes and the like are as they were before."""

import os
import random
import signal
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import permafrost

DATA = [
    *("data=demo", "data.image_size=32", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.train_digits=24", "data.test_digits=12", "data.teacher_digits=24"),
    *("data.teacher_placements=1", "data.test_placements=1", "data.train_placements=1"),
]
STUDENT = ["student=cifar", "student.name=resnet8", "student.width=4"]
OF_LIBRARIES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that pytest and torch set as they are imported."""
LICENSES = "licenses={images: CC0-1.0, weights: MIT, targets: CC0-1.0}"
TRAINING = ["trainer.epochs=1", "trainer.batch_size=8", "augment=pad_crop_flip"]


def state_of_process():
    mask = os.umask(0)
    os.umask(mask)
    numpy_state = np.random.get_state()
    return {
        "threads of torch": torch.get_num_threads(),
        "generator of torch": torch.get_rng_state().tolist(),
        "generator of NumPy": (numpy_state[1].tolist(), numpy_state[2:]),
        "generator of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomalies": torch.is_anomaly_enabled(),
        "folder": Path.cwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in OF_LIBRARIES},
        "signals": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        "umask": mask,
        "warnings": [
            each for each in warnings.filters if each[2].__module__ == "builtins" and not each[3]
        ],
        "path": list(sys.path),
        "standard streams": (sys.stdin, sys.stdout, sys.stderr),
        "recursion": sys.getrecursionlimit(),
        "floating point": np.geterr(),
    }


def verbs(frozen):
    """Return the calls of all verbs, by name, in an order in which each has its inputs."""
    store = f"store.path={frozen.store.path}"
    name = frozen.store.pass_folders()[0].name
    teacher = ["teacher=cifar", "teacher.name=resnet8", "teacher.width=4"]
    return {
        "preview": lambda: permafrost.preview(*DATA),
        "precompute": lambda: permafrost.precompute(
            "store.path=new", *DATA, *teacher, "teacher.weights=random", "executor=serial"
        ),
        "share": lambda: permafrost.share(store, f"pass={name}", "to=shared", LICENSES),
        "attach": lambda: call_or_refusal(lambda: permafrost.attach("store.path=new", "path=shared")),
        "teach": lambda: permafrost.teach(
            "store.path=new", "run=t", *teacher, "teaching.trainer.epochs=1",
            "teaching.trainer.batch_size=8", "teaching.augment=none",
        ),
        "distill": lambda: permafrost.distill(store, "run=d", *STUDENT, *TRAINING),
        "distill, two threads": lambda: permafrost.distill(
            store, "run=e", *STUDENT, *TRAINING, "trainer.num_threads=1", "trainer.loader_processes=1"
        ),
        "evaluate": lambda: permafrost.evaluate(store, "run=d"),
        "export": lambda: permafrost.export(store, "run=d", "export.formats=[torch]"),
        "sweep": lambda: permafrost.sweep(
            store, "run=s", *STUDENT, *TRAINING, "seeds=[0]", "arms={a: [method=kd]}"
        ),
        "report": lambda: permafrost.report(store, "run=d"),
    }  # fmt: skip


def test_every_verb_leaves_the_process_as_it_found_it(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(123)
    torch.set_num_threads(2)
    random.seed(5)
    np.random.seed(5)
    calls = verbs(frozen)
    assert {name.partition(",")[0] for name in calls} >= set(permafrost.__all__) & {
        *("preview", "precompute", "share", "attach", "teach", "distill"),
        *("evaluate", "export", "sweep", "report"),
    }
    changed = {}
    for name, call in calls.items():
        before = state_of_process()
        call()
        after = state_of_process()
        changed[name] = [what for what in before if before[what] != after[what]]
    assert changed == {name: [] for name in calls}


def call_or_refusal(call):
    """Call a verb. A shared pass of another store is refused, which must leave the process alone, too."""
    with suppress(permafrost.UserError):
        call()


def test_a_verb_that_fails_leaves_the_process_as_it_found_it(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = f"store.path={frozen.store.path}"
    torch.set_num_threads(2)
    before = state_of_process()

    for words in (
        ["optimizer.lr=1e30", "optimizer.clip_norm=null"],
        ["student.name=resnet9000"],
        ["method=nothing"],
    ):
        with pytest.raises(permafrost.UserError):
            permafrost.distill(store, "run=f", *STUDENT, *TRAINING, *words)

    after = state_of_process()
    assert [what for what in before if before[what] != after[what]] == []


def test_other_default_dtypes_and_flags_of_the_process_do_not_change_a_verb(
    frozen, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store = f"store.path={frozen.store.path}"
    words = [store, *STUDENT, *TRAINING]
    expected = permafrost.distill(*words, "run=plain").model.state_dict()
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        actual = permafrost.distill(*words, "run=double").model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with torch.no_grad():
        actual = permafrost.distill(*words, "run=no_grad").model.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_threads_that_were_running_end(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    permafrost.distill(f"store.path={frozen.store.path}", "run=a", *STUDENT, *TRAINING)
    before = threading.active_count()

    permafrost.distill(f"store.path={frozen.store.path}", "run=b", *STUDENT, *TRAINING)

    assert threading.active_count() <= before
