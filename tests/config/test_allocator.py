"""The allocator: memory of large blocks is used again, in this process and in those it starts."""

import os
import resource
import subprocess
import sys

import pytest

from permafrost.config.environment import ALLOCATOR_ENVIRONMENT
from tests.support.paths import ROOT

FAULTS = """
import resource, sys
from permafrost.config.environment import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how, **environment):
    """Page faults of ten arrays of 40 MB, which glibc always maps, one after another, after as many before."""
    inherited = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_memory_is_used_again_unless_the_user_sets_the_allocator():
    pages = 10 * 40_000_000 // resource.getpagesize()

    left, kept = faults("leave"), faults("keep")

    assert left > pages / 2000  # pages may be huge ones
    assert kept < left / 10
    assert faults("leave", **ALLOCATOR_ENVIRONMENT) < left / 10
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="0") > 3 * kept
