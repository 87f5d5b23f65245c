"""Every command of the page on object storage, executed one after the other against a server on this machine."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.buckets import KEYS, moto_server
from tests.support.commands import lines_of, verb_and_arguments
from tests.support.pages import blocks_of
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.processes import run_program

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "howto" / "object-storage.md"
SMALLER = {
    "precompute": [
        "data.train_digits=40",
        "data.test_digits=8",
        "data.teacher_digits=40",
        "executor=serial",
    ],
    "teach": ["teaching.trainer.epochs=1"],
    "distill": ["trainer.epochs=1"],
}
"""Words that make the demo small."""


def run(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Run a command, which must succeed, and return its output."""
    done = run_program([sys.executable, *words], cwd=folder, env=environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_the_page_end_in_a_report_in_the_bucket(tmp_path):
    executed = []
    with moto_server() as server:
        environment = os.environ | KEYS
        environment |= {
            "AWS_ENDPOINT_URL": server,
            "PERMAFROST_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
        }
        for block in blocks_of(PAGE, "bash"):
            if block.needs not in (None, "a bucket"):
                continue  # another server than that of this test
            for command in lines_of(block.code):
                found = verb_and_arguments(command)
                assert found is not None, command
                verb, words = found
                words = [
                    word.replace("/tmp/permafrost-cache", str(tmp_path / "own")) for word in words
                ]
                run(tmp_path, environment, "-m", "permafrost", verb, *words, *SMALLER.get(verb, []))
                executed.append(verb)
        (program,) = blocks_of(PAGE, "python")
        script = tmp_path / "loop.py"
        body = "".join(f"    {line}\n" for line in program.code.splitlines())
        script.write_text(f'if __name__ == "__main__":\n{body}')
        assert "torch.Size([32, 3, 32, 32])" in run(tmp_path, environment, str(script))
    assert {"precompute", "teach", "verify", "distill", "evaluate", "report"} <= {*executed}
    assert not list(tmp_path.glob("stores"))
    assert not list(tmp_path.glob("runs"))
