"""The block of the page for a running Ray, typed into a shell, and the errors of `make submit`."""

import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from permafrost.cluster.submit import ClusterError, _check_size
from tests.support.image_sets import write_images
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.processes import alive, descendants, run_program, wait_until
from tests.support.ray_nodes import RAY, free_port, node_environment

BLOCKS = blocks_of(ROOT / "docs/howto/cluster.md", "bash")
(BLOCK,) = (block.code for block in BLOCKS if "ray start --head" in block.code)
MAKE = f"make submit -o install PY={sys.executable}"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def type_lines(lines, home):
    """Run lines in a shell with this home, in which no variable says how Ray authenticates."""
    environment = node_environment(HOME=str(home), PATH=PATH)
    del environment["RAY_AUTH_MODE"]
    return run_program(["bash", "-ec", lines], cwd=ROOT, env=environment)


@pytest.fixture
def block(tmp_path):
    """The block and its address, with small data, free ports and folders of this test, whose Ray ends with it."""
    if " " in RAY:
        pytest.skip(f"`ray start` runs a shell that ends at the space in {RAY}")
    folder = tempfile.mkdtemp(prefix="pf-", dir="/tmp")  # a short path, as of sockets
    head, lines = f"http://127.0.0.1:{free_port()}", BLOCK
    ports = f"--port={free_port()} --dashboard-agent-listen-port={free_port()}"
    ports += f" --dashboard-port={head.rpartition(':')[2]}"
    for text, replacement in {
        "source .venv/bin/activate ": "",
        "--head ": f"--head {ports} --temp-dir={folder} --object-store-memory=100000000 ",
        "make submit": MAKE,
        "http://<head>:8265": head,
        "teacher=torchvision teacher.name=resnet50": "teacher=cifar teacher.name=resnet8",
        "teacher.weights=/shared/resnet50.pth": "teacher.weights=random store.image_size=16",
        "cluster.actors=8": "cluster.actors=1",
        "/shared": str(tmp_path),
    }.items():
        assert text in lines
        lines = lines.replace(text, replacement)
    yield lines, head
    nodes = [p.pid for p in psutil.process_iter(["cmdline"]) if folder in str(p.info["cmdline"])]
    processes = {*nodes, *(child for node in nodes for child in descendants(node))}
    for process in processes:
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not alive(processes))
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.slow
@needs_make
@pytest.mark.parametrize("token", [None, "5e" * 32], ids=["empty home", "home with a token"])
def test_the_block_of_the_page_runs_as_written(block, tmp_path, token):
    lines, head = block
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    if token is not None:
        (home / ".ray/auth_token").write_text(token)
    write_images(tmp_path / "photos", *(f"{label}/{n}.png" for label in "ab" for n in range(9)))

    done = type_lines(lines, home)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher_records: 18" in done.stdout
    assert (token or (home / ".ray/auth_token").read_text()) in done.stdout
    # A shell whose home has the token needs no variable, and the job runs the code of the folder.
    code = f'{sys.executable} -c "import permafrost; print(permafrost.__file__)"'
    done = type_lines(f"{sys.executable} -m permafrost.cluster.submit {head} {code}", home)
    assert "runtime_resources" in done.stdout, done.stderr
    # Another shell is told what it needs.
    done = type_lines(f"{MAKE} VERB=precompute ADDRESS={head}", tmp_path)
    line, _ = done.stderr.splitlines()  # the second one is of make
    assert re.search(f"{head} refuses .* RAY_AUTH_MODE=token.* cluster.auth=disabled", line)


@needs_make
@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:8265"])
def test_an_address_without_a_head_is_one_line(tmp_path, address):
    done = type_lines(f"{MAKE} VERB=precompute ADDRESS={address}", tmp_path)

    line, _ = done.stderr.splitlines()  # the second one is of make
    assert re.match(f"make submit: error: .*ADDRESS={address}.*ray start --head", line)


def test_a_folder_that_is_too_large_is_named_with_its_largest_files(tmp_path):
    (tmp_path / ".rayignore").write_text("/runs\n")
    for name in ("runs/a.bin", ".venv/b.bin", "weights/c.bin"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 100 * 2**20)

    with pytest.raises(ClusterError, match=r"files are weights/c\.bin \(100\.0 MiB\), \.rayignore"):
        _check_size(tmp_path)
    (tmp_path / "weights/c.bin").unlink()
    _check_size(tmp_path)
