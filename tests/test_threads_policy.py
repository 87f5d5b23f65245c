"""An import of permafrost changes nothing in the user's process, whichever of it and PyTorch comes first."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.slow import slow

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
