"""The process of a user: an import changes nothing in it, and it is after a verb as it was before."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import permafrost
from tests.support.paths import ROOT
from tests.support.process_state import unchanged_process
from tests.support.slow import slow
from tests.support.words import TINY_DATA

pytestmark = pytest.mark.usefixtures("two_threads")
DATA = [*TINY_DATA, "data.image_size=32"]
STUDENT = ["student=cifar", "student.name=resnet8", "student.width=4"]
LICENSES = "licenses={images: CC0-1.0, weights: MIT, targets: CC0-1.0}"
TRAINING = ["trainer.epochs=1", "trainer.batch_size=8", "augment=pad_crop_flip"]


def test_verbs_leave_the_process_as_they_found_it(frozen):
    """The others are called, with the same check, in tests/stages/test_kinds_of_path.py."""
    store = f"store.path={frozen.store.path}"
    name = frozen.store.pass_folders()[0].name
    with unchanged_process():
        permafrost.share(store, f"pass={name}", "to=shared", LICENSES)
    permafrost.precompute("store.path=new", *DATA, "teacher=none", "executor=serial")
    # A shared pass of another store is refused, which must leave the process alone, too.
    with unchanged_process(), pytest.raises(permafrost.UserError):
        permafrost.attach("store.path=new", "path=shared")
    with unchanged_process():
        permafrost.distill(
            store,
            "run=e",
            *STUDENT,
            *TRAINING,
            "trainer.num_threads=1",
            "trainer.loader_processes=1",
        )


def test_a_verb_that_fails_leaves_the_process_as_it_found_it(frozen):
    store = f"store.path={frozen.store.path}"
    for words in (
        ["optimizer.lr=1e30", "optimizer.clip_norm=null"],
        ["student.name=resnet9000"],
        ["method=nothing"],
    ):
        with unchanged_process(), pytest.raises(permafrost.UserError):
            permafrost.distill(store, "run=f", *STUDENT, *TRAINING, *words)


def test_other_default_dtypes_and_flags_of_the_process_do_not_change_a_verb(frozen):
    store = f"store.path={frozen.store.path}"
    words = [store, *STUDENT, *TRAINING]
    expected = permafrost.distill(*words, "run=plain").model.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        actual = permafrost.distill(*words, "run=double").model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with torch.no_grad():
        actual = permafrost.distill(*words, "run=no_grad").model.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_threads_that_were_running_end(frozen):
    permafrost.distill(f"store.path={frozen.store.path}", "run=a", *STUDENT, *TRAINING)
    before = threading.active_count()

    permafrost.distill(f"store.path={frozen.store.path}", "run=b", *STUDENT, *TRAINING)

    assert threading.active_count() <= before


_TRIED = """
import logging, os, sys
def state():  # PyTorch sets variables of its own
    variables = {{name: os.environ[name] for name in os.environ if "TORCH" not in name}}
    return [variables, list(sys.path), len(logging.root.handlers)]
before = state()
{imports}
print(state() == before)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import permafrost; permafrost.preview",
        slow("import torch; import permafrost; permafrost.RecordLoader"),
        slow("import permafrost; import torch; permafrost.RecordLoader"),
    ],
)
def test_an_import_is_silent_and_sets_nothing(imports):
    inherited = {name: value for name, value in os.environ.items() if "OMP_" not in name}

    done = subprocess.run(
        [sys.executable, "-c", _TRIED.format(imports=imports)],
        env=inherited,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )

    assert (done.stdout, done.stderr) == ("True\n", "")


def test_an_import_takes_less_than_a_tenth_of_a_second():
    program = (
        "import time; t = time.perf_counter(); import permafrost; print(time.perf_counter() - t)"
    )

    seconds = [
        float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)) for _ in range(3)
    ]

    assert min(seconds) < 0.1
