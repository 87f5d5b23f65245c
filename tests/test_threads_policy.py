"""`import permafrost` lets PyTorch's threads sleep while they wait, or says once that it is too late."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.slow import slow


@pytest.mark.parametrize(
    ("program", "policy", "is_said"),
    [
        ("import permafrost", "PASSIVE", False),
        ("import torch, permafrost", None, True),
        slow(
            "import os; os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'; import torch, permafrost",
            "ACTIVE",
            False,
        ),
    ],
)
def test_the_policy_is_set_before_torch_is_imported(program, policy, is_said):
    environment = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = f"{program}; import permafrost; print(__import__('os').environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )

    assert done.stdout.strip() == str(policy)
    assert done.stderr.count("import permafrost first") == is_said
