"""The batch file of the page for Slurm, with a `srun` that starts processes of this machine."""

import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest

import permafrost
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.processes import alive, run_program, wait_until
from tests.support.ray_nodes import node_environment
from tests.support.trees import tree_bytes
from tests.support.words import TINY_DATA, TINY_TEACHER

(BATCH_FILE,) = (block.code for block in blocks_of(ROOT / "docs/howto/cluster.md", "sh"))
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    [[ $1 == --nodelist=* ]] && node=${1#--nodelist=}
    shift
done
echo "$$ $node $*" >> "$STARTS"
if [[ "$1 $2" == "ray start" ]]; then
    set -- "$@" --object-store-memory=100000000 --resources="{\\"$node\\": 1}"
    [[ $* == *--head* ]] && set -- "$@" --temp-dir="$RAY_FOLDER" --include-dashboard=false
fi
exec "$@"
"""
SCONTROL = '#!/bin/bash\necho "$3" | tr , "\\n"\n'


def job_of_a_free_port():
    """Number of a job whose port of Ray is free."""
    for number in range(1000, 1200):
        with socket.socket() as server:
            if server.connect_ex(("127.0.0.1", 20000 + number)) != 0:
                return number
    raise AssertionError("no free port")


WORDS = [*TINY_DATA, *TINY_TEACHER, "store.shard_size=16", "annotate.batch_size=8"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_of_two_nodes_writes_the_store_of_one_process_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    permafrost.precompute(*WORDS, "store.path=expected", "run=expected", "executor=serial")
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert "source .venv/bin/activate\n" in BATCH_FILE
    (tmp_path / "job").write_text(BATCH_FILE.replace("source .venv/bin/activate\n", ""))
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as ray_folder:  # a short path, as of sockets
        done = run_program(
            [
                *("bash", "job", "precompute", *WORDS, f"store.path={tmp_path / 'store'}"),
                *(f"run={tmp_path / 'run'}", "cluster.actors=2", "cluster.cpus_per_actor=1"),
            ],
            env=node_environment(
                PATH=path,
                SLURM_JOB_ID=str(job_of_a_free_port()),
                SLURM_JOB_NODELIST="alpha,beta",
                SLURM_CPUS_PER_TASK="2",
                STARTS=str(tmp_path / "starts"),
                RAY_FOLDER=ray_folder,
            ),
        )

        assert done.returncode == 0, done.stderr
        starts = [line.split() for line in (tmp_path / "starts").read_text().splitlines()]
        rays = [words for words in starts if words[2:4] == ["ray", "start"]]
        assert [(words[1], "--head" in words) for words in rays] == [
            ("alpha", True),
            ("beta", False),
        ]
        wait_until(lambda: not alive([int(words[0]) for words in rays]))
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "expected")
