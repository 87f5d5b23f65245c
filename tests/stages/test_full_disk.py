"""A disk without room: one line that names the file, and the same store once there is room."""

import shutil
import subprocess
import sys

import pytest

from tests.support.processes import environment
from tests.support.trees import tree_bytes

WORDS = [
    *("precompute", "data=demo", "data.train_digits=40", "data.test_digits=4"),
    *("data.test_placements=1", "data.teacher_digits=4", "data.teacher_placements=1"),
    *("store.shard_size=32", "executor=serial", "teacher=cifar", "teacher.name=resnet8"),
    *("teacher.width=4", "teacher.weights=random", "store.path=store", "run=r"),
]
SCRIPT = """
mount -t tmpfs -o size=$1 tmpfs "$2" && cd "$2" && mkdir tmp && export TMPDIR="$2/tmp" || exit 99
shift 2
"$@" 2> "$OUT/errors"
echo $? > "$OUT/code"
mount -o remount,size=64m . || exit 99
"$@" 2> /dev/null && cp -r store "$OUT/store"
"""


def can_mount(folder):
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    return shutil.which("unshare") and not subprocess.run(command, check=False).returncode


def precompute_in(size, folder):
    """Run the command on a disk of a size, and again on a larger one; return its code and its errors."""
    out, place = folder / size, folder / f"{size} disk"
    out.mkdir()
    place.mkdir()
    command = [sys.executable, "-m", "permafrost", *WORDS]
    subprocess.run(
        ["unshare", "-m", "sh", "-c", SCRIPT, "sh", size, str(place), *command],
        env=environment() | {"OUT": str(out)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return int((out / "code").read_text()), (out / "errors").read_text()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_a_repeat_with_room_has_the_same_bytes(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a disk")
    assert precompute_in("64m", tmp_path)[0] == 0
    expected = tree_bytes(tmp_path / "64m" / "store")

    for size in ("64k", "344k", "480k"):
        code, errors = precompute_in(size, tmp_path)
        last = errors.splitlines()[-1]
        assert code == 1, size
        assert "Traceback" not in errors
        assert last.startswith("permafrost precompute: error: no room to write "), last
        assert "store/" in last
        assert tree_bytes(tmp_path / size / "store") == expected
