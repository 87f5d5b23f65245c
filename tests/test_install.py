"""Installation errors, each of which is one line with the reason."""

import os
import shutil
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import run_program


@pytest.fixture
def checkout(tmp_path):
    """Checkout with the two files that the installer reads and a folder with only basic shell commands."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "install", tmp_path / ".ci" / "install")
    shutil.copy(ROOT / "requirements.lock", tmp_path / "requirements.lock")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("bash", "rm", "touch", "mkdir", "env"):
        (commands / name).symlink_to(shutil.which(name))
    return tmp_path


def install(checkout, **environment):
    return run_program(
        ["bash", ".ci/install"],
        cwd=checkout,
        env={"PATH": str(checkout / "commands"), "HOME": str(checkout), **environment},
    )


def fake_python(checkout, version):
    path = checkout / "commands" / "python3"
    path.write_text(f'#!/bin/bash\n[ "$1" = --version ] && echo "Python {version}" || exit 1\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "found"), [("", "found: none"), ("3.9.2", "(found: Python 3.9.2)")]
)
def test_no_python_or_one_that_is_too_old(checkout, version, found):
    if version:
        fake_python(checkout, version)

    done = install(checkout)

    assert done.returncode == 1
    assert done.stderr.startswith("permafrost: needs Python 3.11 to 3.14")
    assert found in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_no_network(checkout):
    nowhere = "http://127.0.0.1:9"

    done = install(
        checkout,
        PYTHON=sys.executable,
        PIP_INDEX_URL=nowhere,
        PIP_RETRIES="0",
        PIP_CONFIG_FILE=os.devnull,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "permafrost: could not install the packages; check the network (or your package index "
        "settings), details in .venv/install.log"
    )
    assert len(done.stderr.splitlines()) == 2  # the first line announces the installation
    assert not (checkout / ".venv" / ".installed").exists()
