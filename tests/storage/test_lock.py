"""The lock that limits a store to one writer."""

import os
import subprocess
import sys
import textwrap

import pytest

from permafrost.storage.lock import LOCK_NAME, LockedError, folder_lock
from permafrost.store.verification import verify_store
from tests.support.paths import PYTHONPATH
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

HOLD = """
    import sys, time
    from pathlib import Path
    from permafrost.storage.lock import folder_lock

    with folder_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Process that holds the lock of <tmp_path>/store."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), tmp_path / "store"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_turned_away_at_once_and_the_lock_dies_with_its_holder(holder, tmp_path):
    store = tmp_path / "store"

    with pytest.raises(
        LockedError, match=rf"another process is writing to {store}; wait .*or choose"
    ):
        precompute.run(precompute_config(store))
    assert holder.poll() is None
    assert [path.name for path in store.iterdir()] == [LOCK_NAME]

    holder.kill()
    holder.wait()
    precompute.run(precompute_config(store))
    assert list(verify_store(store)) == []


def test_another_folder_is_free(holder, tmp_path):
    with folder_lock(tmp_path / "other"):
        pass


def test_the_lock_is_free_after_an_error(tmp_path):
    def fail():
        with folder_lock(tmp_path):
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    with folder_lock(tmp_path), pytest.raises(LockedError), folder_lock(tmp_path):
        pass
